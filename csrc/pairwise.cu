// pairwise on CUDA: minibatch features with their gradients, and what surrounds a block of a Gram matrix. The contracts stand in
// gankern/ops/pairwise.py. Sums have a fixed order: over the tiles of j in one thread, then over the threads.
#include <tuple>
#include <vector>

#include "launch.h"

#ifdef GK_SIM
#define GK_UNROLL(times)
#else
#define GK_PRAGMA(words) _Pragma(#words)
#define GK_UNROLL(times) GK_PRAGMA(unroll times)
#endif

namespace gankern {
namespace {

constexpr int kTile = 16, kThreads = kTile * kTile;
constexpr int kGammas = 16;
constexpr int kGramThreads = 256;

// m [N, B, C], and which part of it a block works on: rows from `top` on, in space b; dimensions from `own` on are its own to write.
struct Place {
  std::int64_t n, b_all, c, top, b, own;

  __device__ __forceinline__ Place(std::int64_t n_, std::int64_t b_, std::int64_t c_) : n(n_), b_all(b_), c(c_) {
    const unsigned tiles = static_cast<unsigned>((n + kTile - 1) / kTile), spaces = static_cast<unsigned>(b_all), rest = blockIdx.x / tiles;
    top = static_cast<std::int64_t>(blockIdx.x % tiles) * kTile;
    b = rest % spaces;
    own = static_cast<std::int64_t>(rest / spaces) * kTile;
  }
  __device__ __forceinline__ std::int64_t pair(std::int64_t i) const { return i * b_all + b; }  // where (i, b) lies in [N, B]
};

template <typename A>
using tile_t = A[kTile][kTile + 1];

// tile[r][k] = x[first + r, b, c0 + k], 0 outside
template <typename T>
__device__ __forceinline__ void load_tile(const T* __restrict__ x, const Place& at, std::int64_t first, std::int64_t c0, sum_t<T> (&tile)[kTile][kTile + 1]) {
  const int r = static_cast<int>(threadIdx.x) / kTile, k = static_cast<int>(threadIdx.x) % kTile;
  const bool inside = first + r < at.n && c0 + k < at.c;
  tile[r][k] = inside ? static_cast<sum_t<T>>(x[at.pair(first + r) * at.c + c0 + k]) : sum_t<T>(0);
}

// Sum over the 16 threads of a row of the block; the first of them gets it.
template <typename A>
__device__ __forceinline__ A row_sum(A v) {
  for (int offset = kTile / 2; offset > 0; offset /= 2) v += __shfl_down_sync(kAllLanes, v, offset, kTile);
  return v;
}

// o [N, B]. A block takes 16 rows i in one space; thread (r, s) pairs row i = top + r with each j = s mod 16.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    features_kernel(const T* __restrict__ m, T* __restrict__ o, std::int64_t n, std::int64_t b, std::int64_t c) {
  using A = sum_t<T>;
  GK_SHARED(A, mine, [kTile][kTile + 1]);
  GK_SHARED(A, other, [kTile][kTile + 1]);
  const Place at(n, b, c);
  const int r = static_cast<int>(threadIdx.x) / kTile, s = static_cast<int>(threadIdx.x) % kTile;
  const std::int64_t i = at.top + r;
  A sum = 0;
  for (std::int64_t first = 0; first < n; first += kTile) {
    A distance = 0;
    for (std::int64_t c0 = 0; c0 < c; c0 += kTile) {
      load_tile(m, at, at.top, c0, mine);
      load_tile(m, at, first, c0, other);
      __syncthreads();
      for (int k = 0; k < kTile; ++k) distance += abs_value(mine[r][k] - other[s][k]);
      __syncthreads();
    }
    const std::int64_t j = first + s;
    if (j < n && j != i) sum += exp_nonpositive(-distance);
  }
  sum = row_sum(sum);
  if (s == 0 && i < n) o[at.pair(i)] = static_cast<T>(sum);
}

// dm [N, B, C] = -sum over j of w_ij sign(m_i - m_j), w = (g_i + g_j) e_ij; kSecond: w times -q_ij, q = sum over c of (h_i - h_j) sign(m_i - m_j),
// and dg [N, B] = -sum over j of e q. A block writes 16 rows and 16 dimensions of one space; more dimensions are more blocks, which find e anew.
template <typename T, bool kSecond>
__global__ void __launch_bounds__(kThreads)
    features_grad_kernel(const T* __restrict__ h, const T* __restrict__ g, const T* __restrict__ m, T* __restrict__ dg, T* __restrict__ dm, std::int64_t n,
                         std::int64_t b, std::int64_t c) {
  using A = sum_t<T>;
  [[maybe_unused]] constexpr int kUnroll = kSecond ? 4 : kTile;  // what keeps ptxas from spilling
  GK_SHARED(A, mine, [kTile][kTile + 1]);
  GK_SHARED(A, other, [kTile][kTile + 1]);
  GK_SHARED(A, weights, [kTile][kTile + 1]);
  GK_SHARED(A, my_along, [kSecond ? kTile : 1][kTile + 1]);
  GK_SHARED(A, along, [kSecond ? kTile : 1][kTile + 1]);
  const Place at(n, b, c);
  const int r = static_cast<int>(threadIdx.x) / kTile, s = static_cast<int>(threadIdx.x) % kTile;
  const std::int64_t i = at.top + r, k_own = at.own + s;
  const A g_i = i < n ? static_cast<A>(g[at.pair(i)]) : A(0);
  A sum = 0, sum_g = 0;
  for (std::int64_t first = 0; first < n; first += kTile) {
    A distance = 0, q = 0;
    for (std::int64_t c0 = 0; c0 < c; c0 += kTile) {
      load_tile(m, at, at.top, c0, mine);
      load_tile(m, at, first, c0, other);
      if constexpr (kSecond) {
        load_tile(h, at, at.top, c0, my_along);
        load_tile(h, at, first, c0, along);
      }
      __syncthreads();
      GK_UNROLL(kUnroll)
      for (int k = 0; k < kTile; ++k) {
        const A difference = mine[r][k] - other[s][k];
        distance += abs_value(difference);
        if constexpr (kSecond) q += (my_along[r][k] - along[s][k]) * sign_of(difference);
      }
      __syncthreads();
    }
    const std::int64_t j = first + s;
    A weight = 0;
    if (i < n && j < n && j != i) {
      const A e = exp_nonpositive(-distance);
      weight = (g_i + static_cast<A>(g[at.pair(j)])) * e;
      if constexpr (kSecond) {
        weight *= -q;
        sum_g -= e * q;
      }
    }
    weights[r][s] = weight;
    load_tile(m, at, at.top, at.own, mine);
    load_tile(m, at, first, at.own, other);
    __syncthreads();
    for (int k = 0; k < kTile; ++k) sum -= weights[r][k] * sign_of(mine[r][s] - other[k][s]);
    __syncthreads();
  }
  if (i < n && k_own < c) dm[at.pair(i) * c + k_own] = static_cast<T>(sum);
  if constexpr (kSecond) {
    sum_g = row_sum(sum_g);
    if (s == 0 && i < n && at.own == 0) dg[at.pair(i)] = static_cast<T>(sum_g);
  }
}

template <typename A>
struct Gammas {
  int count;
  A value[kGammas];
};

// One block a row of gram [R, M], which becomes W; sums and weights [R].
template <typename A>
__global__ void __launch_bounds__(kGramThreads)
    gram_kernel(A* __restrict__ gram, const A* __restrict__ sq_a, const A* __restrict__ sq_b, Gammas<A> gammas, bool upper, A* __restrict__ sums,
                A* __restrict__ weights, std::int64_t columns) {
  const std::int64_t i = blockIdx.x;
  const A mine = sq_a[i];
  A totals[2] = {};
  for (std::int64_t j = threadIdx.x; j < columns; j += kGramThreads) {
    A& g = gram[i * columns + j];
    A k = 0, w = 0;
    if (!upper || j > i) {
      const A squared = mine + sq_b[j] - 2 * g, d = squared < A(0) ? A(0) : squared;
      GK_UNROLL(kGammas)  // so that no gamma is indexed at run time
      for (int s = 0; s < kGammas; ++s) {
        if (s < gammas.count) {
          const A e = exp_nonpositive(-gammas.value[s] * d);
          k += e;
          w += 2 * gammas.value[s] * e;
        }
      }
    }
    g = w;
    totals[0] += k;
    totals[1] += w;
  }
  block_sum<2>(totals);
  if (threadIdx.x == 0) {
    sums[i] = totals[0];
    weights[i] = totals[1];
  }
}

// --- launchers over raw pointers -----------------------------------------------------------------------------------------------
template <typename T>
void launch_features(const T* m, T* o, std::int64_t n, std::int64_t b, std::int64_t c, cudaStream_t stream) {
  if (n * b > 0) GK_LAUNCH(features_kernel<T>, static_cast<unsigned>(ceil_div(n, kTile) * b), kThreads, stream, m, o, n, b, c);
}

// h null: the first derivative alone
template <typename T>
void launch_features_grad(const T* h, const T* g, const T* m, T* dg, T* dm, std::int64_t n, std::int64_t b, std::int64_t c, cudaStream_t stream) {
  const std::int64_t chunks = c > kTile ? ceil_div(c, kTile) : 1;
  const unsigned blocks = static_cast<unsigned>(ceil_div(n, kTile) * b * chunks);
  if (blocks == 0) return;
  if (h == nullptr) GK_LAUNCH((features_grad_kernel<T, false>), blocks, kThreads, stream, h, g, m, dg, dm, n, b, c);
  else GK_LAUNCH((features_grad_kernel<T, true>), blocks, kThreads, stream, h, g, m, dg, dm, n, b, c);
}

template <typename A>
void launch_gram(A* gram, const A* sq_a, const A* sq_b, const std::vector<double>& gammas, bool upper, A* sums, A* weights, std::int64_t rows,
                 std::int64_t columns, cudaStream_t stream) {
  Gammas<A> packed{static_cast<int>(gammas.size()), {}};
  for (std::size_t s = 0; s < gammas.size(); ++s) packed.value[s] = static_cast<A>(gammas[s]);
  if (rows > 0) GK_LAUNCH(gram_kernel<A>, static_cast<unsigned>(rows), kGramThreads, stream, gram, sq_a, sq_b, packed, upper, sums, weights, columns);
}

#ifndef GK_SIM
struct Shape {
  std::int64_t n, b, c;

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
};

Tensor pairwise_features(const Tensor& m) {
  constexpr const char* op = "pairwise_features";
  const Shape s(op, m);
  const torch::stable::accelerator::DeviceGuard guard(m.get_device_index());
  Tensor o = torch::stable::new_empty(m, {s.n, s.b});
  dispatch_floating(op, m.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    launch_features<T>(data<T>(m), mutable_data<T>(o), s.n, s.b, s.c, current_stream(m));
  });
  return o;
}

