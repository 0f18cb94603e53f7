// bn_lrelu on the CPU: statistics, normalisation with LeakyReLU, first and second backward pass. The contracts stand in
// gankern/ops/bn_lrelu.py. x is [B, C, S]: with large S each channel is B runs of S elements and is worked on by one thread while it lies in
// the cache. With S == 1 (no space, or channels last) and with small S, whose runs would be jumped to one by one, it is a matrix, cut into
// chunks of rows; several rows of few channels count as one wide row. Sums run over a fixed partition.
#include "bn_lrelu.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu.h"

namespace gankern {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr const char* kForward = "bn_lrelu";
constexpr const char* kEval = "bn_lrelu_eval";
constexpr const char* kGrad = "bn_lrelu_grad";
constexpr const char* kGrad2 = "bn_lrelu_grad2";
constexpr int64_t kGrain = 32768;  // elements a thread takes at least
constexpr int64_t kFlush = 2048;   // elements summed in the accumulation type before they go to a double
constexpr int kLanes = 16;
constexpr int64_t kStrip = 128;    // columns of a matrix whose sums are held at a time
constexpr int kMaxSums = 5;
constexpr int64_t kLongRun = 32;   // S from which on a channel is worked on by itself

// --- what is done to an element; a coefficient is one number (a channel) or one a column (a row of a matrix) ---------------------------
template <typename A>
struct One {
  A v;
  GK_HD A operator[](int64_t) const { return v; }
};

// z = (x - mean) * scale + bias
template <typename C>
struct Norm {
  C mean, scale, bias;
};
template <typename C>
struct Along {
  C g, c, one;
};
template <typename C>
struct Along2 {
  C dy_p, dy_c, dy_one, x_p, x_g, x_c, x_one;
};

template <typename T>
struct Inputs {
  const T *x, *dy, *p;
};

// The terms of the sums: x; (x - mean)^2; g, g c; p, p c, g, g c, p g.
enum Terms { kValues, kSquares, kFirst, kSecond };
constexpr int count_of(Terms terms) { return terms == kFirst ? 2 : terms == kSecond ? 5 : 1; }

template <Terms terms, typename T, typename C, typename A = acc_t<T>>
GK_HD void terms_at(const Inputs<T>& in, int64_t i, const Norm<C>& f, int64_t column, A slope, A (&t)[count_of(terms)]) {
  const A x = static_cast<A>(in.x[i]);
  if constexpr (terms == kValues) {
    t[0] = x;
  } else {
    const A c = x - f.mean[column];
    if constexpr (terms == kSquares) {
      t[0] = c * c;
    } else {
      const A g = static_cast<A>(in.dy[i]) * lrelu_slope(c * f.scale[column] + f.bias[column], slope);
      if constexpr (terms == kFirst) {
        t[0] = g;
        t[1] = g * c;
      } else {
        const A p = static_cast<A>(in.p[i]);
        t[0] = p;
        t[1] = p * c;
        t[2] = g;
        t[3] = g * c;
        t[4] = p * g;
      }
    }
  }
}

template <typename T, typename C, typename A = acc_t<T>>
GK_HD void normalise(const T* __restrict__ x, T* __restrict__ y, int64_t n, const Norm<C>& f, A slope) {
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(lrelu((static_cast<A>(x[i]) - f.mean[i]) * f.scale[i] + f.bias[i], slope));
}

template <typename T, typename C, typename A = acc_t<T>>
GK_HD void differentiate(const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx, int64_t n, const Norm<C>& f, const Along<C>& k, A slope) {
  for (int64_t i = 0; i < n; ++i) {
    const A c = static_cast<A>(x[i]) - f.mean[i], g = static_cast<A>(dy[i]) * lrelu_slope(c * f.scale[i] + f.bias[i], slope);
    dx[i] = static_cast<T>(g * k.g[i] + bn_times(c, k.c[i]) + k.one[i]);
  }
}

template <typename T, typename C, typename A = acc_t<T>>
GK_HD void differentiate2(const T* __restrict__ p, const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ ddy, T* __restrict__ dx, int64_t n,
                          const Norm<C>& f, const Along2<C>& k, A slope) {
  for (int64_t i = 0; i < n; ++i) {
    const A c = static_cast<A>(x[i]) - f.mean[i], along = static_cast<A>(p[i]), m = lrelu_slope(c * f.scale[i] + f.bias[i], slope);
    ddy[i] = static_cast<T>(m * (along * k.dy_p[i] + bn_times(c, k.dy_c[i]) + k.dy_one[i]));
    dx[i] = static_cast<T>(bn_times(along, k.x_p[i]) + bn_times(static_cast<A>(dy[i]) * m, k.x_g[i]) + bn_times(c, k.x_c[i]) + k.x_one[i]);
  }
}

// --- sums -----------------------------------------------------------------------------------------------------------------------------
// Over `runs` runs of `length` elements that begin `stride` apart: one channel.
template <Terms terms, typename T, typename A = acc_t<T>>
GK_HD void sum_channel(Inputs<T> in, int64_t runs, int64_t stride, int64_t length, const Norm<One<A>>& f, A slope, double* total) {
  constexpr int K = count_of(terms);
  A lanes[K][kLanes] = {};
  int64_t held = 0;
  for (int k = 0; k < K; ++k) total[k] = 0;
  const auto flush = [&]() __attribute__((always_inline)) {
    for (int k = 0; k < K; ++k)
      for (int l = 0; l < kLanes; ++l) {
        total[k] += static_cast<double>(lanes[k][l]);
        lanes[k][l] = A(0);
      }
    held = 0;
  };
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t first = 0; first < length; first += kFlush) {
      const int64_t end = run * stride + std::min(length, first + kFlush);
      int64_t i = run * stride + first;
      held += end - i;
      for (; i + kLanes <= end; i += kLanes)
        for (int l = 0; l < kLanes; ++l) {
          A t[K];
          terms_at<terms>(in, i + l, f, 0, slope, t);
          for (int k = 0; k < K; ++k) lanes[k][l] += t[k];
        }
      for (int l = 0; i + l < end; ++l) {
        A t[K];
        terms_at<terms>(in, i + l, f, 0, slope, t);
        for (int k = 0; k < K; ++k) lanes[k][l] += t[k];
      }
      if (held >= kFlush) flush();
    }
  }
  flush();
}

