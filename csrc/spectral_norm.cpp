// spectral_norm of many weights on the CPU: power iteration, sigma = u . W v and W / sigma, and their gradient.
// The contracts stand in gankern/ops/spectral_norm.py. A weight is [outer, rows, inner] in memory; its matrix is [rows, outer * inner].
// One sweep over the matrix serves a whole iteration: with s = W v, a row gives s_h and is added to t = sum of s_h W_h = W^T W v while it is in
// the cache; u = s / |s|, v = t / |t|. A thread takes blocks of about equal size, fixed by the shapes, and each has sums of its own.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "math.h"

namespace gankern {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr const char* kForward = "spectral_norm";
constexpr const char* kGrad = "spectral_norm_grad";
constexpr int64_t kBlock = 32768;  // elements of a block, about
constexpr int64_t kBlockRows = 16;  // rows of a block at least: its sums are as long as a row
constexpr int64_t kCache = 1 << 20;  // bytes of a matrix that one thread's cache holds: it does all work on it, the second pass from the cache
constexpr int64_t kGather = 16;     // rows that are gathered at a time where they do not lie in memory one after another

// --- vectors of 64 bytes -------------------------------------------------------------------------------------------------------
template <typename A>
struct Vector {
  typedef A type __attribute__((vector_size(64)));
  static constexpr int64_t lanes = 64 / sizeof(A);
};

template <typename A>
GK_HD void load(typename Vector<A>::type& x, const A* p) {
  std::memcpy(&x, p, sizeof(x));
}

template <typename A>
GK_HD A sum_lanes(const typename Vector<A>::type& x) {
  A v[Vector<A>::lanes];
  std::memcpy(v, &x, sizeof(x));
  for (int64_t half = Vector<A>::lanes / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) v[k] += v[k + half];
  return v[0];
}

// out[r] = row r of w . v, for R rows `stride` apart
template <int R, typename A>
GK_HD void dot_rows(const A* w, int64_t stride, const A* v, int64_t n, A* out) {
  using V = typename Vector<A>::type;
  constexpr int64_t L = Vector<A>::lanes;
  V sum[R] = {};
  int64_t j = 0;
  for (; j + L <= n; j += L) {
    V x, y;
    load<A>(x, v + j);
    for (int r = 0; r < R; ++r) {
      load<A>(y, w + r * stride + j);
      sum[r] += x * y;
    }
  }
  for (int r = 0; r < R; ++r) {
    A rest = 0;
    for (int64_t k = j; k < n; ++k) rest += w[r * stride + k] * v[k];
    out[r] = sum_lanes<A>(sum[r]) + rest;
  }
}

// t += sum over r of c[r] * row r of w
template <int R, typename A>
GK_HD void add_rows(const A* w, int64_t stride, const A* c, A* t, int64_t n) {
  using V = typename Vector<A>::type;
  constexpr int64_t L = Vector<A>::lanes;
  int64_t j = 0;
  for (; j + L <= n; j += L) {
    V x, y;
    load<A>(x, t + j);
    for (int r = 0; r < R; ++r) {
      load<A>(y, w + r * stride + j);
      x += y * c[r];
    }
    std::memcpy(t + j, &x, sizeof(x));
  }
  for (; j < n; ++j)
    for (int r = 0; r < R; ++r) t[j] += c[r] * w[r * stride + j];
}

// What a sweep over rows does: s = W v; t += W^T c, where c is s itself or given in s.
enum class Sweep { product, both, transposed };

template <int R, typename A>
GK_HD void sweep_rows(const A* w, const A* v, A* s, A* t, int64_t n, Sweep what) {
  if (what != Sweep::transposed) dot_rows<R>(w, n, v, n, s);
  if (what != Sweep::product) add_rows<R>(w, n, s, t, n);
}

template <typename A>
GK_HD void sweep_matrix(const A* w, const A* v, A* s, A* t, int64_t rows, int64_t n, Sweep what) {
  int64_t h = 0;
  for (; h + 4 <= rows; h += 4) sweep_rows<4>(w + h * n, v, s + h, t, n, what);
  for (; h < rows; ++h) sweep_rows<1>(w + h * n, v, s + h, t, n, what);
}

// out [rows, outer * inner] = the rows of w [outer, all_rows, inner] from the first on
template <typename T>
GK_HD void gather_rows(const T* w, acc_t<T>* out, int64_t rows, int64_t outer, int64_t all_rows, int64_t inner) {
  using A = acc_t<T>;
  for (int64_t a = 0; a < outer; ++a)
    for (int64_t h = 0; h < rows; ++h)
      for (int64_t b = 0; b < inner; ++b) out[(h * outer + a) * inner + b] = static_cast<A>(w[(a * all_rows + h) * inner + b]);
}

template <typename T>
GK_HD void scale_all(const T* w, T* y, int64_t n, acc_t<T> factor) {
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(static_cast<acc_t<T>>(w[i]) * factor);
}

template <typename T>
GK_HD acc_t<T> dot_all(const T* g, const T* w, int64_t n) {
  using A = acc_t<T>;
  using V = typename Vector<A>::type;
  constexpr int64_t L = Vector<A>::lanes;
  V sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int64_t r = 0; r < 4; ++r) {
      A a[L], b[L];
      for (int64_t k = 0; k < L; ++k) a[k] = static_cast<A>(g[i + r * L + k]), b[k] = static_cast<A>(w[i + r * L + k]);
      V x, y;
      load<A>(x, a);
      load<A>(y, b);
      sum[r] += x * y;
    }
  A rest = 0;
  for (; i < n; ++i) rest += static_cast<A>(g[i]) * static_cast<A>(w[i]);
  return sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

template <typename T>
GK_HD void grad_run(const T* g, const acc_t<T>* v, T* out, int64_t n, acc_t<T> u, acc_t<T> factor) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>((static_cast<acc_t<T>>(g[i]) - u * v[i]) * factor);
}