Tensor pairwise_features_grad(const Tensor& g, const Tensor& m) {
  constexpr const char* op = "pairwise_features_grad";
  const Shape s(op, m);
  s.check_cotangent(op, g, m);
  const torch::stable::accelerator::DeviceGuard guard(m.get_device_index());
  Tensor dm = torch::stable::empty_like(m);
  dispatch_floating(op, m.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    launch_features_grad<T>(nullptr, data<T>(g), data<T>(m), nullptr, mutable_data<T>(dm), s.n, s.b, s.c, current_stream(m));
  });
  return dm;
}

std::tuple<Tensor, Tensor> pairwise_features_grad2(const Tensor& h, const Tensor& g, const Tensor& m) {
  constexpr const char* op = "pairwise_features_grad2";
  const Shape s(op, m);
  s.check_cotangent(op, g, m);
  check_like(op, "h", h, m);
  check(h.numel() == m.numel(), op, "h", "have the shape of m");
  const torch::stable::accelerator::DeviceGuard guard(m.get_device_index());
  Tensor dg = torch::stable::empty_like(g), dm = torch::stable::empty_like(m);
  if (m.numel() == 0) dg = torch::stable::fill_(dg, 0.0);  // without dimensions nothing has a derivative, and h is null
  dispatch_floating(op, m.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    if (m.numel() > 0) {
      launch_features_grad<T>(data<T>(h), data<T>(g), data<T>(m), mutable_data<T>(dg), mutable_data<T>(dm), s.n, s.b, s.c, current_stream(m));
    }
  });
  return {dg, dm};
}