// Adds the column sums of `rows` rows of a matrix, `n` <= kStrip columns that begin `stride` apart, to total [K][kStrip].
template <Terms terms, typename T, typename A = acc_t<T>>
GK_HD void sum_rows(Inputs<T> in, int64_t rows, int64_t stride, int64_t n, const Norm<const A*>& f, A slope, A* __restrict__ total) {
  constexpr int K = count_of(terms);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < n; ++i) {
      A t[K];
      terms_at<terms>(in, row * stride + i, f, i, slope, t);
      for (int k = 0; k < K; ++k) total[k * kStrip + i] += t[k];
    }
}

// The instruction-set clones of the loops above (the attribute does not go on templates).
#define GK_BN_SUMS(T, terms, suffix)                                                                                                           \
  GK_CLONES void channel_##suffix(const Inputs<T>& in, int64_t runs, int64_t stride, int64_t length, const Norm<One<acc_t<T>>>& f, acc_t<T> s, \
                                  double* total) {                                                                                            \
    sum_channel<terms, T>(in, runs, stride, length, f, s, total);                                                                             \
  }                                                                                                                                           \
  GK_CLONES void rows_##suffix(const Inputs<T>& in, int64_t rows, int64_t stride, int64_t n, const Norm<const acc_t<T>*>& f, acc_t<T> s,       \
                               acc_t<T>* total) {                                                                                             \
    sum_rows<terms, T>(in, rows, stride, n, f, s, total);                                                                                     \
  }
