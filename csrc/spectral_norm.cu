// spectral_norm of many weights on CUDA: power iteration, sigma = u . W v and W / sigma, and their gradient, each kernel over all weights.
// The contracts stand in gankern/ops/spectral_norm.py. A weight is [outer, rows, inner] in memory; its matrix is [rows, outer * inner].
// Pointers and shapes go with the launch as one table by value, so that a captured graph holds them.
#include "launch.h"

namespace gankern {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMany = 24;                // weights a launch takes: the table must stay below 4 KiB
constexpr std::int64_t kShare = 512;     // rows that a block of the transposed product walks
constexpr std::int64_t kElements = 2048;  // of a block of the elementwise kernels, eight a thread
constexpr std::int64_t kDotElements = 8192;

template <typename T>
struct Weight {
  using A = sum_t<T>;
  const T *w = nullptr, *g = nullptr, *u0 = nullptr, *v0 = nullptr;
  T* out = nullptr;
  A *u = nullptr, *v = nullptr;  // the state; sigma lies behind v; u holds s = W v before it is normalised
  A* partials = nullptr;         // [shares, columns] of W^T u; [rows] of an evaluation's W v; [blocks] of a dot product
  std::int64_t outer = 1, rows = 1, inner = 1;
  std::int64_t first = 0;  // block of the running kernel

  __host__ __device__ std::int64_t columns() const { return outer * inner; }
  __host__ __device__ std::int64_t numel() const { return outer * rows * inner; }
  __host__ __device__ std::int64_t shares() const { return (rows + kShare - 1) / kShare; }
};

template <typename T>
struct Table {
  Weight<T> weights[kMany];
  int n = 0;
};

// Which weight this block works on.
template <typename T>
__device__ __forceinline__ int weight_of_block(const Table<T>& table) {
  int k = 0;
  while (k + 1 < table.n && table.weights[k + 1].first <= static_cast<std::int64_t>(blockIdx.x)) ++k;
  return k;
}

// The sum over the block, for every thread of it. Once a kernel.
template <int K, typename A>
__device__ __forceinline__ void block_sum_for_all(A (&v)[K]) {
  GK_SHARED(A, all, [K]);
  block_sum<K>(v);
  if (threadIdx.x == 0)
    for (int k = 0; k < K; ++k) all[k] = v[k];
  __syncthreads();
  for (int k = 0; k < K; ++k) v[k] = all[k];
}

template <typename A>
__device__ __forceinline__ A at_least(A x, A low) {
  return x < low ? low : x;  // NaN stays NaN
}

// s = W v, a warp a row. v is the given one at first, the state's later; s goes to u, or in an evaluation to partials.
template <typename T>
__global__ void __launch_bounds__(kThreads) rows_kernel(const GK_GRID_CONSTANT Table<T> table, bool first_time, bool evaluate) {
  using A = sum_t<T>;
  const Weight<T>& e = table.weights[weight_of_block(table)];
  const std::int64_t h = (blockIdx.x - e.first) * kWarps + threadIdx.x / 32;
  if (h >= e.rows) return;
  const std::int64_t columns = e.columns(), inner = e.inner;
  A sum[1] = {0};
  for (std::int64_t j = threadIdx.x % 32; j < columns; j += 32) {
    const std::int64_t a = e.outer == 1 ? 0 : j / inner;
    sum[0] += static_cast<A>(e.w[a * e.rows * inner + h * inner + (j - a * inner)]) * (first_time ? static_cast<A>(e.v0[j]) : e.v[j]);
  }
  warp_sum<1>(sum);
  if (threadIdx.x % 32 == 0) (evaluate ? e.partials : e.u)[h] = sum[0];
}

// partials = W^T u, u = s / |s|: 32 columns and a share of the rows a block
template <typename T>
__global__ void __launch_bounds__(kThreads) columns_kernel(const GK_GRID_CONSTANT Table<T> table, sum_t<T> eps) {
  using A = sum_t<T>;
  GK_SHARED(A, sums, [kWarps][32]);
  const Weight<T>& e = table.weights[weight_of_block(table)];
  const std::int64_t columns = e.columns(), strips = (columns + 31) / 32, block = blockIdx.x - e.first, share = block / strips;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  A square[1] = {0};
  for (std::int64_t h = threadIdx.x; h < e.rows; h += kThreads) square[0] += e.u[h] * e.u[h];
  block_sum_for_all<1>(square);
  const A length = at_least(static_cast<A>(sqrt(square[0])), eps);
  const std::int64_t j = (block - share * strips) * 32 + lane, a = e.outer == 1 ? 0 : j / e.inner;
  const std::int64_t end = (share + 1) * kShare < e.rows ? (share + 1) * kShare : e.rows;
  A sum = 0;
  if (j < columns) {
    const T* w = e.w + a * e.rows * e.inner + (j - a * e.inner);
    for (std::int64_t h = share * kShare + warp; h < end; h += kWarps) sum += static_cast<A>(w[h * e.inner]) * (e.u[h] / length);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && j < columns) {
    A total = 0;
    for (int k = 0; k < kWarps; ++k) total += sums[k][lane];
    e.partials[share * columns + j] = total;
  }
}

// u, v and sigma of one weight a block, from s and the shares of W^T u; in an evaluation from u0, v0 and W v
template <typename T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const GK_GRID_CONSTANT Table<T> table, sum_t<T> eps, bool evaluate) {
  using A = sum_t<T>;
  const Weight<T>& e = table.weights[blockIdx.x];
  const std::int64_t columns = e.columns(), shares = e.shares();
  A sum[2] = {0, 0};
  if (evaluate) {
    for (std::int64_t h = threadIdx.x; h < e.rows; h += kThreads) {
      e.u[h] = static_cast<A>(e.u0[h]);
      sum[0] += e.u[h] * e.partials[h];
    }
    for (std::int64_t j = threadIdx.x; j < columns; j += kThreads) e.v[j] = static_cast<A>(e.v0[j]);
    block_sum_for_all<2>(sum);
    if (threadIdx.x == 0) e.v[columns] = sum[0];
    return;
  }
  for (std::int64_t h = threadIdx.x; h < e.rows; h += kThreads) sum[0] += e.u[h] * e.u[h];
  for (std::int64_t j = threadIdx.x; j < columns; j += kThreads) {
    A t = 0;
    for (std::int64_t k = 0; k < shares; ++k) t += e.partials[k * columns + j];
    e.v[j] = t;
    sum[1] += t * t;
  }
  block_sum_for_all<2>(sum);
  const A raw = static_cast<A>(sqrt(sum[1])), length = at_least(static_cast<A>(sqrt(sum[0])), eps), size = at_least(raw, eps);
  for (std::int64_t h = threadIdx.x; h < e.rows; h += kThreads) e.u[h] = e.u[h] / length;
  for (std::int64_t j = threadIdx.x; j < columns; j += kThreads) e.v[j] = e.v[j] / size;
  if (threadIdx.x == 0) e.v[columns] = raw * (raw / size);  // u . W v = t . v
}

