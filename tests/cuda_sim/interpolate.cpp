// Drives the kernel of csrc/interpolate.cu (see driver.h). Words: dtype rows columns shift given; given: eps, else a seed, is an input.
#include "../../csrc/interpolate.cu"

#include "driver.h"

int main() {
  driver::Job job;
  const std::string dtype = job.word();
  const std::int64_t rows = job.integer(), columns = job.integer(), shift = job.integer(), given = job.integer();
  driver::with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = gankern::sum_t<T>;
    const T* real = job.input<T>(rows * columns, shift);
    const T* fake = job.input<T>(rows * columns, shift);
    const A* eps = job.input<A>(given ? rows : -1);
    const std::int64_t* seed = job.input<std::int64_t>(given ? -1 : 1);
    T* out = job.output<T>(rows * columns, shift);
    A* used = job.output<A>(rows);
    job.run([&] { gankern::launch_interpolate<T>(real, fake, eps, seed, out, used, rows, columns, nullptr); });
  });
}