#define GK_BN_ROWS(T)                                                                                                                         \
  GK_BN_SUMS(T, kValues, values)                                                                                                              \
  GK_BN_SUMS(T, kSquares, squares)                                                                                                            \
  GK_BN_SUMS(T, kFirst, first)                                                                                                                \
  GK_BN_SUMS(T, kSecond, second)                                                                                                              \
  GK_CLONES void normalise_runs(const T* x, T* y, int64_t runs, int64_t n, const Norm<const acc_t<T>*>& f, acc_t<T> s) {                       \
    for (int64_t i = 0; i < runs; ++i) normalise(x + i * n, y + i * n, n, Norm<One<acc_t<T>>>{{f.mean[i]}, {f.scale[i]}, {f.bias[i]}}, s);      \
  }                                                                                                                                           \
  GK_CLONES void normalise_channel(const T* x, T* y, int64_t runs, int64_t stride, int64_t n, const Norm<One<acc_t<T>>>& f, acc_t<T> s) {      \
    for (int64_t i = 0; i < runs; ++i) normalise(x + i * stride, y + i * stride, n, f, s);                                                     \
  }                                                                                                                                           \
  GK_CLONES void normalise_row(const T* x, T* y, int64_t n, const Norm<const acc_t<T>*>& f, acc_t<T> s) { normalise(x, y, n, f, s); }          \
  GK_CLONES void grad_channel(const T* dy, const T* x, T* dx, int64_t runs, int64_t stride, int64_t n, const Norm<One<acc_t<T>>>& f,           \
                              const Along<One<acc_t<T>>>& k, acc_t<T> s) {                                                                    \
    for (int64_t i = 0; i < runs; ++i) differentiate(dy + i * stride, x + i * stride, dx + i * stride, n, f, k, s);                            \
  }                                                                                                                                           \
  GK_CLONES void grad_row(const T* dy, const T* x, T* dx, int64_t n, const Norm<const acc_t<T>*>& f, const Along<const acc_t<T>*>& k,          \
                          acc_t<T> s) {                                                                                                       \
    differentiate(dy, x, dx, n, f, k, s);                                                                                                     \
  }                                                                                                                                           \
  GK_CLONES void grad2_channel(const T* p, const T* dy, const T* x, T* ddy, T* dx, int64_t runs, int64_t stride, int64_t n,                    \
                               const Norm<One<acc_t<T>>>& f, const Along2<One<acc_t<T>>>& k, acc_t<T> s) {                                    \
    for (int64_t i = 0; i < runs; ++i) {                                                                                                      \
      const int64_t at = i * stride;                                                                                                          \
      differentiate2(p + at, dy + at, x + at, ddy + at, dx + at, n, f, k, s);                                                                  \
    }                                                                                                                                         \
  }                                                                                                                                           \
  GK_CLONES void grad2_row(const T* p, const T* dy, const T* x, T* ddy, T* dx, int64_t n, const Norm<const acc_t<T>*>& f,                      \
                           const Along2<const acc_t<T>*>& k, acc_t<T> s) {                                                                    \
    differentiate2(p, dy, x, ddy, dx, n, f, k, s);                                                                                            \
  }
GK_BN_ROWS(double)
GK_BN_ROWS(float)
GK_BN_ROWS(BFloat16)
GK_BN_ROWS(Half)

template <Terms terms, typename T, typename A = acc_t<T>>
void channel_sums(const Inputs<T>& in, int64_t runs, int64_t stride, int64_t length, const Norm<One<A>>& f, A slope, double* total) {
  if constexpr (terms == kValues) channel_values(in, runs, stride, length, f, slope, total);
  else if constexpr (terms == kSquares) channel_squares(in, runs, stride, length, f, slope, total);
  else if constexpr (terms == kFirst) channel_first(in, runs, stride, length, f, slope, total);
  else channel_second(in, runs, stride, length, f, slope, total);
}

template <Terms terms, typename T, typename A = acc_t<T>>
void row_sums(const Inputs<T>& in, int64_t rows, int64_t stride, int64_t n, const Norm<const A*>& f, A slope, A* total) {
  if constexpr (terms == kValues) rows_values(in, rows, stride, n, f, slope, total);
  else if constexpr (terms == kSquares) rows_squares(in, rows, stride, n, f, slope, total);
  else if constexpr (terms == kFirst) rows_first(in, rows, stride, n, f, slope, total);
  else rows_second(in, rows, stride, n, f, slope, total);
}

// --- shapes and parameters ------------------------------------------------------------------------------------------------------------
struct Shape {
  int64_t batch, channels, space, count;  // count: elements of a channel
  int64_t fold, width, rows;              // of a matrix: `fold` samples are one wide row of `width` columns; the last of the `rows` may be shorter
  int64_t chunk, chunks;                  // wide rows that are summed together, and how many such chunks there are