// The instruction-set clones of the loops above (the attribute does not go on templates).
#define GK_SWEEP(A) \
  GK_CLONES void sweep(const A* w, const A* v, A* s, A* t, int64_t rows, int64_t n, Sweep what) { sweep_matrix<A>(w, v, s, t, rows, n, what); }
#define GK_LOOPS(T)                                                                                                                              \
  GK_CLONES void gather(const T* w, acc_t<T>* out, int64_t rows, int64_t outer, int64_t all_rows, int64_t inner) {                               \
    gather_rows<T>(w, out, rows, outer, all_rows, inner);                                                                                        \
  }                                                                                                                                              \
  GK_CLONES void scale(const T* w, T* y, int64_t n, acc_t<T> factor) { scale_all<T>(w, y, n, factor); }                                           \
  GK_CLONES acc_t<T> dot(const T* g, const T* w, int64_t n) { return dot_all<T>(g, w, n); }                                                       \
  GK_CLONES void grad(const T* g, const acc_t<T>* v, T* out, int64_t n, acc_t<T> u, acc_t<T> factor) { grad_run<T>(g, v, out, n, u, factor); }
GK_SWEEP(double)
GK_SWEEP(float)
GK_LOOPS(double)
GK_LOOPS(float)
GK_LOOPS(BFloat16)
GK_LOOPS(Half)

// --- shapes and work -----------------------------------------------------------------------------------------------------------
struct Shape {
  int64_t outer = 1, rows = 1, inner = 1;
  int64_t columns() const { return outer * inner; }
  int64_t numel() const { return outer * rows * inner; }
};

Shape shape_of(const char* op, const Tensor& w, const Tensor& first, int64_t dim) {
  check_like(op, "each weight", w, first);
  check(dim >= 0 && dim < w.dim(), op, "dims", "name a dimension of each weight");
  Shape s;
  for (int64_t d = 0; d < w.dim(); ++d) (d < dim ? s.outer : d > dim ? s.inner : s.rows) *= w.size(d);
  return s;
}

