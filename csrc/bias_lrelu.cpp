// LeakyReLU of a channel bias, on the CPU: forward, and its gradient with the bias sum. The contracts stand in gankern/ops/bias_lrelu.py.
// Memory is [outer, channels, inner]. Planes of many elements are walked one by one. Elsewhere (channels-last, matrices, small pictures)
// memory is a matrix whose rows hold a whole number of outer indices, and the bias is written out over one row.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "bias_lrelu.h"
#include "cpu.h"
#include "math.h"

namespace gankern {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr const char* kAct = "bias_lrelu";
constexpr const char* kGrad = "bias_lrelu_grad";
constexpr int64_t kGrain = 32768;  // elements a thread takes at least
constexpr int64_t kUnit = 16384;   // elements of a unit of the bias sum, about
constexpr int64_t kPlane = 32;     // elements a channel that are walked as a plane
constexpr int64_t kRow = 128;      // elements of a row, at least
constexpr int64_t kShare = 64;     // elements a unit adds up in each sum, where there are so many
constexpr int64_t kRun = 512;      // elements added up in the accumulation type before they go to double
constexpr int64_t kStrip = 256;    // columns whose sums are made together
constexpr int kLanes = 16;

// How the memory is walked: rows of `width` elements (the last may be shorter), or planes.
struct Walk {
  bool planes;
  int64_t rows, width, sums;  // sums: how many of them a row, or an outer index of planes, adds to

  explicit Walk(const Memory& m) {
    const int64_t sample = m.channels * m.inner;
    planes = m.inner >= kPlane;
    width = planes ? m.inner : sample * std::max<int64_t>(1, kRow / std::max<int64_t>(1, sample));
    sums = planes ? m.channels : width;
    rows = width == 0 ? 0 : (m.elements() + width - 1) / width;
  }
};

template <typename T>
GK_HD void act_flat(const T* __restrict__ x, T* __restrict__ y, int64_t n, acc_t<T> slope) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(lrelu(static_cast<A>(x[i]), slope));
}

template <typename T>
GK_HD void act_column(const T* __restrict__ x, T b, T* __restrict__ y, int64_t n, acc_t<T> slope) {
  using A = acc_t<T>;
  const A shift = static_cast<A>(b);
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(lrelu(static_cast<A>(x[i]) + shift, slope));
}

template <typename T>
GK_HD void act_row(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, int64_t n, acc_t<T> slope) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(lrelu(static_cast<A>(x[i]) + static_cast<A>(bias[i]), slope));
}

// y = LeakyReLU(x + bias) of the rows or planes from `first` to `end`, of `total` elements in all
template <typename T>
GK_HD void act_range(const T* x, const T* bias, T* y, int64_t first, int64_t end, int64_t total, int64_t channels, const Walk& w, acc_t<T> slope) {
  for (int64_t row = first, c = first % channels; row < end; ++row) {
    const int64_t at = row * w.width;
    if (w.planes) act_column<T>(x + at, bias[c], y + at, w.width, slope);
    else act_row<T>(x + at, bias, y + at, std::min(w.width, total - at), slope);
    c = c + 1 == channels ? 0 : c + 1;
  }
}

template <typename T>
GK_HD acc_t<T> grad_one(T dy, T y, T* dx, acc_t<T> slope) {
  using A = acc_t<T>;
  const A d = static_cast<A>(dy) * lrelu_slope(static_cast<A>(y), slope);
  *dx = static_cast<T>(d);
  return d;
}

// dx = dy * slope of the activation
template <typename T>
GK_HD void grad_flat(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dx, int64_t n, acc_t<T> slope) {
  for (int64_t i = 0; i < n; ++i) grad_one(dy[i], y[i], dx + i, slope);
}

// The same, and the sum of dx before rounding
template <typename T>
GK_HD double grad_plane(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dx, int64_t n, acc_t<T> slope) {
  using A = acc_t<T>;
  double total = 0.0;
  int64_t i = 0;
  while (i + kLanes <= n) {
    A lanes[kLanes] = {};
    for (const int64_t end = std::min(n - kLanes, i + (kRun - 1) * kLanes); i <= end; i += kLanes)
      for (int k = 0; k < kLanes; ++k) lanes[k] += grad_one(dy[i + k], y[i + k], dx + i + k, slope);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
    total += static_cast<double>(lanes[0]);
  }
  A rest = 0;
  for (; i < n; ++i) rest += grad_one(dy[i], y[i], dx + i, slope);
  return total + static_cast<double>(rest);
}