  Shape(const char* op, const Tensor& x) {
    check_contiguous(op, "x", x);
    check(x.dim() >= 2, op, "x", "have at least two dimensions");
    batch = x.size(0);
    channels = x.size(1);
    space = 1;
    for (int64_t d = 2; d < x.dim(); ++d) space *= x.size(d);
    count = batch * space;
    const int64_t sample = channels * space;
    fold = sample > 0 && sample < kStrip / 2 ? kStrip / sample : 1;
    width = fold * sample;
    rows = (batch + fold - 1) / fold;
    chunk = std::clamp<int64_t>(16384 / std::max<int64_t>(1, width), 16, 256);
    chunks = (rows + chunk - 1) / chunk;
  }
  bool matrix() const { return 0 < space && space < kLongRun; }
  bool empty() const { return count * channels == 0; }
  int64_t stride() const { return channels * space; }
  int64_t channel_grain() const { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, count)); }

  // Calls f(first wide row, how many whole ones, columns of the short one after them or 0) for each chunk.
  template <typename F>
  void for_chunks(F&& f) const {
    const int64_t whole = batch / fold, rest = batch % fold * channels * space;
    torch::stable::parallel_for(0, chunks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, chunk * width)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * chunk, last = std::min(rows, first + chunk);
        f(first, std::min(whole, last) - first, last > whole ? rest : 0);
      }
    });
  }
  // Calls f(element at which a wide row begins, its columns) for each of them.
  template <typename F>
  void for_rows(F&& f) const {
    for_chunks([&](int64_t first, int64_t whole, int64_t rest) {
      for (int64_t row = first; row < first + whole; ++row) f(row * width, width);
      if (rest > 0) f((first + whole) * width, rest);
    });
  }
};

void check_channels(const char* op, const char* argument, const std::optional<Tensor>& t, const Tensor& x, int64_t channels) {
  if (!t.has_value()) return;
  check(t->scalar_type() == accumulate_dtype(x.scalar_type()) && t->is_cpu(), op, argument, "be in the accumulation dtype on the device of x");
  check(t->numel() == channels, op, argument, "have one element a channel");
  check_contiguous(op, argument, *t);
}

void check_same(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  check_like(op, argument, t, x);
  check(t.numel() == x.numel(), op, argument, "have the shape of x");
}

template <typename A>
const A* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? data<A>(*t) : nullptr;
}

template <typename A>
A value_at(const A* values, int64_t c, A otherwise) {
  return values != nullptr ? values[c] : otherwise;
}

// Several numbers a channel, as arrays [N][channels], or, for a matrix, spread to [N][width]: one a column.
template <typename A, int N>
class Columns {
 public:
  explicit Columns(const Shape& s)
      : channels_(s.channels), space_(s.matrix() ? s.space : 1), width_(s.matrix() ? s.width : s.channels), v_(static_cast<size_t>(N * width_)) {}
  void set(int64_t c, const A (&each)[N]) {
    for (int k = 0; k < N; ++k) v_[k * width_ + c] = each[k];
  }
  void spread() {
    const int64_t sample = channels_ * space_;
    for (int k = 0; k < N; ++k) {
      A* v = v_.data() + k * width_;
      for (int64_t c = channels_; space_ > 1 && c-- > 0;) std::fill_n(v + c * space_, space_, A(v[c]));
      for (int64_t i = sample; i < width_; ++i) v[i] = v[i - sample];
    }
  }
  const A* operator[](int k) const { return v_.data() + k * width_; }

 private:
  int64_t channels_, space_, width_;
  std::vector<A> v_;
};

// r, mean, scale = weight r and bias of each channel
template <typename A>
struct Normalisation {
  const A *weight, *bias;
  A eps;
  std::vector<A> r;
  Columns<A, 3> columns;

  Normalisation(const Shape& s, const std::optional<Tensor>& w, const std::optional<Tensor>& b, double e)
      : weight(data_or_null<A>(w)), bias(data_or_null<A>(b)), eps(static_cast<A>(e)), r(static_cast<size_t>(s.channels)), columns(s) {}
  void set(int64_t c, A mean, A var) {
    r[c] = bn_rstd(var, eps);
    columns.set(c, {mean, value_at(weight, c, A(1)) * r[c], value_at(bias, c, A(0))});
  }
  void set_all(const A* mean, const A* var, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) set(c, mean[c], var[c]);
    columns.spread();
  }
  Norm<One<A>> channel(int64_t c) const { return {{columns[0][c]}, {columns[1][c]}, {columns[2][c]}}; }
  Norm<const A*> from(int64_t c) const { return {columns[0] + c, columns[1] + c, columns[2] + c}; }
};

