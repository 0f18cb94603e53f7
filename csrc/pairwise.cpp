// pairwise on the CPU: minibatch features with their gradients, and what surrounds a block of a Gram matrix. The contracts stand in
// gankern/ops/pairwise.py.
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

constexpr const char* kFeatures = "pairwise_features";
constexpr const char* kGrad = "pairwise_features_grad";
constexpr const char* kGrad2 = "pairwise_features_grad2";
constexpr const char* kGram = "pairwise_gram_";
constexpr int64_t kGrain = 32768;  // pairs times dimensions a thread takes at least
constexpr int64_t kTile = 512;     // columns of a Gram row that are worked on at a time

// Sum of n values in a fixed order that the compiler can vectorise.
template <typename A>
GK_HD A row_sum(const A* v, int64_t n) {
  A lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int k = 0; k < 16; ++k) lanes[k] += v[i + k];
  for (int k = 0; i + k < n; ++k) lanes[k] += v[i + k];
  for (int width = 8; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0];
}

// One space b, transposed: t [C, N]. Each pair i < j is visited once, and counts for both. d, e [N] are scratch; o [N] starts as 0.
template <typename A>
GK_HD void features_space(const A* __restrict__ t, int64_t n, int64_t c, A* __restrict__ d, A* __restrict__ o) {
  for (int64_t i = 0; i + 1 < n; ++i) {
    std::fill(d + i + 1, d + n, A(0));
    for (int64_t k = 0; k < c; ++k) {
      const A* row = t + k * n;
      const A mine = row[i];
      for (int64_t j = i + 1; j < n; ++j) d[j] += abs_value(mine - row[j]);
    }
    for (int64_t j = i + 1; j < n; ++j) {
      d[j] = exp_nonpositive(-d[j]);
      o[j] += d[j];
    }
    o[i] += row_sum(d + i + 1, n - i - 1);
  }
}

// The first derivative under the cotangent g [N] into dm [C, N]; with h [C, N], the gradient of <h, dm> into dm and dg [N]. dm and dg start as 0.
template <typename A, bool kSecond>
GK_HD void grad_space(const A* __restrict__ t, const A* __restrict__ g, const A* __restrict__ h, int64_t n, int64_t c, A* __restrict__ d, A* __restrict__ q,
                      A* __restrict__ dm, A* __restrict__ dg) {
  for (int64_t i = 0; i + 1 < n; ++i) {
    const int64_t first = i + 1, count = n - first;
    std::fill(d + first, d + n, A(0));
    std::fill(q + first, q + n, A(0));
    for (int64_t k = 0; k < c; ++k) {
      const A *row = t + k * n, *along = kSecond ? h + k * n : nullptr;
      const A mine = row[i], my_along = kSecond ? along[i] : A(0);
      for (int64_t j = first; j < n; ++j) {
        const A difference = mine - row[j];
        d[j] += abs_value(difference);
        if (kSecond) q[j] += (my_along - along[j]) * sign_of(difference);
      }
    }
    for (int64_t j = first; j < n; ++j) {
      const A e = exp_nonpositive(-d[j]), weight = (g[i] + g[j]) * e;
      if (kSecond) {
        d[j] = -weight * q[j];
        q[j] *= e;
        dg[j] -= q[j];
      } else {
        d[j] = weight;
      }
    }
    if (kSecond) dg[i] -= row_sum(q + first, count);
    for (int64_t k = 0; k < c; ++k) {
      const A* row = t + k * n;
      A* out = dm + k * n;
      const A mine = row[i];
      for (int64_t j = first; j < n; ++j) {
        q[j] = d[j] * sign_of(mine - row[j]);
        out[j] += q[j];
      }
      out[i] -= row_sum(q + first, count);
    }
  }
}

// One row of a Gram block, `n` columns: gram becomes W, and the sums of k and W are returned in two numbers.
template <typename A>
GK_HD void gram_row(A* __restrict__ gram, A sq_a, const A* __restrict__ sq_b, const A* __restrict__ gammas, int64_t count, int64_t n, A* sums) {
  A total = 0, weights = 0;
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t width = std::min(kTile, n - first);
    A *g = gram + first, d[kTile], k[kTile];
    for (int64_t j = 0; j < width; ++j) {
      const A squared = sq_a + sq_b[first + j] - A(2) * g[j];
      d[j] = squared < A(0) ? A(0) : squared;
      k[j] = g[j] = A(0);
    }
    for (int64_t s = 0; s < count; ++s) {
      const A gamma = gammas[s];
      for (int64_t j = 0; j < width; ++j) {
        const A e = exp_nonpositive(-gamma * d[j]);
        k[j] += e;
        g[j] += A(2) * gamma * e;
      }
    }
    total += row_sum(k, width);
    weights += row_sum(g, width);
  }
  sums[0] = total;
  sums[1] = weights;
}