// Work on layers, cut into blocks: f(layer, which of its blocks) for each, shared out among the threads by their elements.
class Blocks {
 public:
  void add(int64_t layer, int64_t count, int64_t elements) {
    for (int64_t i = 0; i < count; ++i) {
      blocks_.push_back({layer, i, elements_ + elements * i / count});
    }
    elements_ += elements;
  }
  template <typename F>
  void run(const F& f) const {
    const int64_t threads = elements_ < kBlock ? 1 : torch::stable::get_num_threads();
    if (threads == 1) return run_from(0, elements_ + 1, f);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      run_from(elements_ * begin / threads, end == threads ? elements_ + 1 : elements_ * end / threads, f);
    });
  }

 private:
  struct Block {
    int64_t layer, index, start;
  };
  template <typename F>
  void run_from(int64_t begin, int64_t end, const F& f) const {
    for (const Block& b : blocks_)
      if (b.start >= begin && b.start < end) f(b.layer, b.index);
  }
  std::vector<Block> blocks_;
  int64_t elements_ = 0;
};

template <typename T>
struct Layer : Shape {
  using A = acc_t<T>;
  const T* w = nullptr;
  T* y = nullptr;
  A *u = nullptr, *v = nullptr, *sigma = nullptr;  // the state; u holds s = W v before it is normalised
  A* product = nullptr;                            // W v of an evaluation [rows]
  int64_t span = 1, blocks = 0;                    // rows of a block
  A* partials = nullptr;                           // [blocks, columns]: each block's share of t
  bool again = false;                              // |s| is so large or small that W^T s may overflow or vanish: sweep anew with u

  void run_block(int64_t index, bool evaluate) const {
    const Sweep what = evaluate ? Sweep::product : again ? Sweep::transposed : Sweep::both;
    const int64_t begin = index * span, end = std::min(this->rows, begin + span), n = this->columns();
    A *t = partials + index * n, *s = what == Sweep::product ? product : u;
    if (what != Sweep::product) std::fill(t, t + n, A(0));
    if constexpr (std::is_same_v<T, A>) {
      if (this->outer == 1) return sweep(w + begin * n, v, s + begin, t, end - begin, n, what);
    }
    std::vector<A> gathered(static_cast<size_t>(kGather * n));
    for (int64_t h = begin; h < end; h += kGather) {
      const int64_t count = std::min(kGather, end - h);
      gather(w + h * this->inner, gathered.data(), count, this->outer, this->rows, this->inner);
      sweep(gathered.data(), v, s + h, t, count, n, what);
    }
  }

  static double norm(const A* x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    return std::sqrt(sum);
  }

  // u, v and sigma, from s in u and the partials of t = W^T s; or again = true, and u alone. On the second call the partials are of W^T u.
  void finish(double eps, bool evaluate) {
    if (evaluate) {
      *sigma = dot(u, product, this->rows);
      return;
    }
    constexpr double kRange = std::is_same_v<A, double> ? 1e100 : 1e12;
    const int64_t n = this->columns();
    double length = 1;
    if (!again) {
      const double exact = norm(u, this->rows);
      length = exact < eps ? eps : exact;  // and not std::max: NaN stays NaN
      for (int64_t h = 0; h < this->rows; ++h) u[h] = static_cast<A>(u[h] / length);
      again = !(exact > 1 / kRange && exact < kRange && exact >= eps);
      if (again) return;
    }
    std::fill(v, v + n, A(0));
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t j = 0; j < n; ++j) v[j] += partials[b * n + j];
    const double raw = norm(v, n) / length, size = raw < eps ? eps : raw;
    again = length != 1 && !(raw < kRange);
    if (again) return;
    for (int64_t j = 0; j < n; ++j) v[j] = static_cast<A>(v[j] / length / size);
    *sigma = static_cast<A>(raw * (raw / size));  // u . W v = t . v
  }
};

template <typename A, typename T>
void widen(const T* from, A* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
}