// out = w / sigma
template <typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const GK_GRID_CONSTANT Table<T> table) {
  using A = sum_t<T>;
  const Weight<T>& e = table.weights[weight_of_block(table)];
  const std::int64_t at = (blockIdx.x - e.first) * kElements + threadIdx.x * 8, left = e.numel() - at;
  if (left <= 0) return;
  const A sigma = e.v[e.columns()];
  const int count = static_cast<int>(left < 8 ? left : 8);
  const bool vector = count == 8 && aligned16(e.w) && aligned16(e.out);
  A x[8];
  if (vector) load8<true>(e.w + at, 8, x);
  else load8<false>(e.w + at, count, x);
  for (int k = 0; k < 8; ++k) x[k] = x[k] / sigma;
  if (vector) store8<true>(e.out + at, 8, x);
  else store8<false>(e.out + at, count, x);
}

// partials [block of the weight] = <g, w> of the block
template <typename T>
__global__ void __launch_bounds__(kThreads) dot_kernel(const GK_GRID_CONSTANT Table<T> table) {
  using A = sum_t<T>;
  const Weight<T>& e = table.weights[weight_of_block(table)];
  const std::int64_t block = blockIdx.x - e.first, n = e.numel();
  const std::int64_t end = (block + 1) * kDotElements < n ? (block + 1) * kDotElements : n;
  A sum[1] = {0};
  for (std::int64_t i = block * kDotElements + threadIdx.x; i < end; i += kThreads) sum[0] += static_cast<A>(e.g[i]) * static_cast<A>(e.w[i]);
  block_sum<1>(sum);
  if (threadIdx.x == 0) e.partials[block] = sum[0];
}