// The instruction-set clones of the loops above (the attribute does not go on templates).
#define GK_SPACES(A)                                                                                                                       \
  GK_CLONES void features_of(const A* t, int64_t n, int64_t c, A* d, A* o) { features_space<A>(t, n, c, d, o); }                           \
  GK_CLONES void grad_of(const A* t, const A* g, int64_t n, int64_t c, A* d, A* q, A* dm) {                                                \
    grad_space<A, false>(t, g, nullptr, n, c, d, q, dm, nullptr);                                                                          \
  }                                                                                                                                        \
  GK_CLONES void grad2_of(const A* t, const A* g, const A* h, int64_t n, int64_t c, A* d, A* q, A* dm, A* dg) {                            \
    grad_space<A, true>(t, g, h, n, c, d, q, dm, dg);                                                                                      \
  }                                                                                                                                        \
  GK_CLONES void gram_of(A* gram, A sq_a, const A* sq_b, const A* gammas, int64_t count, int64_t n, A* sums) {                             \
    gram_row<A>(gram, sq_a, sq_b, gammas, count, n, sums);                                                                                 \
  }
GK_SPACES(double)
GK_SPACES(float)

struct Shape {
  int64_t n, b, c;

  Shape(const char* op, const Tensor& m) {
    check(m.dim() == 3, op, "m", "have 3 dimensions");
    check_contiguous(op, "m", m);
    n = m.size(0);
    b = m.size(1);
    c = m.size(2);
  }
  void check_cotangent(const char* op, const Tensor& g, const Tensor& m) const {
    check_like(op, "g", g, m);
    check(g.dim() == 2 && g.size(0) == n && g.size(1) == b, op, "g", "have the first two dimensions of m");
  }
  int64_t grain() const { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n * n * (c + 4) / 2)); }
};

// Space b of x [N, B, C] as [C, N], and back.
template <typename T, typename A>
void take(const T* x, const Shape& s, int64_t b, int64_t c, A* out) {
  for (int64_t i = 0; i < s.n; ++i)
    for (int64_t k = 0; k < c; ++k) out[k * s.n + i] = static_cast<A>(x[(i * s.b + b) * c + k]);
}

template <typename T, typename A>
void put(const A* in, const Shape& s, int64_t b, int64_t c, T* x) {
  for (int64_t i = 0; i < s.n; ++i)
    for (int64_t k = 0; k < c; ++k) x[(i * s.b + b) * c + k] = static_cast<T>(in[k * s.n + i]);
}

Tensor pairwise_features(const Tensor& m) {
  const Shape s(kFeatures, m);
  Tensor o = empty_on_cpu({s.n, s.b}, m.scalar_type());
  dispatch_floating(kFeatures, m.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* in = data<T>(m);
    T* out = mutable_data<T>(o);
    torch::stable::parallel_for(0, s.b, s.grain(), [&](int64_t begin, int64_t end) {
      std::vector<A> t(s.c * s.n), d(s.n), sums(s.n);
      for (int64_t b = begin; b < end; ++b) {
        take(in, s, b, s.c, t.data());
        std::fill(sums.begin(), sums.end(), A(0));
        features_of(t.data(), s.n, s.c, d.data(), sums.data());
        put(sums.data(), s, b, 1, out);
      }
    });
  });
  return o;
}

