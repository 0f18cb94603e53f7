// mlp_critic on the CPU: the elementwise stages, in place (adjoint mask with bias sums, tangent mask, seed of the penalty's tangents), and
// the whole pass, which drives them and the matrix products on any device that has the stages. The contracts stand in
// gankern/ops/mlp_critic.py.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

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
constexpr const char* kPass = "mlp_critic_pass";
constexpr int64_t kGrain = 32768;  // elements a thread takes at least
constexpr int64_t kSide = 16;      // of the blocks that `turn` takes

// y = LeakyReLU(y + bias), n elements in place; no bias: null
template <typename T>
GK_HD void activate_row(T* y, const T* bias, int64_t n, acc_t<T> slope) {
  using A = acc_t<T>;
  if (bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(lrelu(static_cast<A>(y[i]) + static_cast<A>(bias[i]), slope));
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(lrelu(static_cast<A>(y[i]), slope));
  }
}

// What an element is multiplied by: LeakyReLU's slope and, with kKeep, dropout's factor
template <bool kKeep, typename A>
GK_HD A mask_of(A y, A slope, const A* keep, int64_t i) {
  if constexpr (!kKeep) return lrelu_slope(y, slope);
  return lrelu_slope(y, slope) * keep[i];
}

// d = m * d, and sums += factor * d where there are sums
template <bool kKeep, typename T>
GK_HD void adjoint_row(T* d, const T* y, const acc_t<T>* keep, acc_t<T>* sums, acc_t<T> factor, int64_t n, acc_t<T> slope) {
  using A = acc_t<T>;
  if (sums != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      const A v = static_cast<A>(d[i]) * mask_of<kKeep>(static_cast<A>(y[i]), slope, keep, i);
      d[i] = static_cast<T>(v);
      sums[i] += factor * v;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) d[i] = static_cast<T>(static_cast<A>(d[i]) * mask_of<kKeep>(static_cast<A>(y[i]), slope, keep, i));
  }
}

