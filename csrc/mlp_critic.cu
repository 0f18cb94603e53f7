// mlp_critic's elementwise stages on CUDA, in place: adjoint mask with bias sums, tangent mask, seed of the penalty's tangents.
// The contracts stand in gankern/ops/mlp_critic.py. A group is eight consecutive elements of a row (fewer at its end): one thread's
// work, and one byte of the dropout mask.
#include "columns.h"
#include "philox.h"

namespace gankern {
namespace {

constexpr int kThreads = 128;  // elementwise kernels, and one row of the seed kernel

// v = d * keep * LeakyReLU'(y) for one group; byte: its dropout bits
template <typename A>
__device__ __forceinline__ void masked8(const A (&d)[8], const A (&y)[8], unsigned byte, A slope, A scale, A (&v)[8]) {
  for (int k = 0; k < 8; ++k) v[k] = d[k] * ((byte >> k & 1u) != 0 ? scale : A(0)) * lrelu_slope(y[k], slope);
}

// d = m * d, and the column sums of factor * d over the first bias_rows rows, before rounding.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kStripThreads)
    adjoint_kernel(T* __restrict__ d, const T* __restrict__ y, const std::uint8_t* __restrict__ bits, const sum_t<T>* __restrict__ factor,
                   T* __restrict__ dbias, sum_t<T>* __restrict__ partials, std::int64_t rows, std::int64_t columns, std::int64_t bias_rows,
                   sum_t<T> scale, sum_t<T> slope) {
  using A = sum_t<T>;
  const std::int64_t groups = (columns + 7) / 8;
  sum_strip(dbias, partials, rows, columns, [=](std::int64_t row, std::int64_t column, std::int64_t at, int count, A(&sum)[8]) {
    A dv[8], yv[8], v[8];
    load8<kVector>(d + at, count, dv);
    load8<kVector>(y + at, count, yv);
    masked8(dv, yv, bits != nullptr ? bits[row * groups + column / 8] : 0xFFu, slope, scale, v);
    store8<kVector>(d + at, count, v);
    if (row < bias_rows) {
      const A f = factor != nullptr ? factor[row] : A(1);
      for (int k = 0; k < 8; ++k) sum[k] += f * v[k];
    }
  });
}

// y = m * t; with a factor t = m * t, y = factor * y + t. y and bits begin with the first row concerned.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    tangent_kernel(T* __restrict__ t, T* __restrict__ y, const std::uint8_t* __restrict__ bits, const sum_t<T>* __restrict__ factor,
                   std::int64_t rows, std::int64_t columns, sum_t<T> scale, sum_t<T> slope) {
  using A = sum_t<T>;
  const std::int64_t groups = (columns + 7) / 8, total = rows * groups;
  for (std::int64_t i = grid_thread(); i < total; i += grid_stride()) {
    const std::int64_t row = i / groups, column = (i - row * groups) * 8, at = row * columns + column;
    const int count = elements_left(columns, column);
    A tv[8], yv[8], v[8];
    load8<kVector>(t + at, count, tv);
    load8<kVector>(y + at, count, yv);
    masked8(tv, yv, bits != nullptr ? bits[i] : 0xFFu, slope, scale, v);
    if (factor != nullptr) {
      store8<kVector>(t + at, count, v);
      for (int k = 0; k < 8; ++k) v[k] += factor[row] * yv[k];
    }
    store8<kVector>(y + at, count, v);
  }
}

// A block a row: its norm, and x = c * g, with a factor g = c * g, x = factor * x + g. x begins with the first row concerned.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    seed_kernel(T* __restrict__ g, T* __restrict__ x, const sum_t<T>* __restrict__ factor, sum_t<T>* __restrict__ norms, std::int64_t columns,
                sum_t<T> two_weight, sum_t<T> target, bool one_sided) {
  using A = sum_t<T>;
  GK_SHARED(A, total, [1]);
  const std::int64_t row = blockIdx.x, groups = (columns + 7) / 8;
  A squares[1] = {};
  for (std::int64_t i = threadIdx.x; i < groups; i += kThreads) {
    A v[8];
    load8<kVector>(g + row * columns + i * 8, elements_left(columns, i * 8), v);
    for (int k = 0; k < 8; ++k) squares[0] += v[k] * v[k];
  }
  block_sum<1>(squares);
  if (threadIdx.x == 0) total[0] = squares[0];
  __syncthreads();
  const A norm = sqrt(total[0]), c = penalty_slope(norm, two_weight, target, one_sided), f = factor != nullptr ? factor[row] : A(0);
  if (threadIdx.x == 0) norms[row] = norm;
  for (std::int64_t i = threadIdx.x; i < groups; i += kThreads) {
    const std::int64_t at = row * columns + i * 8;
    const int count = elements_left(columns, i * 8);
    A v[8];
    load8<kVector>(g + at, count, v);
    for (int k = 0; k < 8; ++k) v[k] *= c;
    if (factor != nullptr) {
      A xv[8];
      load8<kVector>(x + at, count, xv);
      store8<kVector>(g + at, count, v);
      for (int k = 0; k < 8; ++k) v[k] += f * xv[k];
    }
    store8<kVector>(x + at, count, v);
  }
}

