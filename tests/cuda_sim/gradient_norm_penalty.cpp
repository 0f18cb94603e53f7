// Drives the kernels of csrc/gradient_norm_penalty.cu (see driver.h). Words: op dtype rows columns shift target one_sided weight.
#include "../../csrc/gradient_norm_penalty.cu"

#include "driver.h"

int main() {
  driver::Job job;
  const std::string op = job.word(), dtype = job.word();
  const std::int64_t rows = job.integer(), columns = job.integer(), shift = job.integer();
  const double target = job.number();
  const bool one_sided = job.integer() != 0;
  const double weight = job.number();
  driver::with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = gankern::sum_t<T>;
    if (op == "penalty") {
      const T* grad = job.input<T>(rows * columns, shift);
      A* value = job.output<A>(1);
      A* norms = job.output<A>(rows);
      A* mean = job.output<A>(1);
      A* sums = job.output<A>(rows * gankern::share_count(columns));
      job.run([&] { gankern::launch_penalty<T>(grad, sums, norms, value, mean, rows, columns, target, one_sided, weight, nullptr); });
    } else if (op == "grad") {
      const A* c = job.input<A>(1);
      const T* grad = job.input<T>(rows * columns, shift);
      const A* norms = job.input<A>(rows);
      T* out = job.output<T>(rows * columns, shift);
      job.run([&] { gankern::launch_penalty_grad<T>(c, grad, norms, out, rows, columns, target, one_sided, weight, nullptr); });
    } else {
      driver::Job::stop("unknown op");
    }
  });
}