// y = m * t; with a factor t = m * t, y = factor * y + t
template <bool kKeep, typename T>
GK_HD void tangent_row(T* t, T* y, const acc_t<T>* keep, const acc_t<T>* factor, int64_t n, acc_t<T> slope) {
  using A = acc_t<T>;
  if (factor != nullptr) {
    const A f = *factor;
    for (int64_t i = 0; i < n; ++i) {
      const A h = static_cast<A>(y[i]), v = static_cast<A>(t[i]) * mask_of<kKeep>(h, slope, keep, i);
      t[i] = static_cast<T>(v);
      y[i] = static_cast<T>(f * h + v);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(static_cast<A>(t[i]) * mask_of<kKeep>(static_cast<A>(y[i]), slope, keep, i));
  }
}

// chunk(first, n, factors) for each chunk of a row of `columns` elements, with dropout's factors
template <typename A, typename Chunk>
GK_HD void with_factors(const uint8_t* bits, int64_t columns, A scale, Chunk chunk) {
  A keep[kChunk];
  for (int64_t first = 0; first < columns; first += kChunk) {
    const int64_t n = std::min(kChunk, columns - first);
    keep_factors(bits + first / 8, n, scale, keep);
    chunk(first, n, keep);
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

// A block of kSide x kSide elements, transposed
template <typename T>
GK_HD void turn_block_of(T* out, int64_t out_stride, const T* in, int64_t in_stride) {
  T block[kSide][kSide];
  for (int64_t n = 0; n < kSide; ++n)
    for (int64_t m = 0; m < kSide; ++m) block[n][m] = in[n * in_stride + m];
  for (int64_t m = 0; m < kSide; ++m)
    for (int64_t n = 0; n < kSide; ++n) out[m * out_stride + n] = block[n][m];
}

// The instruction-set clones of the loops above (the attribute does not go on templates).
#define GK_ROWS(T)                                                                                                                            \
  GK_CLONES void activate(T* y, const T* bias, int64_t n, acc_t<T> slope) { activate_row<T>(y, bias, n, slope); }                             \
  GK_CLONES void adjoint(T* d, const T* y, const uint8_t* bits, acc_t<T>* sums, acc_t<T> factor, int64_t columns, acc_t<T> slope,             \
                         acc_t<T> scale) {                                                                                                    \
    if (bits == nullptr) return adjoint_row<false, T>(d, y, nullptr, sums, factor, columns, slope);                                           \
    with_factors(bits, columns, scale, [&](int64_t at, int64_t n, const acc_t<T>* keep) __attribute__((always_inline)) {                                           \
      adjoint_row<true, T>(d + at, y + at, keep, sums == nullptr ? nullptr : sums + at, factor, n, slope);                                    \
    });                                                                                                                                       \
  }                                                                                                                                           \
  GK_CLONES void tangent(T* t, T* y, const uint8_t* bits, const acc_t<T>* factor, int64_t columns, acc_t<T> slope, acc_t<T> scale) {          \
    if (bits == nullptr) return tangent_row<false, T>(t, y, nullptr, factor, columns, slope);                                                 \
    with_factors(bits, columns, scale,                                                                                                        \
                 [&](int64_t at, int64_t n, const acc_t<T>* keep) __attribute__((always_inline)) { tangent_row<true, T>(t + at, y + at, keep, factor, n, slope); }); \
  }                                                                                                                                           \
  GK_CLONES void turn_block(T* out, int64_t out_stride, const T* in, int64_t in_stride) { turn_block_of<T>(out, out_stride, in, in_stride); } \
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
  check(first >= 0 && first <= whole.size(0) - part.size(0), op, "first", "leave the rows inside the second tensor");
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
    // Runs of 32 rows, each with sums of its own, which are added in their order: the result does not depend on the number of threads.
    constexpr int64_t kRun = 32;
    std::vector<A> sums(static_cast<size_t>((bias_rows + kRun - 1) / kRun * columns));
    torch::stable::parallel_for(0, (rows + kRun - 1) / kRun, grain_for(kRun * columns), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin * kRun; m < std::min(rows, end * kRun); ++m)
        adjoint(into + m * columns, out + m * columns, mask == nullptr ? nullptr : mask + m * bytes,
                m < bias_rows ? sums.data() + m / kRun * columns : nullptr, factors == nullptr || m >= bias_rows ? A(1) : factors[m], columns, slope, scale);
    });
    torch::stable::parallel_for(0, columns, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<A> total(static_cast<size_t>(end - begin));
      for (int64_t run = 0; run * kRun < bias_rows; ++run)
        for (int64_t i = begin; i < end; ++i) total[static_cast<size_t>(i - begin)] += sums[static_cast<size_t>(run * columns + i)];
      for (int64_t i = begin; i < end; ++i) column_sums[i] = static_cast<T>(total[static_cast<size_t>(i - begin)]);
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

// --- the whole pass ------------------------------------------------------------------------------------------------------------
using Maybe = std::optional<Tensor>;
constexpr int64_t kRows[1] = {0};  // the dimension that is summed

// Call an operator: its outputs are the first values of what comes back, each to be taken once.
template <typename... Args>
std::array<StableIValue, sizeof...(Args)> call(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor take(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return like.is_cpu() ? empty_on_cpu(sizes, dtype) : torch::stable::new_empty(like, sizes, dtype);
}

Tensor rows_of(Tensor t, int64_t first, int64_t count) { return count == t.size(0) ? t : torch::stable::narrow(t, 0, first, count); }

void copy_rows(const Tensor& into, int64_t first, const Tensor& from) {
  Tensor part = rows_of(into, first, from.size(0));
  torch::stable::copy_(part, from);
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// a b, and into `out` x wᵀ + bias. Through the dispatcher, 1.7 us a call (aoti_torch_cpu_mm_out: 0.7 us): for any device, and profilers see it.
Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor out = empty(a, {a.size(0), b.size(1)}, a.scalar_type());
  return take(call("aten::mm", "out", a, b, out)[0]);
}

// The transpose of `in` [columns, rows] into `out` [rows, columns].
template <typename T>
void turn(T* out, const T* in, int64_t rows, int64_t columns) {
  const int64_t strips = (columns + kSide - 1) / kSide;
  torch::stable::parallel_for(0, strips, grain_for(kSide * rows), [&](int64_t begin, int64_t end) {
    for (int64_t left = begin * kSide; left < std::min(columns, end * kSide); left += kSide)
      for (int64_t top = 0; top < rows; top += kSide) {
        if (top + kSide <= rows && left + kSide <= columns) {
          turn_block(out + top * columns + left, columns, in + left * rows + top, rows);
          continue;
        }
        for (int64_t m = top; m < std::min(rows, top + kSide); ++m)
          for (int64_t n = left; n < std::min(columns, left + kSide); ++n) out[m * columns + n] = in[n * rows + m];
      }
  });
}

// For few rows and large weights the CPU makes (w xᵀ)ᵀ faster than x wᵀ. MKL, one thread, 784 -> 1024: 16 rows 221 us instead of 336, 64 rows 713
// instead of 835, 128 rows 1344 instead of 1494. With what turning it over costs, the whole generator's pass of 784-1024-512-256-1: 16 rows 1.14 ms
// instead of 1.44, 64 rows 3.08 instead of 3.22; beyond, nothing is gained.
constexpr int64_t kFewRows = 64, kLargeWeights = 1 << 15;

void linear(Tensor out, const Tensor& x, const Tensor& w, const Maybe& bias) {
  if (!bias.has_value() && x.is_cpu() && x.element_size() > 2 && x.size(0) <= kFewRows && w.numel() >= kLargeWeights) {
    const Tensor z = product(w, transposed(x));
    dispatch_floating(kPass, x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      turn(mutable_data<T>(out), data<T>(z), x.size(0), w.size(0));
    });
    return;
  }
  take(bias.has_value() ? call("aten::linear", "out", x, w, bias, out)[0] : call("aten::mm", "out", x, transposed(w), out)[0]);
}

// share * real + (1 - share) * fake into `out`, for n rows each
void between(const Tensor& out, const Tensor& real, const Tensor& fake, const Tensor& share) {
  take(call("aten::lerp", "Tensor_out", fake, real, share, out)[0]);
}

// The stages: on the CPU without the dispatcher, 3 us a call
Tensor adjoint_of(const Tensor& d, const Tensor& y, const Tensor& bits, double slope, double p, int64_t bias_rows, const Maybe& factor) {
  if (d.is_cpu()) return mlp_critic_adjoint(d, y, bits, slope, p, bias_rows, factor);
  return take(call("gankern::mlp_critic_adjoint", "", d, y, bits, slope, p, bias_rows, factor)[0]);
}

void to_tangent(const Tensor& t, const Tensor& y, const Tensor& bits, double slope, double p, int64_t first, const Maybe& factor) {
  if (t.is_cpu()) mlp_critic_tangent(t, y, bits, slope, p, first, factor);
  else call("gankern::mlp_critic_tangent", "", t, y, bits, slope, p, first, factor);
}

// y = LeakyReLU(y + bias) in place, on the CPU
void activate(Tensor& y, const Maybe& bias, double slope) {
  const int64_t rows = y.size(0), columns = y.size(1);
  Maybe flat;
  if (bias.has_value()) flat = torch::stable::contiguous(*bias);
  dispatch_floating(kPass, y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* out = mutable_data<T>(y);
    const T* b = flat.has_value() ? data<T>(*flat) : nullptr;
    torch::stable::parallel_for(0, rows, grain_for(columns), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) activate(out + m * columns, b, columns, static_cast<acc_t<T>>(slope));
    });
  });
}