// The sums over each channel of a matrix: [K][channels].
template <Terms terms, typename T, typename A = acc_t<T>>
std::vector<double> matrix_sums(const Inputs<T>& in, const Shape& s, const Normalisation<A>& f, A slope) {
  constexpr int K = count_of(terms);
  const int64_t w = s.width;
  std::vector<A> partial(static_cast<size_t>(s.chunks * K * w));
  s.for_chunks([&](int64_t row, int64_t whole, int64_t rest) {
    A strip[K * kStrip], *out = partial.data() + row / s.chunk * K * w;
    const auto from = [&](int64_t at) { return Inputs<T>{in.x + at, in.dy == nullptr ? nullptr : in.dy + at, in.p == nullptr ? nullptr : in.p + at}; };
    for (int64_t first = 0; first < w; first += kStrip) {
      const int64_t n = std::min(kStrip, w - first);
      std::fill_n(strip, K * kStrip, A(0));
      row_sums<terms, T>(from(row * w + first), whole, w, n, f.from(first), slope, strip);
      if (rest > first) row_sums<terms, T>(from((row + whole) * w + first), 1, w, std::min(n, rest - first), f.from(first), slope, strip);
      for (int k = 0; k < K; ++k) std::copy_n(strip + k * kStrip, n, out + k * w + first);
    }
  });
  std::vector<double> total(static_cast<size_t>(K * s.channels));
  for (int64_t i = 0; i < s.chunks; ++i)
    for (int k = 0; k < K; ++k)
      for (int64_t j = 0, at = (i * K + k) * w; j < w; j += s.channels * s.space)
        for (int64_t c = 0; c < s.channels; ++c)
          for (int64_t e = 0; e < s.space; ++e, ++at) total[k * s.channels + c] += static_cast<double>(partial[at]);
  return total;
}

// --- forward --------------------------------------------------------------------------------------------------------------------------
template <typename A>
void move_towards(std::optional<Tensor>& running, const A* value, double scale, double momentum, int64_t channels) {
  if (!running.has_value()) return;
  A* r = mutable_data<A>(*running);
  for (int64_t c = 0; c < channels; ++c) r[c] = static_cast<A>(momentum * (scale * value[c]) + (1.0 - momentum) * r[c]);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                           std::optional<Tensor> running_mean, std::optional<Tensor> running_var, double momentum, double eps,
                                           double slope) {
  const Shape s(kForward, x);
  check_channels(kForward, "weight", weight, x, s.channels);
  check_channels(kForward, "bias", bias, x, s.channels);
  check_channels(kForward, "running_mean", running_mean, x, s.channels);
  check_channels(kForward, "running_var", running_var, x, s.channels);
  const ScalarType dtype = accumulate_dtype(x.scalar_type());
  Tensor y = torch::stable::empty_like(x), mean = empty_on_cpu({s.channels}, dtype), var = empty_on_cpu({s.channels}, dtype);
  dispatch_floating(kForward, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* in = data<T>(x);
    T* out = mutable_data<T>(y);
    A *m = mutable_data<A>(mean), *v = mutable_data<A>(var);
    const A a = static_cast<A>(slope);
    const double n = static_cast<double>(s.count);
    if (s.empty()) {
      std::fill_n(m, s.channels, A(0));
      std::fill_n(v, s.channels, A(1));
      return;
    }
    Normalisation<A> f(s, weight, bias, eps);
    if (s.matrix()) {
      const Inputs<T> all{in, nullptr, nullptr};
      std::vector<double> total = matrix_sums<kValues>(all, s, f, a);
      for (int64_t c = 0; c < s.channels; ++c) f.columns.set(c, {m[c] = static_cast<A>(total[c] / n), A(0), A(0)});
      f.columns.spread();
      total = matrix_sums<kSquares>(all, s, f, a);
      for (int64_t c = 0; c < s.channels; ++c) v[c] = static_cast<A>(total[c] / n);
      f.set_all(m, v, s.channels);
      s.for_rows([&](int64_t at, int64_t columns) { normalise_row(in + at, out + at, columns, f.from(0), a); });
    } else {
      torch::stable::parallel_for(0, s.channels, s.channel_grain(), [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          const Inputs<T> channel{in + c * s.space, nullptr, nullptr};
          double total;
          channel_sums<kValues, T>(channel, s.batch, s.stride(), s.space, {}, A(0), &total);
          m[c] = static_cast<A>(total / n);
          channel_sums<kSquares, T>(channel, s.batch, s.stride(), s.space, {{m[c]}, {}, {}}, A(0), &total);
          v[c] = static_cast<A>(total / n);
          f.set(c, m[c], v[c]);
          normalise_channel(in + c * s.space, out + c * s.space, s.batch, s.stride(), s.space, f.channel(c), a);
        }
      });
    }
    move_towards<A>(running_mean, m, 1.0, momentum, s.channels);
    move_towards<A>(running_var, v, n / (n - 1.0), momentum, s.channels);
  });
  return {y, mean, var};
}