// The same of `rows` rows of n elements that lie `stride` apart; sums [n] += their column sums
template <typename T>
GK_HD void grad_rows(const T* dy, const T* y, T* dx, double* sums, int64_t rows, int64_t n, int64_t stride, acc_t<T> slope) {
  using A = acc_t<T>;
  for (int64_t first = 0; first < n; first += kStrip) {
    const int64_t width = std::min(kStrip, n - first);
    for (int64_t top = 0; top < rows; top += kRun) {
      A run[kStrip] = {};
      for (int64_t row = top; row < std::min(rows, top + kRun); ++row) {
        const int64_t at = row * stride + first;
        const T *__restrict__ a = dy + at, *__restrict__ b = y + at;
        T* __restrict__ d = dx + at;
        for (int64_t i = 0; i < width; ++i) run[i] += grad_one(a[i], b[i], d + i, slope);
      }
      for (int64_t i = 0; i < width; ++i) sums[first + i] += static_cast<double>(run[i]);
    }
  }
}

// The same of `n` planes of each of `outer` samples of `channels` planes
template <typename T>
GK_HD void grad_planes(const T* dy, const T* y, T* dx, double* sums, int64_t outer, int64_t n, int64_t channels, int64_t inner, acc_t<T> slope) {
  for (int64_t a = 0; a < outer; ++a)
    for (int64_t c = 0; c < n; ++c) {
      const int64_t at = (a * channels + c) * inner;
      sums[c] += grad_plane<T>(dy + at, y + at, dx + at, inner, slope);
    }
}

// The instruction-set clones of the loops above (the attribute does not go on templates).
#define GK_RANGES(T)                                                                                                                         \
  GK_CLONES void act(const T* x, const T* b, T* y, int64_t first, int64_t end, int64_t total, int64_t channels, const Walk& w, acc_t<T> s) { \
    act_range<T>(x, b, y, first, end, total, channels, w, s);                                                                                \
  }                                                                                                                                          \
  GK_CLONES void act_alone(const T* x, T* y, int64_t n, acc_t<T> s) { act_flat<T>(x, y, n, s); }                                             \
  GK_CLONES void grad(const T* dy, const T* y, T* dx, int64_t n, acc_t<T> s) { grad_flat<T>(dy, y, dx, n, s); }                              \
  GK_CLONES void row_sums(const T* dy, const T* y, T* dx, double* sums, int64_t rows, int64_t n, int64_t stride, acc_t<T> s) {               \
    grad_rows<T>(dy, y, dx, sums, rows, n, stride, s);                                                                                       \
  }                                                                                                                                          \
  GK_CLONES void plane_sums(const T* dy, const T* y, T* dx, double* sums, int64_t outer, int64_t n, int64_t channels, int64_t inner,         \
                            acc_t<T> s) {                                                                                                    \
    grad_planes<T>(dy, y, dx, sums, outer, n, channels, inner, s);                                                                           \
  }
GK_RANGES(double)
GK_RANGES(float)
GK_RANGES(BFloat16)
GK_RANGES(Half)

