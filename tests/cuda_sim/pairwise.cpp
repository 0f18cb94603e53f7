// Drives the kernels of csrc/pairwise.cu (see driver.h). Words: features|grad|grad2 dtype n b c, or gram dtype rows columns upper count gammas...
#include "../../csrc/pairwise.cu"

#include "driver.h"

int main() {
  driver::Job job;
  const std::string op = job.word(), dtype = job.word();
  if (op == "gram") {
    const std::int64_t rows = job.integer(), columns = job.integer(), upper = job.integer();
    std::vector<double> gammas(static_cast<std::size_t>(job.integer()));
    for (double& gamma : gammas) gamma = job.number();
    driver::with_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (std::is_floating_point_v<T>) {
        const T *given = job.input<T>(rows * columns), *sq_a = job.input<T>(rows), *sq_b = job.input<T>(columns);
        T *gram = job.output<T>(rows * columns), *sums = job.output<T>(rows), *weights = job.output<T>(rows);
        job.run([&] {
          std::copy(given, given + rows * columns, gram);
          gankern::launch_gram<T>(gram, sq_a, sq_b, gammas, upper != 0, sums, weights, rows, columns, nullptr);
        });
      } else {
        driver::Job::stop("gram is float64 or float32");
      }
    });
    return 0;
  }
  const std::int64_t n = job.integer(), b = job.integer(), c = job.integer();
  driver::with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* h = job.input<T>(op == "grad2" ? n * b * c : -1);
    const T* g = job.input<T>(op == "features" ? -1 : n * b);
    const T* m = job.input<T>(n * b * c);
    if (op == "features") {
      T* o = job.output<T>(n * b);
      job.run([&] { gankern::launch_features<T>(m, o, n, b, c, nullptr); });
    } else {
      T* dm = job.output<T>(n * b * c);
      T* dg = job.output<T>(op == "grad2" ? n * b : -1);
      job.run([&] { gankern::launch_features_grad<T>(h, g, m, dg, dm, n, b, c, nullptr); });
    }
  });
}