std::tuple<Tensor, Tensor> pairwise_gram(Tensor gram, const Tensor& sq_a, const Tensor& sq_b, std::vector<double> gammas, bool upper) {
  constexpr const char* op = "pairwise_gram_";
  check(gram.dim() == 2, op, "gram", "have 2 dimensions");
  check_contiguous(op, "gram", gram);
  const std::int64_t rows = gram.size(0), columns = gram.size(1);
  check_like(op, "sq_a", sq_a, gram);
  check_like(op, "sq_b", sq_b, gram);
  check(sq_a.numel() == rows && sq_b.numel() == columns, op, "sq_a and sq_b", "have one element for each row and column of gram");
  check(gram.scalar_type() == ScalarType::Float || gram.scalar_type() == ScalarType::Double, op, "gram", "be float64 or float32");
  check(gammas.size() <= kGammas, op, "gammas", "be at most 16 numbers");
  const torch::stable::accelerator::DeviceGuard guard(gram.get_device_index());
  Tensor sums = torch::stable::empty_like(sq_a), weights = torch::stable::empty_like(sq_a);
  const auto work = [&](auto zero) {
    using A = decltype(zero);
    launch_gram<A>(mutable_data<A>(gram), data<A>(sq_a), data<A>(sq_b), gammas, upper, mutable_data<A>(sums), mutable_data<A>(weights), rows, columns,
                   current_stream(gram));
  };
  if (gram.scalar_type() == ScalarType::Double) work(double{});
  else work(float{});
  return {sums, weights};
}
#endif

}  // namespace

#ifndef GK_SIM
STABLE_TORCH_LIBRARY_IMPL(gankern, CUDA, m) {
  m.impl("pairwise_features", TORCH_BOX(&pairwise_features));
  m.impl("pairwise_features_grad", TORCH_BOX(&pairwise_features_grad));
  m.impl("pairwise_features_grad2", TORCH_BOX(&pairwise_features_grad2));
  m.impl("pairwise_gram_", TORCH_BOX(&pairwise_gram));
}
#endif

}  // namespace gankern