// One block: penalty = weight * mean of (norm - target)^2; 0 / 0, NaN, over no rows
template <typename A>
__global__ void __launch_bounds__(kThreads)
    penalty_kernel(const A* __restrict__ norms, A* __restrict__ penalty, std::int64_t rows, A weight, A target, bool one_sided) {
  A sum[1] = {};
  for (std::int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const A gap = penalty_gap(norms[i], target, one_sided);
    sum[0] += gap * gap;
  }
  block_sum<1>(sum);
  if (threadIdx.x == 0) *penalty = weight * (sum[0] / static_cast<A>(rows));
}

// --- launchers over raw pointers -----------------------------------------------------------------------------------------------
// partials [shares, columns] is used when strip_shares(rows, columns) > 1.
template <typename T>
void launch_adjoint(T* d, const T* y, const std::uint8_t* bits, const sum_t<T>* factor, T* dbias, sum_t<T>* partials, std::int64_t rows,
                    std::int64_t columns, std::int64_t bias_rows, double slope, double p, cudaStream_t stream) {
  using A = sum_t<T>;
  if (columns == 0) return;
  const bool vector = columns % 8 == 0 && aligned16(d) && aligned16(y);
  const A scale = static_cast<A>(dropout_scale(p)), s = static_cast<A>(slope);
  const std::int64_t shares = strip_shares(rows, columns);
  const dim3 grid = strip_grid(columns, shares);
  if (vector) GK_LAUNCH((adjoint_kernel<T, true>), grid, kStripThreads, stream, d, y, bits, factor, dbias, partials, rows, columns, bias_rows, scale, s);
  else GK_LAUNCH((adjoint_kernel<T, false>), grid, kStripThreads, stream, d, y, bits, factor, dbias, partials, rows, columns, bias_rows, scale, s);
  if (shares > 1) GK_LAUNCH(sum_shares_kernel<T>, grid_for(columns, kThreads), kThreads, stream, partials, dbias, shares, columns);
}

// y and bits begin with the first row concerned.
template <typename T>
void launch_tangent(T* t, T* y, const std::uint8_t* bits, const sum_t<T>* factor, std::int64_t rows, std::int64_t columns, double slope, double p,
                    cudaStream_t stream) {
  using A = sum_t<T>;
  if (rows * columns == 0) return;
  const bool vector = columns % 8 == 0 && aligned16(t) && aligned16(y);
  const unsigned blocks = grid_for(rows * ceil_div(columns, 8), kThreads);
  const A scale = static_cast<A>(dropout_scale(p)), s = static_cast<A>(slope);
  if (vector) GK_LAUNCH((tangent_kernel<T, true>), blocks, kThreads, stream, t, y, bits, factor, rows, columns, scale, s);
  else GK_LAUNCH((tangent_kernel<T, false>), blocks, kThreads, stream, t, y, bits, factor, rows, columns, scale, s);
}

// x begins with the first row concerned.
template <typename T>
void launch_seed(T* g, T* x, const sum_t<T>* factor, sum_t<T>* penalty, sum_t<T>* norms, std::int64_t rows, std::int64_t columns, double weight,
                 double target, bool one_sided, cudaStream_t stream) {
  using A = sum_t<T>;
  if (rows > 0) {
    const bool vector = columns % 8 == 0 && aligned16(g) && aligned16(x);
    const unsigned blocks = static_cast<unsigned>(rows);
    const A two_weight = static_cast<A>(2.0 * weight / static_cast<double>(rows)), t = static_cast<A>(target);
    if (vector) GK_LAUNCH((seed_kernel<T, true>), blocks, kThreads, stream, g, x, factor, norms, columns, two_weight, t, one_sided);
    else GK_LAUNCH((seed_kernel<T, false>), blocks, kThreads, stream, g, x, factor, norms, columns, two_weight, t, one_sided);
  }
  GK_LAUNCH(penalty_kernel<A>, 1u, kThreads, stream, norms, penalty, rows, static_cast<A>(weight), static_cast<A>(target), one_sided);
}

#ifndef GK_SIM
constexpr const char* kAdjoint = "mlp_critic_adjoint";
constexpr const char* kTangent = "mlp_critic_tangent";
constexpr const char* kSeed = "mlp_critic_seed";

const std::uint8_t* bits_of(const char* op, const Tensor& bits, double p, const Tensor& like, std::int64_t rows, std::int64_t columns) {
  if (p <= 0.0) return nullptr;
  check(bits.scalar_type() == ScalarType::Byte && bits.numel() == rows * ceil_div(columns, 8), op, "bits", "be uint8 [rows, ceil(columns / 8)]");
  check(bits.is_cuda() && bits.get_device_index() == like.get_device_index(), op, "bits", "be on the device of the first tensor");
  check_contiguous(op, "bits", bits);
  return data<std::uint8_t>(bits);
}