// The output of a hidden layer and its dropout bits. Where there is a share the last rows of x are not read: they lie between the first two
// times as many, and so do their rows of the product. In 16 bits the product adds the bias itself, before it rounds, as eager does.
std::tuple<Tensor, Tensor> layer(const Tensor& x, const Tensor& w, const Maybe& bias, double slope, double p, const Maybe& seed, const Maybe& share) {
  const bool inside = x.element_size() == 2;
  const int64_t rows = x.size(0), extra = share.has_value() ? share->size(0) : 0;
  Tensor z = empty(x, {rows, w.size(0)}, x.scalar_type());
  linear(rows_of(z, 0, rows - extra), rows_of(x, 0, rows - extra), w, inside ? bias : Maybe());
  if (share.has_value()) between(rows_of(z, 2 * extra, extra), rows_of(z, 0, extra), rows_of(z, extra, extra), *share);
  Maybe outside;
  if (!inside && bias.has_value()) outside = torch::stable::contiguous(*bias);
  if (z.is_cpu() && p <= 0.0) {
    activate(z, outside, slope);
    return {z, empty_on_cpu({0}, ScalarType::Byte)};
  }
  const auto out = call("gankern::linear_lrelu_act", "", z, outside, slope, p, seed);
  return {take(out[0]), take(out[1])};
}