// h null: the first derivative alone.
void features_gradients(const char* op, const Tensor* h, const Tensor& g, const Tensor& m, Tensor* dg, Tensor& dm) {
  const Shape s(op, m);
  dispatch_floating(op, m.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T *in = data<T>(m), *cotangent = data<T>(g), *along = h != nullptr ? data<T>(*h) : nullptr;
    T *out = mutable_data<T>(dm), *out_g = dg != nullptr ? mutable_data<T>(*dg) : nullptr;
    torch::stable::parallel_for(0, s.b, s.grain(), [&](int64_t begin, int64_t end) {
      std::vector<A> t(s.c * s.n), t_h(h != nullptr ? s.c * s.n : 0), t_g(s.n), d(s.n), q(s.n), sums(s.c * s.n), sums_g(s.n);
      for (int64_t b = begin; b < end; ++b) {
        take(in, s, b, s.c, t.data());
        take(cotangent, s, b, 1, t_g.data());
        std::fill(sums.begin(), sums.end(), A(0));
        if (h == nullptr) {
          grad_of(t.data(), t_g.data(), s.n, s.c, d.data(), q.data(), sums.data());
        } else {
          take(along, s, b, s.c, t_h.data());
          std::fill(sums_g.begin(), sums_g.end(), A(0));
          grad2_of(t.data(), t_g.data(), t_h.data(), s.n, s.c, d.data(), q.data(), sums.data(), sums_g.data());
          put(sums_g.data(), s, b, 1, out_g);
        }
        put(sums.data(), s, b, s.c, out);
      }
    });
  });
}

Tensor pairwise_features_grad(const Tensor& g, const Tensor& m) {
  Shape(kGrad, m).check_cotangent(kGrad, g, m);
  Tensor dm = torch::stable::empty_like(m);
  features_gradients(kGrad, nullptr, g, m, nullptr, dm);
  return dm;
}

std::tuple<Tensor, Tensor> pairwise_features_grad2(const Tensor& h, const Tensor& g, const Tensor& m) {
  const Shape s(kGrad2, m);
  s.check_cotangent(kGrad2, g, m);
  check_like(kGrad2, "h", h, m);
  check(h.numel() == m.numel(), kGrad2, "h", "have the shape of m");
  Tensor dg = torch::stable::empty_like(g), dm = torch::stable::empty_like(m);
  features_gradients(kGrad2, &h, g, m, &dg, dm);
  return {dg, dm};
}

std::tuple<Tensor, Tensor> pairwise_gram(Tensor gram, const Tensor& sq_a, const Tensor& sq_b, std::vector<double> gammas, bool upper) {
  check(gram.dim() == 2, kGram, "gram", "have 2 dimensions");
  check_contiguous(kGram, "gram", gram);
  const int64_t rows = gram.size(0), columns = gram.size(1);
  check_like(kGram, "sq_a", sq_a, gram);
  check_like(kGram, "sq_b", sq_b, gram);
  check(sq_a.numel() == rows && sq_b.numel() == columns, kGram, "sq_a and sq_b", "have one element for each row and column of gram");
  check(gram.scalar_type() == ScalarType::Float || gram.scalar_type() == ScalarType::Double, kGram, "gram", "be float64 or float32");
  Tensor sums = torch::stable::empty_like(sq_a), weights = torch::stable::empty_like(sq_a);
  const auto work = [&](auto zero) {
    using A = decltype(zero);
    const std::vector<A> scales(gammas.begin(), gammas.end());
    const A *a = data<A>(sq_a), *b = data<A>(sq_b);
    A *g = mutable_data<A>(gram), *out = mutable_data<A>(sums), *out_w = mutable_data<A>(weights);
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / 8 / std::max<int64_t>(1, columns)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = upper ? std::min(i + 1, columns) : 0;
        A two[2];
        std::fill(g + i * columns, g + i * columns + first, A(0));
        gram_of(g + i * columns + first, a[i], b + first, scales.data(), static_cast<int64_t>(scales.size()), columns - first, two);
        out[i] = two[0];
        out_w[i] = two[1];
      }
    });
  };
  if (gram.scalar_type() == ScalarType::Double) work(double{});
  else work(float{});
  return {sums, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankern, m) {
  m.def("pairwise_features(Tensor m) -> Tensor");
  m.def("pairwise_features_grad(Tensor g, Tensor m) -> Tensor");
  m.def("pairwise_features_grad2(Tensor h, Tensor g, Tensor m) -> (Tensor, Tensor)");
  m.def("pairwise_gram_(Tensor(a!) gram, Tensor sq_a, Tensor sq_b, float[] gammas, bool upper) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("pairwise_features", TORCH_BOX(&pairwise_features));
  m.impl("pairwise_features_grad", TORCH_BOX(&pairwise_features_grad));
  m.impl("pairwise_features_grad2", TORCH_BOX(&pairwise_features_grad2));
  m.impl("pairwise_gram_", TORCH_BOX(&pairwise_gram));
}

}  // namespace gankern