// out = (g - <g, w / sigma> u v^T) / sigma
template <typename T>
__global__ void __launch_bounds__(kThreads) grad_kernel(const GK_GRID_CONSTANT Table<T> table) {
  using A = sum_t<T>;
  const Weight<T>& e = table.weights[weight_of_block(table)];
  const std::int64_t n = e.numel(), partials = (n + kDotElements - 1) / kDotElements;
  A sum[1] = {0};
  for (std::int64_t i = threadIdx.x; i < partials; i += kThreads) sum[0] += e.partials[i];
  block_sum_for_all<1>(sum);
  const std::int64_t at = (blockIdx.x - e.first) * kElements + threadIdx.x * 8, left = n - at;
  if (left <= 0) return;
  const A sigma = e.v[e.columns()], factor = sum[0] / sigma;
  const int count = static_cast<int>(left < 8 ? left : 8);
  const std::int64_t run = at / e.inner;
  std::int64_t a = run / e.rows, h = run - a * e.rows, b = at - run * e.inner;
  const bool vector = count == 8 && aligned16(e.g) && aligned16(e.out);
  A x[8];
  if (vector) load8<true>(e.g + at, 8, x);
  else load8<false>(e.g + at, count, x);
  for (int k = 0; k < 8; ++k) {
    if (k < count) x[k] = (x[k] - factor * e.u[h] * e.v[a * e.inner + b]) / sigma;
    if (++b == e.inner) {
      b = 0;
      if (++h == e.rows) {
        h = 0;
        ++a;
      }
    }
  }
  if (vector) store8<true>(e.out + at, 8, x);
  else store8<false>(e.out + at, count, x);
}

// --- launchers over raw pointers -----------------------------------------------------------------------------------------------
// Numbers the blocks of a kernel that gives each weight `blocks(weight)` of them.
template <typename T, typename F>
unsigned number_blocks(Table<T>& table, const F& blocks) {
  std::int64_t total = 0;
  for (int k = 0; k < table.n; ++k) {
    table.weights[k].first = total;
    total += blocks(table.weights[k]);
  }
  return static_cast<unsigned>(total);
}

// Elements of partials that a weight needs.
template <typename T>
std::int64_t forward_partials(const Weight<T>& e, std::int64_t iterations) {
  return iterations > 0 ? e.shares() * e.columns() : e.rows;
}
template <typename T>
std::int64_t grad_partials(const Weight<T>& e) {
  return ceil_div(e.numel(), kDotElements);
}

// w, u0, v0, out, u, v and partials are used.
template <typename T>
void launch_spectral_norm(Table<T> table, std::int64_t iterations, double eps, cudaStream_t stream) {
  const bool evaluate = iterations == 0;
  const auto low = static_cast<sum_t<T>>(eps);
  for (std::int64_t i = 0; i < (evaluate ? 1 : iterations); ++i) {
    unsigned blocks = number_blocks(table, [](const Weight<T>& e) { return ceil_div(e.rows, kWarps); });
    if (blocks > 0) GK_LAUNCH(rows_kernel<T>, blocks, kThreads, stream, table, i == 0, evaluate);
    blocks = number_blocks(table, [](const Weight<T>& e) { return ceil_div(e.columns(), 32) * e.shares(); });
    if (!evaluate && blocks > 0) GK_LAUNCH(columns_kernel<T>, blocks, kThreads, stream, table, low);
    GK_LAUNCH(finish_kernel<T>, static_cast<unsigned>(table.n), kThreads, stream, table, low, evaluate);
  }
  const unsigned blocks = number_blocks(table, [](const Weight<T>& e) { return ceil_div(e.numel(), kElements); });
  if (blocks > 0) GK_LAUNCH(scale_kernel<T>, blocks, kThreads, stream, table);
}

// w, g, out, u, v and partials are used.
template <typename T>
void launch_spectral_norm_grad(Table<T> table, cudaStream_t stream) {
  unsigned blocks = number_blocks(table, grad_partials<T>);
  if (blocks == 0) return;
  GK_LAUNCH(dot_kernel<T>, blocks, kThreads, stream, table);
  blocks = number_blocks(table, [](const Weight<T>& e) { return ceil_div(e.numel(), kElements); });
  GK_LAUNCH(grad_kernel<T>, blocks, kThreads, stream, table);
}

#ifndef GK_SIM
constexpr const char* kForward = "spectral_norm";
constexpr const char* kGrad = "spectral_norm_grad";

template <typename T>
Weight<T> describe(const char* op, const Tensor& w, const Tensor& first, std::int64_t dim) {
  check_like(op, "each weight", w, first);
  check(dim >= 0 && dim < w.dim(), op, "dims", "name a dimension of each weight");
  Weight<T> e;
  for (std::int64_t d = 0; d < w.dim(); ++d) (d < dim ? e.outer : d > dim ? e.inner : e.rows) *= w.size(d);
  e.w = data<T>(w);
  return e;
}

