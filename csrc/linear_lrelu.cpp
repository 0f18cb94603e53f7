// linear_lrelu around the matrix product, on the CPU: bias + LeakyReLU + dropout forward, and its gradient with the bias sum.
// The contracts stand in gankern/ops/linear_lrelu.py.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "philox.h"

namespace gankern {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr const char* kAct = "linear_lrelu_act";
constexpr const char* kGrad = "linear_lrelu_act_grad";
constexpr int64_t kGrain = 32768;  // elements a thread takes at least

// y = LeakyReLU(z + bias) of n elements
template <typename T>
GK_HD void act_row(const T* z, const T* bias, T* y, int64_t n, acc_t<T> slope) {
  using A = acc_t<T>;
  if (bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(lrelu(static_cast<A>(z[i]) + static_cast<A>(bias[i]), slope));
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(lrelu(static_cast<A>(z[i]), slope));
  }
}

// y *= scale where the bit is set, *= 0 elsewhere
template <typename T>
GK_HD void keep_row(const uint8_t* bits, T* y, int64_t n, acc_t<T> scale) {
  using A = acc_t<T>;
  A keep[kChunk];
  for (int64_t top = 0; top < n; top += kChunk) {
    const int64_t m = std::min(kChunk, n - top);
    keep_factors(bits + top / 8, m, scale, keep);
    for (int64_t i = 0; i < m; ++i) y[top + i] = static_cast<T>(static_cast<A>(y[top + i]) * keep[i]);
  }
}

// dz = dy * slope of the activation, and the running column sums (null: none)
template <typename T>
GK_HD void grad_row(const T* dy, const T* y, T* dz, acc_t<T>* sums, int64_t n, acc_t<T> slope) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < n; ++i) {
    const A d = static_cast<A>(dy[i]) * lrelu_slope(static_cast<A>(y[i]), slope);
    dz[i] = static_cast<T>(d);
    if (sums != nullptr) sums[i] += d;
  }
}

// The same with dropout; bits: those of the first element, at the start of a byte
template <typename T>
GK_HD void grad_keep_row(const T* dy, const T* y, const uint8_t* bits, T* dz, acc_t<T>* sums, int64_t n, acc_t<T> slope, acc_t<T> scale) {
  using A = acc_t<T>;
  A keep[kChunk];
  for (int64_t top = 0; top < n; top += kChunk) {
    const int64_t m = std::min(kChunk, n - top);
    keep_factors(bits + top / 8, m, scale, keep);
    for (int64_t i = 0; i < m; ++i) {
      const A d = static_cast<A>(dy[top + i]) * keep[i] * lrelu_slope(static_cast<A>(y[top + i]), slope);
      dz[top + i] = static_cast<T>(d);
      if (sums != nullptr) sums[top + i] += d;
    }
  }
}

GK_CLONES void keep_bytes(uint64_t seed, uint64_t counter, uint32_t threshold, uint8_t* out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = keep_byte(seed, counter + static_cast<uint64_t>(j), threshold);
}

// The instruction-set clones of the loops above (the attribute does not go on templates).
#define GK_ROWS(T)                                                                                                                           \
  GK_CLONES void act(const T* z, const T* b, T* y, int64_t n, acc_t<T> s) { act_row<T>(z, b, y, n, s); }                                      \
  GK_CLONES void keep(const uint8_t* bits, T* y, int64_t n, acc_t<T> scale) { keep_row<T>(bits, y, n, scale); }                               \
  GK_CLONES void grad(const T* dy, const T* y, T* dz, acc_t<T>* sums, int64_t n, acc_t<T> s) {                                                \
    if (sums != nullptr) grad_row<T>(dy, y, dz, sums, n, s);                                                                                  \
    else grad_row<T>(dy, y, dz, nullptr, n, s);                                                                                               \
  }                                                                                                                                          \
  GK_CLONES void grad_keep(const T* dy, const T* y, const uint8_t* bits, T* dz, acc_t<T>* sums, int64_t n, acc_t<T> s, acc_t<T> scale) {      \
    if (sums != nullptr) grad_keep_row<T>(dy, y, bits, dz, sums, n, s, scale);                                                                \
    else grad_keep_row<T>(dy, y, bits, dz, nullptr, n, s, scale);                                                                             \
  }
GK_ROWS(double)
GK_ROWS(float)
GK_ROWS(BFloat16)
GK_ROWS(Half)

struct Shape {
  int64_t rows = 1, columns = 0, bytes = 0;
};

Shape shape_of(const char* op, const Tensor& t) {
  check(t.dim() >= 1, op, "the first tensor", "have at least one dimension");
  Shape s;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) s.rows *= t.size(d);
  s.columns = t.size(t.dim() - 1);
  s.bytes = (s.columns + 7) / 8;
  return s;
}

