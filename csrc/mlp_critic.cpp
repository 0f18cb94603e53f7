// mlp_critic's elementwise stages on the CPU, in place: adjoint mask with bias sums, tangent mask, seed of the penalty's tangents.
// The contracts stand in gankern/ops/mlp_critic.py.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "cpu.h"
#include "math.h"
#include "philox.h"

namespace gankern {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr const char* kAdjoint = "mlp_critic_adjoint";
constexpr const char* kTangent = "mlp_critic_tangent";
constexpr const char* kSeed = "mlp_critic_seed";
constexpr int64_t kGrain = 32768;  // elements a thread takes at least

// What element i of a row is multiplied by: LeakyReLU's slope and, with kKeep, dropout's factor (element `column` of its row of bits)
template <bool kKeep, typename A>
GK_HD A mask_of(A y, A slope, const uint8_t* bits, int64_t column, A scale) {
  if constexpr (!kKeep) return lrelu_slope(y, slope);
  return lrelu_slope(y, slope) * (static_cast<A>((bits[column >> 3] >> (column & 7)) & 1) * scale);
}

// d = m * d, and sums += factor * d where there are sums
template <bool kKeep, typename T>
GK_HD void adjoint_row(T* d, const T* y, const uint8_t* bits, acc_t<T>* sums, acc_t<T> factor, int64_t first, int64_t n, acc_t<T> slope, acc_t<T> scale) {
  using A = acc_t<T>;
  if (sums != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      const A v = static_cast<A>(d[i]) * mask_of<kKeep>(static_cast<A>(y[i]), slope, bits, first + i, scale);
      d[i] = static_cast<T>(v);
      sums[i] += factor * v;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) d[i] = static_cast<T>(static_cast<A>(d[i]) * mask_of<kKeep>(static_cast<A>(y[i]), slope, bits, first + i, scale));
  }
}

// y = m * t; with a factor t = m * t, y = factor * y + t
template <bool kKeep, typename T>
GK_HD void tangent_row(T* t, T* y, const uint8_t* bits, const acc_t<T>* factor, int64_t n, acc_t<T> slope, acc_t<T> scale) {
  using A = acc_t<T>;
  if (factor != nullptr) {
    const A f = *factor;
    for (int64_t i = 0; i < n; ++i) {
      const A h = static_cast<A>(y[i]), v = static_cast<A>(t[i]) * mask_of<kKeep>(h, slope, bits, i, scale);
      t[i] = static_cast<T>(v);
      y[i] = static_cast<T>(f * h + v);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(static_cast<A>(t[i]) * mask_of<kKeep>(static_cast<A>(y[i]), slope, bits, i, scale));
  }
}

// The sum of squares, in 16 lanes that the compiler can vectorise.
template <typename T>
GK_HD acc_t<T> squares_row(const T* g, int64_t n) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = 16;
  A lanes[kLanes] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += static_cast<A>(g[i + k]) * static_cast<A>(g[i + k]);
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += static_cast<A>(g[i]) * static_cast<A>(g[i]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0];
}

// x = c * g; with a factor g = c * g, x = factor * x + g
template <typename T>
GK_HD void seed_row(T* g, T* x, const acc_t<T>* factor, acc_t<T> c, int64_t n) {
  using A = acc_t<T>;
  if (factor != nullptr) {
    const A f = *factor;
    for (int64_t i = 0; i < n; ++i) {
      const A v = c * static_cast<A>(g[i]);
      g[i] = static_cast<T>(v);
      x[i] = static_cast<T>(f * static_cast<A>(x[i]) + v);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(c * static_cast<A>(g[i]));
  }
}

// The instruction-set clones of the loops above (the attribute does not go on templates).
#define GK_ROWS(T)                                                                                                                            \
  GK_CLONES void adjoint(T* d, const T* y, const uint8_t* bits, acc_t<T>* sums, acc_t<T> factor, int64_t first, int64_t n, acc_t<T> slope,     \
                         acc_t<T> scale) {                                                                                                    \
    if (bits != nullptr) adjoint_row<true, T>(d, y, bits, sums, factor, first, n, slope, scale);                                              \
    else adjoint_row<false, T>(d, y, nullptr, sums, factor, first, n, slope, scale);                                                          \
  }                                                                                                                                           \
  GK_CLONES void tangent(T* t, T* y, const uint8_t* bits, const acc_t<T>* factor, int64_t n, acc_t<T> slope, acc_t<T> scale) {                \
    if (bits != nullptr) tangent_row<true, T>(t, y, bits, factor, n, slope, scale);                                                           \
    else tangent_row<false, T>(t, y, nullptr, factor, n, slope, scale);                                                                       \
  }                                                                                                                                           \
  GK_CLONES acc_t<T> squares(const T* g, int64_t n) { return squares_row<T>(g, n); }                                                          \
  GK_CLONES void seed(T* g, T* x, const acc_t<T>* factor, acc_t<T> c, int64_t n) { seed_row<T>(g, x, factor, c, n); }
GK_ROWS(double)
GK_ROWS(float)
GK_ROWS(BFloat16)
GK_ROWS(Half)

int64_t grain_for(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)); }

