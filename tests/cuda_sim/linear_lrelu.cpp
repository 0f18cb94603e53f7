// Drives the kernels of csrc/linear_lrelu.cu (see driver.h). Words: op dtype rows columns slope p shift flag, where `shift` elements of
// misalignment are given to every matrix and `flag` says whether there is a bias.
#include "../../csrc/linear_lrelu.cu"

#include "driver.h"

int main() {
  driver::Job job;
  const std::string op = job.word(), dtype = job.word();
  const std::int64_t rows = job.integer(), columns = job.integer();
  const double slope = job.number(), p = job.number();
  const std::int64_t shift = job.integer(), with_bias = job.integer(), n = rows * columns;
  const std::int64_t bytes = p > 0 ? rows * ((columns + 7) / 8) : -1;
  driver::with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (op == "act") {
      const T* z = job.input<T>(n, shift);
      const T* bias = job.input<T>(with_bias ? columns : -1, shift);
      const std::int64_t* seed = job.input<std::int64_t>(p > 0 ? 1 : -1);
      T* y = job.output<T>(n, shift);
      std::uint8_t* bits = job.output<std::uint8_t>(bytes);
      job.run([&] { gankern::launch_act<T>(z, bias, y, bits, seed, rows, columns, slope, p, nullptr); });
    } else if (op == "act_grad") {
      const T* dy = job.input<T>(n, shift);
      const T* y = job.input<T>(n, shift);
      const std::uint8_t* bits = job.input<std::uint8_t>(bytes);
      T* dz = job.output<T>(n, shift);
      T* dbias = job.output<T>(with_bias ? columns : -1);
      const std::int64_t shares = with_bias ? gankern::strip_shares(rows, columns) : 1;
      auto* partials = job.output<gankern::sum_t<T>>(shares > 1 ? shares * columns : -1);
      job.run([&] { gankern::launch_act_grad<T>(dy, y, bits, dz, dbias, partials, rows, columns, slope, p, nullptr); });
    } else {
      driver::Job::stop("unknown op");
    }
  });
}