void check_factor(const char* op, const std::optional<Tensor>& factor, const Tensor& like, std::int64_t rows) {
  if (!factor.has_value()) return;
  check(factor->scalar_type() == accumulate_dtype(like.scalar_type()) && factor->numel() == rows, op, "factor",
        "have one value a row, in the accumulation dtype");
  check(factor->is_cuda() && factor->get_device_index() == like.get_device_index(), op, "factor", "be on the device of the first tensor");
  check_contiguous(op, "factor", *factor);
}

// `part` [P, N] belongs to rows first ... first + P - 1 of `whole` [R, N].
void check_rows(const char* op, const Tensor& part, const Tensor& whole, std::int64_t first) {
  check_contiguous(op, "the first tensor", part);
  check_like(op, "the second tensor", whole, part);
  check(part.dim() == 2 && whole.dim() == 2 && part.size(1) == whole.size(1), op, "the tensors", "be matrices of as many columns");
  check(first >= 0 && first <= whole.size(0) - part.size(0), op, "first", "leave the rows inside the second tensor");
}

Tensor mlp_critic_adjoint(Tensor d, const Tensor& y, const Tensor& bits, double slope, double p, std::int64_t bias_rows,
                          const std::optional<Tensor>& factor) {
  check_rows(kAdjoint, d, y, 0);
  const std::int64_t rows = d.size(0), columns = d.size(1);
  check(y.size(0) == rows, kAdjoint, "y", "have the shape of d");
  check(bias_rows >= 0 && bias_rows <= rows, kAdjoint, "bias_rows", "be between 0 and the number of rows");
  check_factor(kAdjoint, factor, d, bias_rows);
  const std::uint8_t* mask = bits_of(kAdjoint, bits, p, d, rows, columns);
  const torch::stable::accelerator::DeviceGuard guard(d.get_device_index());
  Tensor dbias = torch::stable::new_empty(d, {columns});
  const std::int64_t shares = strip_shares(rows, columns);
  std::optional<Tensor> partials;
  if (shares > 1) partials = torch::stable::new_empty(d, {shares, columns}, accumulate_dtype(d.scalar_type()));
  dispatch_floating(kAdjoint, d.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    launch_adjoint<T>(mutable_data<T>(d), data<T>(y), mask, data_or_null<sum_t<T>>(factor), mutable_data<T>(dbias),
                      partials.has_value() ? mutable_data<sum_t<T>>(*partials) : nullptr, rows, columns, bias_rows, slope, p, current_stream(d));
  });
  return dbias;
}

void mlp_critic_tangent(Tensor t, Tensor y, const Tensor& bits, double slope, double p, std::int64_t first, const std::optional<Tensor>& factor) {
  check_rows(kTangent, t, y, first);
  const std::int64_t rows = t.size(0), columns = t.size(1);
  check_factor(kTangent, factor, t, rows);
  const std::uint8_t* mask = bits_of(kTangent, bits, p, t, y.size(0), columns);
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  dispatch_floating(kTangent, t.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    launch_tangent<T>(mutable_data<T>(t), mutable_data<T>(y) + first * columns, mask == nullptr ? nullptr : mask + first * ceil_div(columns, 8),
                      data_or_null<sum_t<T>>(factor), rows, columns, slope, p, current_stream(t));
  });
}

std::tuple<Tensor, Tensor> mlp_critic_seed(Tensor g, Tensor x, std::int64_t first, const std::optional<Tensor>& factor, double weight, double target,
                                           bool one_sided) {
  check_rows(kSeed, g, x, first);
  const std::int64_t rows = g.size(0), columns = g.size(1);
  check(rows <= 2147483647, kSeed, "g", "have fewer than 2^31 rows");
  check_factor(kSeed, factor, g, rows);
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  const ScalarType dtype = accumulate_dtype(g.scalar_type());
  Tensor penalty = torch::stable::new_empty(g, {}, dtype), norms = torch::stable::new_empty(g, {rows}, dtype);
  dispatch_floating(kSeed, g.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    using A = sum_t<T>;
    launch_seed<T>(mutable_data<T>(g), mutable_data<T>(x) + first * columns, data_or_null<A>(factor), mutable_data<A>(penalty), mutable_data<A>(norms),
                   rows, columns, weight, target, one_sided, current_stream(g));
  });
  return {penalty, norms};
}
#endif

}  // namespace

#ifndef GK_SIM
STABLE_TORCH_LIBRARY_IMPL(gankern, CUDA, m) {
  m.impl("mlp_critic_adjoint", TORCH_BOX(&mlp_critic_adjoint));
  m.impl("mlp_critic_tangent", TORCH_BOX(&mlp_critic_tangent));
  m.impl("mlp_critic_seed", TORCH_BOX(&mlp_critic_seed));
}
#endif

}  // namespace gankern
