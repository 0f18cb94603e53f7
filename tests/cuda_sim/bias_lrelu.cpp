// Drives the kernels of csrc/bias_lrelu.cu (see driver.h). Words: op dtype outer channels inner slope shift flag, where `shift` elements of
// misalignment are given to every tensor and `flag` says whether there is a bias.
#include "../../csrc/bias_lrelu.cu"

#include "driver.h"

int main() {
  driver::Job job;
  const std::string op = job.word(), dtype = job.word();
  const std::int64_t outer = job.integer(), channels = job.integer(), inner = job.integer();
  const double slope = job.number();
  const std::int64_t shift = job.integer(), with_bias = job.integer(), n = outer * channels * inner;
  driver::with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (op == "act") {
      const T *x = job.input<T>(n, shift), *bias = job.input<T>(with_bias ? channels : -1, shift);
      T* y = job.output<T>(n, shift);
      job.run([&] { gankern::launch_act<T>(x, bias, y, outer, channels, inner, slope, nullptr); });
    } else if (op == "grad") {
      const T *dy = job.input<T>(n, shift), *y = job.input<T>(n, shift);
      T *dx = job.output<T>(n, shift), *dbias = job.output<T>(with_bias ? channels : -1);
      const std::int64_t shares = with_bias ? gankern::bias_shares(outer, channels, inner) : 1;
      auto* partials = job.output<gankern::sum_t<T>>(shares > 1 ? shares * channels : -1);
      job.run([&] { gankern::launch_grad<T>(dy, y, dx, dbias, partials, outer, channels, inner, slope, nullptr); });
    } else {
      driver::Job::stop("unknown op");
    }
  });
}