// Operators run below autograd here, whatever the caller's tensors require.
struct NoGrad {
  const bool before = aoti_torch_grad_mode_is_enabled();
  NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before); }
};

void check_pass(const Maybe& real, const Maybe& fake, const Maybe& x_hat, const Maybe& eps, const std::vector<Maybe>& seeds,
                const std::vector<Tensor>& weights, const std::vector<Maybe>& biases, const std::vector<double>& slopes, const std::vector<double>& p,
                const std::vector<bool>& wanted) {
  const size_t layers = weights.size();
  check(layers > 0, kPass, "weights", "hold at least one matrix");
  check(biases.size() == layers, kPass, "biases", "be as many as weights");
  check(seeds.size() + 1 == layers && slopes.size() + 1 == layers && p.size() + 1 == layers, kPass, "seeds, slopes and p",
        "be as many as hidden layers");
  check(wanted.size() == 2 * layers + 1, kPass, "wanted", "be one more than twice as many as weights");
  for (size_t i = layers; i < wanted.size(); ++i)
    check(!wanted[i] || fake.has_value(), kPass, "wanted", "want neither bias nor samples of a penalty alone");
  check(fake.has_value() || (x_hat.has_value() && !real.has_value()), kPass, "the samples", "be fake, real and fake, x_hat, or all three");
  check(!eps.has_value() || (real.has_value() && !x_hat.has_value() && eps->numel() == real->size(0) && fake->size(0) == real->size(0)), kPass, "eps",
        "have one value for each pair of samples, without x_hat");
  int64_t columns = weights[0].dim() == 2 ? weights[0].size(1) : -1;
  for (const Maybe* x : {&real, &fake, &x_hat})
    check(!x->has_value() || ((*x)->dim() == 2 && (*x)->size(1) == columns), kPass, "the samples", "be matrices of as many columns as weights[0]");
  for (size_t i = 0; i < layers; ++i) {
    const Tensor& w = weights[i];
    check(w.dim() == 2 && w.size(1) == columns, kPass, "weights", "be matrices that follow each other");
    columns = w.size(0);
    check(!biases[i].has_value() || (biases[i]->dim() == 1 && biases[i]->numel() == columns), kPass, "biases", "have one element for each row of their weights");
  }
  check(columns == 1, kPass, "weights", "end with one row");
}