std::tuple<Tensor, Tensor> linear_lrelu_act(const Tensor& z, const std::optional<Tensor>& bias, double slope, double p, const std::optional<Tensor>& seed) {
  check_contiguous(kAct, "z", z);
  const auto [rows, columns, bytes] = shape_of(kAct, z);
  if (bias.has_value()) {
    check_like(kAct, "bias", *bias, z);
    check(bias->numel() == columns, kAct, "bias", "have one element for each column of z");
  }
  Tensor y = torch::stable::empty_like(z);
  if (p <= 0.0) {
    dispatch_floating(kAct, z.scalar_type(), [&, rows = rows, columns = columns, bytes = bytes](auto zero) {
      using T = decltype(zero);
      const T *in = data<T>(z), *b = bias.has_value() ? data<T>(*bias) : nullptr;
      T* out = mutable_data<T>(y);
      torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)), [&](int64_t begin, int64_t end) {
        if (b == nullptr) return act(in + begin * columns, nullptr, out + begin * columns, (end - begin) * columns, slope);
        for (int64_t m = begin; m < end; ++m) act(in + m * columns, b, out + m * columns, columns, slope);
      });
    });
    return {y, empty_on_cpu({0}, ScalarType::Byte)};
  }
  check(p <= 1.0, kAct, "p", "be in [0, 1]");
  check(seed.has_value() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, kAct, "seed", "be an int64 tensor of one element when p > 0");
  Tensor bits = empty_on_cpu({rows, bytes}, ScalarType::Byte);
  const uint64_t key = static_cast<uint64_t>(*data<int64_t>(*seed));
  const uint32_t threshold = dropout_threshold(p);
  const double scale = dropout_scale(p);
  uint8_t* mask = mutable_data<uint8_t>(bits);
  dispatch_floating(kAct, z.scalar_type(), [&, rows = rows, columns = columns, bytes = bytes](auto zero) {
    using T = decltype(zero);
    const T *in = data<T>(z), *b = bias.has_value() ? data<T>(*bias) : nullptr;
    T* out = mutable_data<T>(y);
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, columns)), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        keep_bytes(key, static_cast<uint64_t>(m * bytes), threshold, mask + m * bytes, bytes);
        act(in + m * columns, b, out + m * columns, columns, slope);
        keep(mask + m * bytes, out + m * columns, columns, scale);
      }
    });
  });
  return {y, bits};
}

std::tuple<Tensor, Tensor> linear_lrelu_act_grad(const Tensor& dy, const Tensor& y, const Tensor& bits, double slope, double p, bool with_bias) {
  check_contiguous(kGrad, "dy", dy);
  check_like(kGrad, "y", y, dy);
  check(y.numel() == dy.numel(), kGrad, "y", "have the shape of dy");
  const auto [rows, columns, bytes] = shape_of(kGrad, dy);
  if (p > 0.0) {
    check(bits.scalar_type() == ScalarType::Byte && bits.numel() == rows * bytes, kGrad, "bits", "be uint8 [rows, ceil(columns / 8)]");
    check_contiguous(kGrad, "bits", bits);
  }
  Tensor dz = torch::stable::empty_like(dy), dbias = empty_on_cpu({with_bias ? columns : 0}, dy.scalar_type());
  const uint8_t* mask = p > 0.0 ? data<uint8_t>(bits) : nullptr;
  const double scale = dropout_scale(p);
  dispatch_floating(kGrad, dy.scalar_type(), [&, rows = rows, columns = columns, bytes = bytes](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T *in = data<T>(dy), *out = data<T>(y);
    T *result = mutable_data<T>(dz), *column_sums = with_bias ? mutable_data<T>(dbias) : nullptr;
    if (!with_bias) {
      torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)), [&](int64_t begin, int64_t end) {
        if (mask == nullptr) return grad(in + begin * columns, out + begin * columns, result + begin * columns, nullptr, (end - begin) * columns, slope);
        for (int64_t m = begin; m < end; ++m) {
          grad_keep(in + m * columns, out + m * columns, mask + m * bytes, result + m * columns, nullptr, columns, slope, scale);
        }
      });
      return;
    }
    // A strip of columns, all rows: no two threads share a sum, so the result does not depend on how many there are.
    // Runs of 128 rows are summed by themselves first, which keeps the rounding error small.
    constexpr int64_t kStrip = 128, kRun = 128;
    const int64_t strips = (columns + kStrip - 1) / kStrip;
    torch::stable::parallel_for(0, strips, std::max<int64_t>(1, kGrain / (kStrip * std::max<int64_t>(1, rows))), [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t first = strip * kStrip, n = std::min(kStrip, columns - first);
        A total[kStrip] = {}, run[kStrip];
        for (int64_t top = 0; top < rows; top += kRun) {
          std::fill(run, run + n, A(0));
          for (int64_t m = top; m < std::min(rows, top + kRun); ++m) {
            const int64_t at = m * columns + first;
            if (mask == nullptr) grad(in + at, out + at, result + at, run, n, slope);
            else grad_keep(in + at, out + at, mask + m * bytes + first / 8, result + at, run, n, slope, scale);
          }
          for (int64_t i = 0; i < n; ++i) total[i] += run[i];
        }
        for (int64_t i = 0; i < n; ++i) column_sums[first + i] = static_cast<T>(total[i]);
      }
    });
  });
  return {dz, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankern, m) {
  m.def("linear_lrelu_act(Tensor z, Tensor? bias, float slope, float p, Tensor? seed) -> (Tensor, Tensor)");
  m.def("linear_lrelu_act_grad(Tensor dy, Tensor y, Tensor bits, float slope, float p, bool with_bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("linear_lrelu_act", TORCH_BOX(&linear_lrelu_act));
  m.impl("linear_lrelu_act_grad", TORCH_BOX(&linear_lrelu_act_grad));
}

}  // namespace gankern