Tensor evaluate(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                double slope) {
  const Shape s(kEval, x);
  check_channels(kEval, "mean", mean, x, s.channels);
  check_channels(kEval, "var", var, x, s.channels);
  check_channels(kEval, "weight", weight, x, s.channels);
  check_channels(kEval, "bias", bias, x, s.channels);
  Tensor y = torch::stable::empty_like(x);
  if (s.empty()) return y;
  dispatch_floating(kEval, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* in = data<T>(x);
    T* out = mutable_data<T>(y);
    const A a = static_cast<A>(slope);
    Normalisation<A> f(s, weight, bias, eps);
    f.set_all(data<A>(mean), data<A>(var), s.channels);
    if (s.matrix()) return s.for_rows([&](int64_t at, int64_t columns) { normalise_row(in + at, out + at, columns, f.from(0), a); });
    torch::stable::parallel_for(0, s.batch * s.channels, std::max<int64_t>(1, kGrain / s.space), [&](int64_t begin, int64_t end) {
      while (begin < end) {  // the runs of one sample
        const int64_t c = begin % s.channels, runs = std::min(end - begin, s.channels - c);
        normalise_runs(in + begin * s.space, out + begin * s.space, runs, s.space, f.from(c), a);
        begin += runs;
      }
    });
  });
  return y;
}

// --- backward -------------------------------------------------------------------------------------------------------------------------
void check_backward(const char* op, const Shape& s, const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  check_same(op, "dy", dy, x);
  check_channels(op, "mean", mean, x, s.channels);
  check_channels(op, "var", var, x, s.channels);
  check_channels(op, "weight", weight, x, s.channels);
  check_channels(op, "bias", bias, x, s.channels);
}