const uint8_t* bits_of(const char* op, const Tensor& bits, double p, int64_t rows, int64_t columns) {
  if (p <= 0.0) return nullptr;
  check(bits.scalar_type() == ScalarType::Byte && bits.is_cpu() && bits.numel() == rows * ((columns + 7) / 8), op, "bits",
        "be uint8 [rows, ceil(columns / 8)]");
  check_contiguous(op, "bits", bits);
  return data<uint8_t>(bits);
}

void check_factor(const char* op, const std::optional<Tensor>& factor, const Tensor& like, int64_t rows) {
  if (!factor.has_value()) return;
  check(factor->scalar_type() == accumulate_dtype(like.scalar_type()) && factor->is_cpu() && factor->numel() == rows, op, "factor",
        "have one value a row, in the accumulation dtype");
  check_contiguous(op, "factor", *factor);
}

// `part` [P, N] belongs to rows first ... first + P - 1 of `whole` [R, N].
void check_rows(const char* op, const Tensor& part, const Tensor& whole, int64_t first) {
  check_contiguous(op, "the first tensor", part);
  check_like(op, "the second tensor", whole, part);
  check(part.dim() == 2 && whole.dim() == 2 && part.size(1) == whole.size(1), op, "the tensors", "be matrices of as many columns");
  check(first >= 0 && first + part.size(0) <= whole.size(0), op, "first", "leave the rows inside the second tensor");
}

Tensor mlp_critic_adjoint(Tensor d, const Tensor& y, const Tensor& bits, double slope, double p, int64_t bias_rows, const std::optional<Tensor>& factor) {
  check_rows(kAdjoint, d, y, 0);
  const int64_t rows = d.size(0), columns = d.size(1), bytes = (columns + 7) / 8;
  check(y.size(0) == rows, kAdjoint, "y", "have the shape of d");
  check(bias_rows >= 0 && bias_rows <= rows, kAdjoint, "bias_rows", "be between 0 and the number of rows");
  check_factor(kAdjoint, factor, d, bias_rows);
  const uint8_t* mask = bits_of(kAdjoint, bits, p, rows, columns);
  const double scale = dropout_scale(p);
  Tensor dbias = empty_on_cpu({columns}, d.scalar_type());
  dispatch_floating(kAdjoint, d.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    T *into = mutable_data<T>(d), *column_sums = mutable_data<T>(dbias);
    const T* out = data<T>(y);
    const A* factors = factor.has_value() ? data<A>(*factor) : nullptr;
    // A strip of columns, all rows that are summed: the result does not depend on the number of threads. Runs of 128 rows are summed by
    // themselves first, which keeps the rounding error small. The other rows are done as the last "strips", 128 rows each.
    constexpr int64_t kStrip = 128, kRun = 128;
    const int64_t strips = (columns + kStrip - 1) / kStrip, rest = columns > 0 ? (rows - bias_rows + kRun - 1) / kRun : 0;
    const int64_t share = std::max<int64_t>(1, kGrain / (kStrip * std::max<int64_t>(1, std::max(bias_rows, std::min(columns, rows - bias_rows)))));
    torch::stable::parallel_for(0, strips + rest, share, [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) {
        if (strip >= strips) {
          const int64_t top = bias_rows + (strip - strips) * kRun;
          for (int64_t m = top; m < std::min(rows, top + kRun); ++m)
            adjoint(into + m * columns, out + m * columns, mask == nullptr ? nullptr : mask + m * bytes, nullptr, A(0), 0, columns, slope, scale);
          continue;
        }
        const int64_t first = strip * kStrip, n = std::min(kStrip, columns - first);
        A total[kStrip] = {}, run[kStrip];
        for (int64_t top = 0; top < bias_rows; top += kRun) {
          std::fill(run, run + n, A(0));
          for (int64_t m = top; m < std::min(bias_rows, top + kRun); ++m) {
            const int64_t at = m * columns + first;
            adjoint(into + at, out + at, mask == nullptr ? nullptr : mask + m * bytes, run, factors == nullptr ? A(1) : factors[m], first, n, slope,
                    scale);
          }
          for (int64_t i = 0; i < n; ++i) total[i] += run[i];
        }
        for (int64_t i = 0; i < n; ++i) column_sums[first + i] = static_cast<T>(total[i]);
      }
    });
  });
  return dbias;
}