std::tuple<std::vector<Tensor>, Tensor> spectral_norm(std::vector<Tensor> weights, std::vector<Tensor> us, std::vector<Tensor> vs, std::vector<int64_t> dims,
                                                      int64_t iterations, double eps) {
  const size_t n = weights.size();
  check(n > 0 && us.size() == n && vs.size() == n && dims.size() == n, kForward, "weights, u, v and dims", "be lists of one length, not empty");
  check(iterations >= 0, kForward, "iterations", "be >= 0");
  std::vector<Shape> shapes;
  int64_t states = 0, sums = 0;
  for (size_t i = 0; i < n; ++i) {
    const Shape s = shape_of(kForward, weights[i], weights[0], dims[i]);
    check_like(kForward, "each u", us[i], weights[0]);
    check_like(kForward, "each v", vs[i], weights[0]);
    check(us[i].numel() == s.rows && vs[i].numel() == s.columns(), kForward, "each u and v", "have one element a row and a column of its matrix");
    shapes.push_back(s);
    states += s.rows + s.columns() + 1;
  }
  const ScalarType accumulate = accumulate_dtype(weights[0].scalar_type());
  Tensor state = empty_on_cpu({states}, accumulate);
  std::vector<Tensor> ys;
  for (const Tensor& w : weights) ys.push_back(torch::stable::empty_like(w));
  dispatch_floating(kForward, weights[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    std::vector<Layer<T>> layers(n);
    Blocks small, blocks, large, chunks;
    bool large_layers = false;
    for (size_t i = 0; i < n; ++i) {
      Layer<T>& l = layers[i];
      static_cast<Shape&>(l) = shapes[i];
      l.span = std::max(kBlockRows, kBlock / std::max<int64_t>(1, l.columns()));
      l.blocks = (l.rows + l.span - 1) / l.span;
      sums += iterations > 0 ? l.blocks * l.columns() : l.rows;
    }
    Tensor scratch = empty_on_cpu({sums}, accumulate);
    A *at = mutable_data<A>(state), *sum = mutable_data<A>(scratch);
    for (size_t i = 0; i < n; ++i) {
      Layer<T>& l = layers[i];
      const int64_t index = static_cast<int64_t>(i);
      l.w = data<T>(weights[i]);
      l.y = mutable_data<T>(ys[i]);
      l.u = at, l.v = at + l.rows, l.sigma = l.v + l.columns();
      at = l.sigma + 1;
      widen(data<T>(us[i]), l.u, l.rows);
      widen(data<T>(vs[i]), l.v, l.columns());
      (iterations > 0 ? l.partials : l.product) = sum;
      sum += iterations > 0 ? l.blocks * l.columns() : l.rows;
      if (l.numel() * static_cast<int64_t>(sizeof(T)) <= kCache) {
        small.add(index, 1, l.numel());
        continue;
      }
      large_layers = true;
      blocks.add(index, l.blocks, l.numel());
      large.add(index, 1, l.numel());
      chunks.add(index, (l.numel() + kBlock - 1) / kBlock, l.numel());
    }
    small.run([&](int64_t i, int64_t) {
      Layer<T>& l = layers[static_cast<size_t>(i)];
      for (int64_t k = 0; k < std::max<int64_t>(1, iterations); ++k) {
        do {
          for (int64_t block = 0; block < l.blocks; ++block) l.run_block(block, iterations == 0);
          l.finish(eps, iterations == 0);
        } while (l.again);
      }
      scale(l.w, l.y, l.numel(), A(1) / *l.sigma);
    });
    for (int64_t k = 0; large_layers && k < std::max<int64_t>(1, iterations); ++k) {
      const auto finish = [&](int64_t i, int64_t) { layers[static_cast<size_t>(i)].finish(eps, iterations == 0); };
      blocks.run([&](int64_t i, int64_t block) { layers[static_cast<size_t>(i)].run_block(block, iterations == 0); });
      large.run(finish);
      blocks.run([&](int64_t i, int64_t block) {
        if (layers[static_cast<size_t>(i)].again) layers[static_cast<size_t>(i)].run_block(block, false);
      });
      large.run([&](int64_t i, int64_t) {
        if (layers[static_cast<size_t>(i)].again) finish(i, 0);
      });
    }
    chunks.run([&](int64_t i, int64_t chunk) {
      const Layer<T>& l = layers[static_cast<size_t>(i)];
      const int64_t begin = chunk * kBlock;
      scale(l.w + begin, l.y + begin, std::min(kBlock, l.numel() - begin), A(1) / *l.sigma);
    });
  });
  return {std::move(ys), state};
}