std::tuple<Tensor, Tensor, Tensor> grad(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& bias, double eps, double slope, bool training) {
  const Shape s(kGrad, x);
  check_backward(kGrad, s, dy, x, mean, var, weight, bias);
  const ScalarType dtype = accumulate_dtype(x.scalar_type());
  Tensor dx = torch::stable::empty_like(x), dweight = empty_on_cpu({s.channels}, dtype), dbias = empty_on_cpu({s.channels}, dtype);
  dispatch_floating(kGrad, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Inputs<T> in{data<T>(x), data<T>(dy), nullptr};
    T* out = mutable_data<T>(dx);
    A *dw = mutable_data<A>(dweight), *db = mutable_data<A>(dbias);
    const A a = static_cast<A>(slope);
    Normalisation<A> f(s, weight, bias, eps);
    f.set_all(data<A>(mean), data<A>(var), s.channels);
    const auto finish = [&](int64_t c, double sum_g, double sum_gc) {
      db[c] = static_cast<A>(sum_g);
      dw[c] = f.r[c] * static_cast<A>(sum_gc);
      return bn_grad(value_at(f.weight, c, A(1)), f.r[c], static_cast<A>(sum_g), static_cast<A>(sum_gc), static_cast<A>(s.count), training);
    };
    if (s.matrix()) {
      const std::vector<double> total = matrix_sums<kFirst>(in, s, f, a);
      Columns<A, 3> k(s);
      for (int64_t c = 0; c < s.channels; ++c) {
        const BnGrad<A> v = finish(c, total[c], total[s.channels + c]);
        k.set(c, {v.g_, v.c_, v.one_});
      }
      k.spread();
      s.for_rows([&](int64_t at, int64_t columns) { grad_row(in.dy + at, in.x + at, out + at, columns, f.from(0), {k[0], k[1], k[2]}, a); });
      return;
    }
    torch::stable::parallel_for(0, s.channels, s.channel_grain(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t at = c * s.space;
        double total[2];
        channel_sums<kFirst, T>({in.x + at, in.dy + at, nullptr}, s.batch, s.stride(), s.space, f.channel(c), a, total);
        const BnGrad<A> v = finish(c, total[0], total[1]);
        grad_channel(in.dy + at, in.x + at, out + at, s.batch, s.stride(), s.space, f.channel(c), {{v.g_}, {v.c_}, {v.one_}}, a);
      }
    });
  });
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> grad2(const Tensor& ddx, const std::optional<Tensor>& ddweight, const std::optional<Tensor>& ddbias, const Tensor& dy,
                                         const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                                         const std::optional<Tensor>& bias, double eps, double slope, bool training) {
  const Shape s(kGrad2, x);
  check_backward(kGrad2, s, dy, x, mean, var, weight, bias);
  check_same(kGrad2, "ddx", ddx, x);
  check_channels(kGrad2, "ddweight", ddweight, x, s.channels);
  check_channels(kGrad2, "ddbias", ddbias, x, s.channels);
  Tensor ddy = torch::stable::empty_like(x), dx = torch::stable::empty_like(x), dweight = empty_on_cpu({s.channels}, accumulate_dtype(x.scalar_type()));
  dispatch_floating(kGrad2, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Inputs<T> in{data<T>(x), data<T>(dy), data<T>(ddx)};
    T *out_dy = mutable_data<T>(ddy), *out_x = mutable_data<T>(dx);
    A* dw = mutable_data<A>(dweight);
    const A a = static_cast<A>(slope), *q = data_or_null<A>(ddweight), *along_bias = data_or_null<A>(ddbias);
    Normalisation<A> f(s, weight, bias, eps);
    f.set_all(data<A>(mean), data<A>(var), s.channels);
    const auto finish = [&](int64_t c, const double* total, int64_t step) {
      const auto at = [&](int k) { return static_cast<A>(total[k * step]); };
      const BnGrad2<A> k = bn_grad2(value_at(f.weight, c, A(1)), f.r[c], value_at(q, c, A(0)), value_at(along_bias, c, A(0)),
                                    BnSums2<A>{at(0), at(1), at(2), at(3), at(4)}, static_cast<A>(s.count), training);
      dw[c] = s.empty() ? A(0) : k.dweight;
      return k;
    };
    if (s.matrix()) {
      const std::vector<double> total = matrix_sums<kSecond>(in, s, f, a);
      Columns<A, 7> k(s);
      for (int64_t c = 0; c < s.channels; ++c) {
        const BnGrad2<A> v = finish(c, &total[c], s.channels);
        k.set(c, {v.dy_p, v.dy_c, v.dy_one, v.x_p, v.x_g, v.x_c, v.x_one});
      }
      k.spread();
      s.for_rows([&](int64_t at, int64_t columns) {
        grad2_row(in.p + at, in.dy + at, in.x + at, out_dy + at, out_x + at, columns, f.from(0), {k[0], k[1], k[2], k[3], k[4], k[5], k[6]}, a);
      });
      return;
    }
    torch::stable::parallel_for(0, s.channels, s.channel_grain(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t at = c * s.space;
        double total[kMaxSums];
        channel_sums<kSecond, T>({in.x + at, in.dy + at, in.p + at}, s.batch, s.stride(), s.space, f.channel(c), a, total);
        const BnGrad2<A> v = finish(c, total, 1);
        grad2_channel(in.p + at, in.dy + at, in.x + at, out_dy + at, out_x + at, s.batch, s.stride(), s.space, f.channel(c),
                      {{v.dy_p}, {v.dy_c}, {v.dy_one}, {v.x_p}, {v.x_g}, {v.x_c}, {v.x_one}}, a);
      }
    });
  });
  return {ddy, dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankern, m) {
  m.def(
      "bn_lrelu(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, float slope) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("bn_lrelu_eval(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, float slope) -> Tensor");
  m.def(
      "bn_lrelu_grad(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, float slope, bool training) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "bn_lrelu_grad2(Tensor ddx, Tensor? ddweight, Tensor? ddbias, Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
      "float eps, float slope, bool training) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("bn_lrelu", TORCH_BOX(&forward));
  m.impl("bn_lrelu_eval", TORCH_BOX(&evaluate));
  m.impl("bn_lrelu_grad", TORCH_BOX(&grad));
  m.impl("bn_lrelu_grad2", TORCH_BOX(&grad2));
}

}  // namespace gankern
