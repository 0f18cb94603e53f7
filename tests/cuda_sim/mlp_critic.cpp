// Drives the kernels of csrc/mlp_critic.cu (see driver.h). Words: op dtype rows columns slope p shift has_factor, then bias_rows (adjoint) or
// weight target one_sided (seed). What a kernel changes in place is an output that is filled anew before each of the simulator's runs.
#include "../../csrc/mlp_critic.cu"

#include <cstring>

#include "driver.h"

int main() {
  driver::Job job;
  const std::string op = job.word(), dtype = job.word();
  const std::int64_t rows = job.integer(), columns = job.integer();
  const double slope = job.number(), p = job.number();
  const std::int64_t shift = job.integer(), has_factor = job.integer(), n = rows * columns;
  const std::int64_t bytes = p > 0 ? rows * ((columns + 7) / 8) : -1;
  driver::with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = gankern::sum_t<T>;
    const auto fill = [n](T* to, const T* from) { std::memcpy(static_cast<void*>(to), from, static_cast<std::size_t>(n) * sizeof(T)); };
    const T* first = job.input<T>(n);
    T* a = job.output<T>(n, shift);
    if (op == "adjoint") {
      const std::int64_t bias_rows = job.integer();
      const T* y = job.input<T>(n, shift);
      const std::uint8_t* bits = job.input<std::uint8_t>(bytes);
      const A* factor = job.input<A>(has_factor ? bias_rows : -1);
      T* dbias = job.output<T>(columns);
      const std::int64_t shares = gankern::strip_shares(rows, columns);
      A* partials = job.output<A>(shares > 1 ? shares * columns : -1);
      job.run([&] {
        fill(a, first);
        gankern::launch_adjoint<T>(a, y, bits, factor, dbias, partials, rows, columns, bias_rows, slope, p, nullptr);
      });
      return;
    }
    const T* second = job.input<T>(n);
    T* b = job.output<T>(n, shift);
    const std::uint8_t* bits = op == "tangent" ? job.input<std::uint8_t>(bytes) : nullptr;
    const A* factor = job.input<A>(has_factor ? rows : -1);
    if (op == "tangent") {
      job.run([&] {
        fill(a, first);
        fill(b, second);
        gankern::launch_tangent<T>(a, b, bits, factor, rows, columns, slope, p, nullptr);
      });
    } else if (op == "seed") {
      const double weight = job.number(), target = job.number();
      const bool one_sided = job.integer() != 0;
      A *penalty = job.output<A>(1), *norms = job.output<A>(rows);
      job.run([&] {
        fill(a, first);
        fill(b, second);
        gankern::launch_seed<T>(a, b, factor, penalty, norms, rows, columns, weight, target, one_sided, nullptr);
      });
    } else {
      driver::Job::stop("unknown op");
    }
  });
}