std::vector<Tensor> spectral_norm_grad(std::vector<Tensor> grads, std::vector<Tensor> weights, Tensor state, std::vector<int64_t> offsets,
                                       std::vector<int64_t> dims) {
  const size_t n = weights.size();
  check(n > 0 && grads.size() == n && offsets.size() == n && dims.size() == n, kGrad, "grads, weights, offsets and dims", "be lists of one length, not empty");
  check(state.scalar_type() == accumulate_dtype(weights[0].scalar_type()), kGrad, "state", "have the accumulation dtype of the weights");
  check_contiguous(kGrad, "state", state);
  std::vector<Shape> shapes;
  std::vector<int64_t> first;  // of each layer's chunks
  std::vector<Tensor> out;
  Blocks chunks;
  int64_t count = 0;
  for (size_t i = 0; i < n; ++i) {
    const Shape s = shape_of(kGrad, weights[i], weights[0], dims[i]);
    check_like(kGrad, "each gradient", grads[i], weights[0]);
    check(grads[i].numel() == s.numel(), kGrad, "each gradient", "have the shape of its weight");
    check(offsets[i] >= 0 && offsets[i] < state.numel() - s.rows - s.columns(), kGrad, "offsets", "lie within state");
    shapes.push_back(s);
    first.push_back(count);
    const int64_t blocks = (s.numel() + kBlock - 1) / kBlock;
    chunks.add(static_cast<int64_t>(i), blocks, s.numel());
    count += blocks;
    out.push_back(torch::stable::empty_like(weights[i]));
  }
  first.push_back(count);
  dispatch_floating(kGrad, weights[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const A* states = data<A>(state);
    std::vector<A> partials(static_cast<size_t>(count));
    chunks.run([&](int64_t layer, int64_t chunk) {
      const size_t i = static_cast<size_t>(layer);
      const int64_t begin = chunk * kBlock, size = std::min(kBlock, shapes[i].numel() - begin);
      partials[static_cast<size_t>(first[i] + chunk)] = dot(data<T>(grads[i]) + begin, data<T>(weights[i]) + begin, size);
    });
    chunks.run([&](int64_t layer, int64_t chunk) {
      const size_t i = static_cast<size_t>(layer);
      Shape s = shapes[i];
      const A *u = states + offsets[i], *v = u + s.rows, sigma = v[s.columns()];
      double total = 0;
      for (int64_t k = first[i]; k < first[i + 1]; ++k) total += static_cast<double>(partials[static_cast<size_t>(k)]);
      const A factor = A(1) / sigma, inner_product = static_cast<A>(total) * factor;
      if (s.inner == 1) {  // the transposed matrix [outer, rows] has runs longer than one element
        std::swap(u, v);
        s = {1, s.outer, s.rows};
      }
      const T* g = data<T>(grads[i]);
      T* result = mutable_data<T>(out[i]);
      const int64_t end = std::min(s.numel(), (chunk + 1) * kBlock);
      for (int64_t at = chunk * kBlock; at < end;) {
        const int64_t run = at / s.inner, b = at - run * s.inner, size = std::min(s.inner - b, end - at);
        grad(g + at, v + run / s.rows * s.inner + b, result + at, size, inner_product * u[run % s.rows], factor);
        at += size;
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankern, m) {
  m.def("spectral_norm(Tensor[] weights, Tensor[] u, Tensor[] v, int[] dims, int iterations, float eps) -> (Tensor[], Tensor)");
  m.def("spectral_norm_grad(Tensor[] grads, Tensor[] weights, Tensor state, int[] offsets, int[] dims) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("spectral_norm", TORCH_BOX(&spectral_norm));
  m.impl("spectral_norm_grad", TORCH_BOX(&spectral_norm_grad));
}

}  // namespace gankern