void mlp_critic_tangent(Tensor t, Tensor y, const Tensor& bits, double slope, double p, int64_t first, const std::optional<Tensor>& factor) {
  check_rows(kTangent, t, y, first);
  const int64_t rows = t.size(0), columns = t.size(1), bytes = (columns + 7) / 8;
  check_factor(kTangent, factor, t, rows);
  const uint8_t* mask = bits_of(kTangent, bits, p, y.size(0), columns);
  const double scale = dropout_scale(p);
  dispatch_floating(kTangent, t.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    T *in = mutable_data<T>(t), *out = mutable_data<T>(y) + first * columns;
    const A* factors = factor.has_value() ? data<A>(*factor) : nullptr;
    torch::stable::parallel_for(0, rows, grain_for(columns), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        tangent(in + m * columns, out + m * columns, mask == nullptr ? nullptr : mask + (first + m) * bytes, factors == nullptr ? nullptr : factors + m,
                columns, slope, scale);
    });
  });
}

std::tuple<Tensor, Tensor> mlp_critic_seed(Tensor g, Tensor x, int64_t first, const std::optional<Tensor>& factor, double weight, double target,
                                           bool one_sided) {
  check_rows(kSeed, g, x, first);
  const int64_t rows = g.size(0), columns = g.size(1);
  check_factor(kSeed, factor, g, rows);
  const ScalarType dtype = accumulate_dtype(g.scalar_type());
  Tensor penalty = empty_on_cpu({}, dtype), norms = empty_on_cpu({rows}, dtype);
  dispatch_floating(kSeed, g.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    T *in = mutable_data<T>(g), *out = mutable_data<T>(x) + first * columns;
    A* norm = mutable_data<A>(norms);
    const A* factors = factor.has_value() ? data<A>(*factor) : nullptr;
    torch::stable::parallel_for(0, rows, grain_for(columns), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        norm[m] = std::sqrt(squares(in + m * columns, columns));
        const A c = penalty_slope(norm[m], static_cast<A>(2.0 * weight / static_cast<double>(rows)), static_cast<A>(target), one_sided);
        seed(in + m * columns, out + m * columns, factors == nullptr ? nullptr : factors + m, c, columns);
      }
    });
    A total = 0;
    for (int64_t top = 0; top < rows; top += 128) {
      A run = 0;
      for (int64_t m = top; m < std::min(rows, top + 128); ++m) {
        const A gap = penalty_gap(norm[m], static_cast<A>(target), one_sided);
        run += gap * gap;
      }
      total += run;
    }
    *mutable_data<A>(penalty) = static_cast<A>(weight) * (total / static_cast<A>(rows));
  });
  return {penalty, norms};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankern, m) {
  m.def("mlp_critic_adjoint(Tensor(a!) d, Tensor y, Tensor bits, float slope, float p, int bias_rows, Tensor? factor) -> Tensor");
  m.def("mlp_critic_tangent(Tensor(a!) t, Tensor(b!) y, Tensor bits, float slope, float p, int first, Tensor? factor) -> ()");
  m.def(
      "mlp_critic_seed(Tensor(a!) g, Tensor(b!) x, int first, Tensor? factor, float weight, float target, bool one_sided) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("mlp_critic_adjoint", TORCH_BOX(&mlp_critic_adjoint));
  m.impl("mlp_critic_tangent", TORCH_BOX(&mlp_critic_tangent));
  m.impl("mlp_critic_seed", TORCH_BOX(&mlp_critic_seed));
}

}  // namespace gankern