Tensor bias_lrelu(const Tensor& x, const std::optional<Tensor>& bias, double slope) {
  const Memory m = memory_of(kAct, x);
  if (bias.has_value()) check_bias(kAct, *bias, x);
  Tensor y = torch::stable::empty_like(x);
  const int64_t total = m.elements();
  dispatch_floating(kAct, x.scalar_type(), [&](auto zero) {
    if (total == 0) return;
    using T = decltype(zero);
    const T* in = data<T>(x);
    T* out = mutable_data<T>(y);
    if (!bias.has_value()) {
      torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) { act_alone(in + begin, out + begin, end - begin, slope); });
      return;
    }
    const Walk w(m);
    const T* b = data<T>(*bias);
    std::vector<T> row;
    if (!w.planes && w.width != m.channels) {
      row.reserve(static_cast<size_t>(w.width));
      for (int64_t c = 0; c < w.width / m.inner; ++c) row.insert(row.end(), static_cast<size_t>(m.inner), b[c % m.channels]);
      b = row.data();
    }
    torch::stable::parallel_for(0, w.rows, std::max<int64_t>(1, kGrain / w.width),
                                [&](int64_t begin, int64_t end) { act(in, b, out, begin, end, total, m.channels, w, slope); });
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_lrelu_grad(const Tensor& dy, const Tensor& y, double slope, bool with_bias) {
  const Memory m = memory_of(kGrad, dy);
  check_same_memory(kGrad, "y", y, dy);
  Tensor dx = torch::stable::empty_like(dy), dbias = empty_on_cpu({with_bias ? m.channels : 0}, dy.scalar_type());
  const int64_t total = m.elements();
  dispatch_floating(kGrad, dy.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *in = data<T>(dy), *out = data<T>(y);
    T *result = mutable_data<T>(dx), *db = mutable_data<T>(dbias);
    if (!with_bias) {
      torch::stable::parallel_for(0, total, kGrain,
                                  [&](int64_t begin, int64_t end) { grad(in + begin, out + begin, result + begin, end - begin, slope); });
      return;
    }
    if (total == 0) return std::fill(db, db + m.channels, T(0.0f));
    // A unit is some lines (rows, or samples of planes) and some sums of each: no two threads share a sum, and the units do not depend on
    // how many threads there are. Each line of `partials` holds the sums of one range of lines.
    const Walk w(m);
    const int64_t each = w.planes ? m.inner : 1, lines = w.planes ? m.outer : w.rows;
    const int64_t high = std::min(lines, std::max(kUnit / (w.sums * each), (kShare + each - 1) / each));
    const int64_t wide = std::min(w.sums, std::max<int64_t>(kLanes, kUnit / (high * each)));
    const int64_t ranges = (lines + high - 1) / high, blocks = (w.sums + wide - 1) / wide;
    Tensor partials = empty_on_cpu({ranges, w.sums}, ScalarType::Double);
    double* sums = mutable_data<double>(partials);
    torch::stable::parallel_for(0, ranges * blocks, std::max<int64_t>(1, kGrain / (high * wide * each)), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t line = unit / blocks * high, first = unit % blocks * wide, n = std::min(wide, w.sums - first);
        const int64_t at = (line * w.sums + first) * each, count = std::min(high, lines - line);
        double* s = sums + unit / blocks * w.sums + first;
        std::fill(s, s + n, 0.0);
        if (w.planes) {
          plane_sums(in + at, out + at, result + at, s, count, n, m.channels, m.inner, slope);
          continue;
        }
        const int64_t last = at + (count - 1) * w.width, rest = std::min(n, total - last);  // the last row of all may be shorter
        row_sums(in + at, out + at, result + at, s, count - (rest < n), n, w.width, slope);
        if (0 < rest && rest < n) row_sums(in + last, out + last, result + last, s, 1, rest, w.width, slope);
      }
    });
    for (int64_t r = 1; r < ranges; ++r)
      for (int64_t i = 0; i < w.sums; ++i) sums[i] += sums[r * w.sums + i];
    const int64_t inner = w.planes ? 1 : m.inner;
    for (int64_t c = 0; c < m.channels; ++c) {
      double d = 0.0;
      for (int64_t first = c * inner; first < w.sums; first += m.channels * inner)
        for (int64_t i = first; i < first + inner; ++i) d += sums[i];
      db[c] = static_cast<T>(static_cast<acc_t<T>>(d));
    }
  });
  return {dx, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankern, m) {
  m.def("bias_lrelu(Tensor x, Tensor? bias, float slope) -> Tensor");
  m.def("bias_lrelu_grad(Tensor dy, Tensor y, float slope, bool with_bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("bias_lrelu", TORCH_BOX(&bias_lrelu));
  m.impl("bias_lrelu_grad", TORCH_BOX(&bias_lrelu_grad));
}

}  // namespace gankern
