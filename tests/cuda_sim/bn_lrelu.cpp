// Drives the kernels of csrc/bn_lrelu.cu (see driver.h). Words: forward|eval|grad|grad2 dtype batch channels space eps slope momentum shift affine
// training. `shift` elements of misalignment are given to every x-sized tensor; affine 0: no weight, bias, ddweight, ddbias, running averages.
#include "../../csrc/bn_lrelu.cu"

#include "driver.h"

int main() {
  driver::Job job;
  const std::string op = job.word(), dtype = job.word();
  gankern::Space s{};
  s.batch = job.integer();
  s.channels = job.integer();
  s.space = job.integer();
  const double eps = job.number(), slope = job.number(), momentum = job.number();
  const std::int64_t shift = job.integer(), affine = job.integer() != 0 ? s.channels : -1, training = job.integer();
  const std::int64_t n = s.batch * s.channels * s.space, c = s.channels;
  driver::with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = gankern::sum_t<T>;
    const std::int64_t sums = gankern::bn_shares(s) > 1 ? gankern::bn_shares(s) * c : -1;
    const T* x = job.input<T>(n, shift);
    gankern::Parameters<A> p{nullptr, nullptr, job.input<A>(affine), job.input<A>(affine), static_cast<A>(eps), static_cast<A>(slope)};
    if (op == "forward") {
      const A *from_mean = job.input<A>(affine), *from_var = job.input<A>(affine);
      T* y = job.output<T>(n, shift);
      A *mean = job.output<A>(c), *var = job.output<A>(c), *running_mean = job.output<A>(affine), *running_var = job.output<A>(affine);
      A* partials = job.output<A>(sums < 0 ? -1 : 2 * sums);
      job.run([&] {
        if (from_mean != nullptr) {
          std::copy(from_mean, from_mean + c, running_mean);
          std::copy(from_var, from_var + c, running_var);
        }
        gankern::launch_forward<T>(x, p, running_mean, running_var, y, mean, var, partials, s, momentum, nullptr);
      });
      return;
    }
    p.mean = job.input<A>(c);
    p.var = job.input<A>(c);
    if (op == "eval") {
      T* y = job.output<T>(n, shift);
      job.run([&] { gankern::launch_eval<T>(x, p, y, s, nullptr); });
    } else if (op == "grad") {
      const T* dy = job.input<T>(n, shift);
      T* dx = job.output<T>(n, shift);
      A *dweight = job.output<A>(c), *dbias = job.output<A>(c), *partials = job.output<A>(sums < 0 ? -1 : 2 * sums);
      job.run([&] { gankern::launch_grad<T>(dy, x, p, dx, dweight, dbias, partials, s, training != 0, nullptr); });
    } else if (op == "grad2") {
      const T* dy = job.input<T>(n, shift);
      const T* ddx = job.input<T>(n, shift);
      const A *ddweight = job.input<A>(affine), *ddbias = job.input<A>(affine);
      T *ddy = job.output<T>(n, shift), *dx = job.output<T>(n, shift);
      A *dweight = job.output<A>(c), *partials = job.output<A>(sums < 0 ? -1 : 5 * sums);
      job.run([&] { gankern::launch_grad2<T>(ddx, ddweight, ddbias, dy, x, p, ddy, dx, dweight, partials, s, training != 0, nullptr); });
    } else {
      driver::Job::stop("unknown op");
    }
  });
}
