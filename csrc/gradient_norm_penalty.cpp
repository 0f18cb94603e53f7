// gradient_norm_penalty on the CPU: norms, penalty and mean norm in one pass, and its gradient in one. The contracts stand in
// gankern/ops/gradient_norm_penalty.py.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "math.h"

namespace gankern {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr const char* kOp = "gradient_norm_penalty";
constexpr const char* kGrad = "gradient_norm_penalty_grad";
constexpr int64_t kGrain = 32768;  // elements a thread takes at least
constexpr int64_t kChunk = 8192;   // elements summed by themselves: fixed, so that the sum does not depend on the threads
constexpr int kLanes = 32;

template <typename T>
GK_HD acc_t<T> square_sum(const T* g, int64_t n) {
  using A = acc_t<T>;
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) {
      const A v = static_cast<A>(g[i + k]);
      lanes[k] += v * v;
    }
  for (int k = 0; i + k < n; ++k) {
    const A v = static_cast<A>(g[i + k]);
    lanes[k] += v * v;
  }
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0];
}

template <typename T>
GK_HD void scale_row(const T* g, T* out, int64_t n, acc_t<T> factor) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(factor * static_cast<acc_t<T>>(g[i]));
}

#define GK_PENALTY_ROWS(T)                                                              \
  GK_CLONES acc_t<T> squares(const T* g, int64_t n) { return square_sum<T>(g, n); }     \
  GK_CLONES void scaled(const T* g, T* out, int64_t n, acc_t<T> f) { scale_row<T>(g, out, n, f); }
GK_PENALTY_ROWS(double)
GK_PENALTY_ROWS(float)
GK_PENALTY_ROWS(BFloat16)
GK_PENALTY_ROWS(Half)

struct Shape {
  int64_t rows, columns;
};

Shape shape_of(const char* op, const Tensor& g) {
  check_contiguous(op, "grad", g);
  check(g.dim() >= 1, op, "grad", "have at least one dimension");
  const int64_t rows = g.size(0);
  return {rows, rows > 0 ? g.numel() / rows : 0};
}

std::tuple<Tensor, Tensor, Tensor> penalty(const Tensor& grad, double target, bool one_sided, double weight) {
  const auto [rows, columns] = shape_of(kOp, grad);
  const ScalarType dtype = accumulate_dtype(grad.scalar_type());
  Tensor value = empty_on_cpu({}, dtype), norms = empty_on_cpu({rows}, dtype), mean = empty_on_cpu({}, dtype);
  dispatch_floating(kOp, grad.scalar_type(), [&, rows = rows, columns = columns](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* g = data<T>(grad);
    const int64_t chunks = std::max<int64_t>(1, (columns + kChunk - 1) / kChunk);
    std::vector<A> sums(static_cast<size_t>(rows * chunks));
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(columns, kChunk)));
    torch::stable::parallel_for(0, rows * chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / chunks, first = (i - row * chunks) * kChunk;
        sums[static_cast<size_t>(i)] = squares(g + row * columns + first, std::min(kChunk, columns - first));
      }
    });
    double paid = 0, total = 0;
    A* n = mutable_data<A>(norms);
    for (int64_t b = 0; b < rows; ++b) {
      A sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += sums[static_cast<size_t>(b * chunks + c)];
      n[b] = std::sqrt(sum);
      const double excess = norm_excess(n[b], static_cast<A>(target), one_sided);
      paid += excess * excess;
      total += n[b];
    }
    *mutable_data<A>(value) = static_cast<A>(weight * (paid / static_cast<double>(rows)));  // of no samples: 0 / 0, NaN
    *mutable_data<A>(mean) = static_cast<A>(total / static_cast<double>(rows));
  });
  return {value, norms, mean};
}

Tensor penalty_grad(const Tensor& c, const Tensor& grad, const Tensor& norms, double target, bool one_sided, double weight) {
  const auto [rows, columns] = shape_of(kGrad, grad);
  const ScalarType dtype = accumulate_dtype(grad.scalar_type());
  check(c.scalar_type() == dtype && c.numel() == 1 && c.is_cpu(), kGrad, "c", "be one number in the accumulation dtype");
  check(norms.scalar_type() == dtype && norms.numel() == rows && norms.is_cpu(), kGrad, "norms", "have one value a sample, in the accumulation dtype");
  check_contiguous(kGrad, "norms", norms);
  Tensor out = torch::stable::empty_like(grad);
  dispatch_floating(kGrad, grad.scalar_type(), [&, rows = rows, columns = columns](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const A factor = *data<A>(c) * static_cast<A>(2.0 * weight / static_cast<double>(std::max<int64_t>(1, rows)));
    const A* n = data<A>(norms);
    const T* g = data<T>(grad);
    T* to = mutable_data<T>(out);
    torch::stable::parallel_for(0, rows * columns, kGrain, [&, columns = columns](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t row = begin / columns, stop = std::min(end, (row + 1) * columns);
        scaled(g + begin, to + begin, stop - begin, factor * norm_slope(n[row], static_cast<A>(target), one_sided));
        begin = stop;
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankern, m) {
  m.def("gradient_norm_penalty(Tensor grad, float target, bool one_sided, float weight) -> (Tensor, Tensor, Tensor)");
  m.def("gradient_norm_penalty_grad(Tensor c, Tensor grad, Tensor norms, float target, bool one_sided, float weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("gradient_norm_penalty", TORCH_BOX(&penalty));
  m.impl("gradient_norm_penalty_grad", TORCH_BOX(&penalty_grad));
}

}  // namespace gankern