std::tuple<std::vector<Tensor>, Tensor> spectral_norm(std::vector<Tensor> weights, std::vector<Tensor> us, std::vector<Tensor> vs,
                                                      std::vector<std::int64_t> dims, std::int64_t iterations, double eps) {
  const std::size_t n = weights.size();
  check(n > 0 && us.size() == n && vs.size() == n && dims.size() == n, kForward, "weights, u, v and dims", "be lists of one length, not empty");
  check(iterations >= 0, kForward, "iterations", "be >= 0");
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  std::vector<Tensor> ys;
  std::optional<Tensor> state;
  dispatch_floating(kForward, weights[0].scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    using A = sum_t<T>;
    std::vector<Weight<T>> all;
    std::int64_t states = 0, sums = 0;
    for (std::size_t i = 0; i < n; ++i) {
      Weight<T> e = describe<T>(kForward, weights[i], weights[0], dims[i]);
      check_like(kForward, "each u", us[i], weights[0]);
      check_like(kForward, "each v", vs[i], weights[0]);
      check(us[i].numel() == e.rows && vs[i].numel() == e.columns(), kForward, "each u and v", "have one element a row and a column of its matrix");
      ys.push_back(torch::stable::empty_like(weights[i]));
      e.u0 = data<T>(us[i]), e.v0 = data<T>(vs[i]), e.out = mutable_data<T>(ys[i]);
      all.push_back(e);
      states += e.rows + e.columns() + 1;
      sums += forward_partials(e, iterations);
    }
    const ScalarType accumulate = accumulate_dtype(weights[0].scalar_type());
    state = torch::stable::new_empty(weights[0], {states}, accumulate);
    Tensor scratch = torch::stable::new_empty(weights[0], {sums}, accumulate);
    A *at = mutable_data<A>(*state), *sum = mutable_data<A>(scratch);
    Table<T> table;
    for (std::size_t i = 0; i < n; ++i) {
      Weight<T>& e = table.weights[table.n++] = all[i];
      e.u = at, e.v = at + e.rows, e.partials = sum;
      at += e.rows + e.columns() + 1;
      sum += forward_partials(e, iterations);
      if (table.n == kMany || i + 1 == n) {
        launch_spectral_norm<T>(table, iterations, eps, current_stream(weights[0]));
        table.n = 0;
      }
    }
  });
  return {std::move(ys), *state};
}

std::vector<Tensor> spectral_norm_grad(std::vector<Tensor> grads, std::vector<Tensor> weights, Tensor state, std::vector<std::int64_t> offsets,
                                       std::vector<std::int64_t> dims) {
  const std::size_t n = weights.size();
  check(n > 0 && grads.size() == n && offsets.size() == n && dims.size() == n, kGrad, "grads, weights, offsets and dims", "be lists of one length, not empty");
  check(state.scalar_type() == accumulate_dtype(weights[0].scalar_type()), kGrad, "state", "have the accumulation dtype of the weights");
  check(state.is_cuda() && state.get_device_index() == weights[0].get_device_index(), kGrad, "state", "be on the device of the weights");
  check_contiguous(kGrad, "state", state);
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  std::vector<Tensor> out;
  dispatch_floating(kGrad, weights[0].scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    using A = sum_t<T>;
    std::vector<Weight<T>> all;
    std::int64_t sums = 0;
    for (std::size_t i = 0; i < n; ++i) {
      Weight<T> e = describe<T>(kGrad, weights[i], weights[0], dims[i]);
      check_like(kGrad, "each gradient", grads[i], weights[0]);
      check(grads[i].numel() == e.numel(), kGrad, "each gradient", "have the shape of its weight");
      check(offsets[i] >= 0 && offsets[i] < state.numel() - e.rows - e.columns(), kGrad, "offsets", "lie within state");
      out.push_back(torch::stable::empty_like(weights[i]));
      e.u = mutable_data<A>(state) + offsets[i], e.v = e.u + e.rows, e.g = data<T>(grads[i]), e.out = mutable_data<T>(out[i]);
      all.push_back(e);
      sums += grad_partials(e);
    }
    Tensor scratch = torch::stable::new_empty(weights[0], {sums}, accumulate_dtype(weights[0].scalar_type()));
    A* sum = mutable_data<A>(scratch);
    Table<T> table;
    for (std::size_t i = 0; i < n; ++i) {
      Weight<T>& e = table.weights[table.n++] = all[i];
      e.partials = sum;
      sum += grad_partials(e);
      if (table.n == kMany || i + 1 == n) {
        launch_spectral_norm_grad<T>(table, current_stream(weights[0]));
        table.n = 0;
      }
    }
  });
  return out;
}
#endif

}  // namespace

#ifndef GK_SIM
STABLE_TORCH_LIBRARY_IMPL(gankern, CUDA, m) {
  m.impl("spectral_norm", TORCH_BOX(&spectral_norm));
  m.impl("spectral_norm_grad", TORCH_BOX(&spectral_norm_grad));
}
#endif

}  // namespace gankern