// loss, adversarial, penalty, norms, statistics, then the gradients that are wanted, of weights, then of biases, then of the fake samples (of the
// adversarial loss alone: a penalty does not move its points).
std::vector<Tensor> mlp_critic_pass(const Maybe& real, const Maybe& fake, const Maybe& x_hat, const Maybe& eps, std::vector<Maybe> seeds,
                                    std::vector<Tensor> weights, std::vector<Maybe> biases, std::vector<double> slopes, std::vector<double> p,
                                    int64_t term_real, double weight_real, double target_real, const Maybe& targets_real, int64_t term_fake,
                                    double weight_fake, double target_fake, const Maybe& targets_fake, int64_t relative, bool penalise, int64_t first,
                                    int64_t count, double weight, double target, bool one_sided, std::vector<bool> wanted,
                                    std::optional<ScalarType> autocast) {
  check_pass(real, fake, x_hat, eps, seeds, weights, biases, slopes, p, wanted);
  const NoGrad guard;
  std::vector<ScalarType> dtypes;
  for (Tensor& w : weights) {
    dtypes.push_back(w.scalar_type());
    if (autocast.has_value()) w = torch::stable::to(w, *autocast);
  }
  for (size_t i = 0; i < biases.size(); ++i) {
    dtypes.push_back(biases[i].has_value() ? biases[i]->scalar_type() : dtypes[i]);
    if (autocast.has_value() && biases[i].has_value()) biases[i] = torch::stable::to(*biases[i], *autocast);
  }
  const bool judge = fake.has_value();
  const int64_t hidden = static_cast<int64_t>(weights.size()) - 1;
  const Tensor& last = weights[static_cast<size_t>(hidden)];
  const ScalarType dtype = last.scalar_type(), sums = accumulate_dtype(dtype);
  const int64_t n_real = real.has_value() ? real->size(0) : 0, n_fake = judge ? fake->size(0) : 0, judged = n_real + n_fake;
  const int64_t rows = judged + (eps.has_value() ? n_real : x_hat.has_value() ? x_hat->size(0) : 0);
  const bool inside = penalise && first < judged;
  check(first >= 0 && count >= 0 && first <= rows - count, kPass, "first and count", "be rows of the batch");
  check(rows == judged || (penalise && first == judged && count == rows - judged), kPass, "first and count", "be the rows of x_hat or eps");

  // [real; fake; x̂], where x̂ between real and fake need not be known: only what the first layer makes of them
  const bool as_given = judge && rows == n_fake && !penalise && fake->scalar_type() == dtype;
  const Tensor x = as_given ? torch::stable::contiguous(*fake) : empty(last, {rows, weights[0].size(1)}, dtype);
  if (real.has_value()) copy_rows(x, 0, *real);
  if (judge && !as_given) copy_rows(x, n_real, *fake);
  if (x_hat.has_value()) copy_rows(x, judged, *x_hat);
  Maybe share;
  if (eps.has_value()) {
    const ScalarType exact = real->scalar_type();
    share = torch::stable::to(torch::stable::reshape(*eps, {n_real, 1}), exact);
    if (last.element_size() == 2) {  // rounded, the products of real and fake would make those of x̂ coarser
      const Tensor points = empty(x, {n_real, x.size(1)}, exact);
      between(points, *real, *fake, *share);
      copy_rows(x, judged, points);
      share.reset();
    }
  }

  // forward
  std::vector<Tensor> h{x}, bits;
  for (size_t i = 0; i < seeds.size(); ++i) {
    auto [y, kept] = layer(h[i], weights[i], biases[i], slopes[i], p[i], seeds[i], i == 0 ? share : Maybe());
    h.push_back(y);
    bits.push_back(kept);
  }

  // the adversarial loss, and what the adjoints begin with, where a weight or bias below the last layer or the penalty asks for them
  bool deep = penalise;
  for (size_t i = 0; i + 1 < wanted.size(); ++i) deep = deep || (wanted[i] && i % weights.size() != static_cast<size_t>(hidden));
  Tensor adversarial, stats, slope, d;
  Maybe seed, factor, row_factor;
  if (judge) {
    const Tensor logits = empty(last, {judged, 1}, dtype);
    linear(logits, rows_of(h.back(), 0, judged), last, biases.back());
    const int64_t mean = 1;
    auto out = call("gankern::gan_loss", "", logits, Maybe(), n_real, term_real, weight_real, target_real, targets_real, term_fake, weight_fake,
                    target_fake, targets_fake, mean, relative);
    adversarial = take(out[0]), stats = take(out[1]), slope = torch::stable::reshape(take(out[2]), {judged});
    take(out[3]);
    const bool seeded = deep || wanted[static_cast<size_t>(hidden)];
    if (seeded) {
      seed = torch::stable::fill_(empty(last, {rows}, dtype), 1.0);
      copy_rows(*seed, 0, slope);
    }
    if (inside) {  // rows that are penalised too have the seed 1, and their slope as a factor
      torch::stable::fill_(rows_of(*seed, first, count), 1.0);
      factor = rows_of(slope, first, count);
      row_factor = torch::stable::fill_(empty(last, {judged}, sums), 1.0);
      copy_rows(*row_factor, first, *factor);
    }
    if (deep) d = product(torch::stable::reshape(*seed, {rows, 1}), last);
  } else {
    adversarial = torch::stable::fill_(empty(last, {}, sums), 0.0);
    stats = torch::stable::fill_(empty(last, {3}, sums), std::numeric_limits<double>::quiet_NaN());
    d = empty(last, {rows, last.size(1)}, dtype);
    torch::stable::copy_(d, last);
  }

  // adjoints, with the sums that are the gradients of the biases
  std::vector<Tensor> adjoints(h.size() - 1), dbias(h.size() - 1);
  for (size_t i = deep ? adjoints.size() : 0; i-- > 0;) {
    adjoints[i] = d;
    const bool summed = wanted[weights.size() + i];
    const int64_t bias_rows = summed ? judged : 0;
    dbias[i] = adjoint_of(d, h[i + 1], bits[i], slopes[i], p[i], bias_rows, summed ? row_factor : Maybe());
    if (i > 0) d = product(d, weights[i]);
  }

  // the penalty, and its tangents over the activations of its rows
  Tensor penalty, norms;
  if (penalise) {
    const Tensor g = adjoints.empty() ? rows_of(d, first, count) : product(rows_of(adjoints[0], first, count), weights[0]);
    auto out = call("gankern::mlp_critic_seed", "", g, x, first, factor, weight, target, one_sided);
    penalty = take(out[0]), norms = take(out[1]);
    Tensor t = inside ? g : rows_of(x, first, count);
    for (size_t i = 0; i < adjoints.size(); ++i) {
      const Tensor u = empty(last, {count, weights[i].size(0)}, dtype);
      linear(u, t, weights[i], Maybe());
      t = u;
      to_tangent(t, h[i + 1], bits[i], slopes[i], p[i], first, factor);
      if (!inside) t = rows_of(h[i + 1], first, count);
    }
  } else {
    penalty = torch::stable::fill_(empty(last, {}, sums), 0.0);
    norms = empty(last, {0}, sums);
  }

  // weights
  std::vector<Tensor> results{torch::stable::subtract(adversarial, penalty, -1.0), adversarial, penalty, norms, stats};
  for (size_t i = 0; i + 1 < wanted.size(); ++i) {
    if (!wanted[i]) continue;
    Tensor grad;
    if (i < adjoints.size()) grad = product(transposed(adjoints[i]), h[i]);
    else if (i == adjoints.size()) grad = judge ? product(torch::stable::reshape(*seed, {1, rows}), h.back()) : torch::stable::sum(h.back(), kRows, true);
    else if (i + 2 < wanted.size()) grad = dbias[i - weights.size()];
    else grad = torch::stable::sum(slope, kRows, true);
    results.push_back(grad.scalar_type() == dtypes[i] ? grad : torch::stable::to(grad, dtypes[i]));
  }

  // the fake samples: adjoints of their rows alone, one layer further
  if (wanted.back()) {
    Tensor head = torch::stable::reshape(rows_of(slope, n_real, n_fake), {n_fake, 1});
    if (dtype != sums) head = torch::stable::to(head, dtype);
    Tensor g = product(head, last);
    for (size_t i = adjoints.size(); i-- > 0;) {
      const Tensor kept = p[i] > 0.0 ? rows_of(bits[i], n_real, n_fake) : bits[i];
      adjoint_of(g, rows_of(h[i + 1], n_real, n_fake), kept, slopes[i], p[i], 0, Maybe());
      g = product(g, weights[i]);
    }
    results.push_back(g.scalar_type() == fake->scalar_type() ? g : torch::stable::to(g, fake->scalar_type()));
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankern, m) {
  m.def("mlp_critic_adjoint(Tensor(a!) d, Tensor y, Tensor bits, float slope, float p, int bias_rows, Tensor? factor) -> Tensor");
  m.def("mlp_critic_tangent(Tensor(a!) t, Tensor(b!) y, Tensor bits, float slope, float p, int first, Tensor? factor) -> ()");
  m.def(
      "mlp_critic_seed(Tensor(a!) g, Tensor(b!) x, int first, Tensor? factor, float weight, float target, bool one_sided) -> (Tensor, Tensor)");
  m.def(
      "mlp_critic_pass(Tensor? real, Tensor? fake, Tensor? x_hat, Tensor? eps, Tensor?[] seeds, Tensor[] weights, Tensor?[] biases, "
      "float[] slopes, float[] p, int term_real, float weight_real, float target_real, Tensor? targets_real, int term_fake, float weight_fake, "
      "float target_fake, Tensor? targets_fake, int relative, bool penalise, int first, int count, float weight, float target, bool one_sided, "
      "bool[] wanted, ScalarType? autocast) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("mlp_critic_adjoint", TORCH_BOX(&mlp_critic_adjoint));
  m.impl("mlp_critic_tangent", TORCH_BOX(&mlp_critic_tangent));
  m.impl("mlp_critic_seed", TORCH_BOX(&mlp_critic_seed));
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CompositeExplicitAutograd, m) { m.impl("mlp_critic_pass", TORCH_BOX(&mlp_critic_pass)); }

}  // namespace gankern
