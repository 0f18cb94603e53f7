// Drives the kernels of csrc/spectral_norm.cu (see driver.h). Words: op dtype iterations eps shift n, then outer rows inner of each of the n weights.
// Inputs of "forward": w, u, v of each; of "grad": the state, then w, g of each. `shift` elements of misalignment are given to every matrix.
#include "../../csrc/spectral_norm.cu"

#include "driver.h"

int main() {
  driver::Job job;
  const std::string op = job.word(), dtype = job.word();
  const std::int64_t iterations = job.integer();
  const double eps = job.number();
  const std::int64_t shift = job.integer(), n = job.integer();
  driver::with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = gankern::sum_t<T>;
    const bool forward = op == "forward";
    gankern::Table<T> table;
    table.n = static_cast<int>(n);
    std::int64_t states = 0;
    for (int i = 0; i < n; ++i) {
      auto& e = table.weights[i];
      e.outer = job.integer(), e.rows = job.integer(), e.inner = job.integer();
      states += e.rows + e.columns() + 1;
    }
    A* state = forward ? nullptr : const_cast<A*>(job.input<A>(states));
    for (int i = 0; i < n; ++i) {
      auto& e = table.weights[i];
      e.w = job.input<T>(e.numel(), shift);
      if (forward) {
        e.u0 = job.input<T>(e.rows);
        e.v0 = job.input<T>(e.columns());
      } else {
        e.g = job.input<T>(e.numel(), shift);
      }
      e.out = job.output<T>(e.numel(), shift);
      e.partials = job.output<A>(forward ? gankern::forward_partials(e, iterations) : gankern::grad_partials(e));
    }
    if (forward) state = job.output<A>(states);
    for (int i = 0; i < n; ++i) {
      auto& e = table.weights[i];
      e.u = state, e.v = state + e.rows;
      state += e.rows + e.columns() + 1;
    }
    job.run([&] {
      if (forward) gankern::launch_spectral_norm<T>(table, iterations, eps, nullptr);
      else gankern::launch_spectral_norm_grad<T>(table, nullptr);
    });
  });
}
