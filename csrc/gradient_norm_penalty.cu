// gradient_norm_penalty on CUDA: norms, penalty and mean norm in one pass over the gradient and a launch of one block that finishes; its
// gradient in one pass. The contracts stand in gankern/ops/gradient_norm_penalty.py. A sample is cut into shares, one for each warp.
#include "launch.h"

namespace gankern {
namespace {

constexpr int kThreads = 128;
constexpr int kFinishThreads = 512;
constexpr std::int64_t kShare = 2048;    // elements that a warp sums, 8 loads of 8 a lane, unless the sample has more than kMaxShares of them
constexpr std::int64_t kMaxShares = 64;

// sums [rows, shares]: of the squares of `length` consecutive elements of a sample, length being a multiple of 8
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const T* __restrict__ grad, sum_t<T>* __restrict__ sums, std::int64_t rows, std::int64_t columns, std::int64_t shares,
                   std::int64_t length) {
  using A = sum_t<T>;
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (item >= rows * shares) return;  // the whole warp
  const std::int64_t row = item / shares, first = (item - row * shares) * length;
  const std::int64_t end = first + length < columns ? first + length : columns;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  A lanes[8] = {};
  for (std::int64_t at = first + lane * 8; at < end; at += 32 * 8) {
    A v[8];
    load8<kVector>(grad + row * columns + at, elements_left(end, at), v);
    for (int k = 0; k < 8; ++k) lanes[k] += v[k] * v[k];
  }
  A sum[1] = {((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))};
  warp_sum<1>(sum);
  if (lane == 0) sums[item] = sum[0];
}

// One block: from sums [rows, shares] to norms [rows], value [1] and mean [1]
template <typename A>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const A* __restrict__ sums, A* __restrict__ norms, A* __restrict__ value, A* __restrict__ mean, std::int64_t rows, std::int64_t shares,
                  A target, bool one_sided, A weight) {
  A totals[2] = {};
  for (std::int64_t row = threadIdx.x; row < rows; row += kFinishThreads) {
    A sum = 0;
    for (std::int64_t s = 0; s < shares; ++s) sum += sums[row * shares + s];
    const A norm = sqrt(sum), excess = norm_excess(norm, target, one_sided);
    norms[row] = norm;
    totals[0] += excess * excess;
    totals[1] += norm;
  }
  block_sum<2>(totals);
  if (threadIdx.x == 0) {
    *value = weight * (totals[0] / static_cast<A>(rows));  // of no samples: 0 / 0, NaN
    *mean = totals[1] / static_cast<A>(rows);
  }
}

// out = c * scale * slope(norm of the sample) * grad
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    grad_kernel(const sum_t<T>* __restrict__ c, const T* __restrict__ grad, const sum_t<T>* __restrict__ norms, T* __restrict__ out, std::int64_t rows,
                std::int64_t columns, sum_t<T> target, bool one_sided, sum_t<T> scale) {
  using A = sum_t<T>;
  const std::int64_t groups = (columns + 7) / 8, total = rows * groups;
  const A factor = *c * scale;
  for (std::int64_t i = grid_thread(); i < total; i += grid_stride()) {
    const std::int64_t row = i / groups, column = (i - row * groups) * 8, at = row * columns + column;
    const int count = elements_left(columns, column);
    const A f = factor * norm_slope(norms[row], target, one_sided);
    A v[8];
    load8<kVector>(grad + at, count, v);
    for (int k = 0; k < 8; ++k) v[k] *= f;
    store8<kVector>(out + at, count, v);
  }
}

// --- launchers over raw pointers -----------------------------------------------------------------------------------------------
inline std::int64_t share_count(std::int64_t columns) {
  const std::int64_t shares = ceil_div(columns, kShare);
  return shares < 1 ? 1 : shares > kMaxShares ? kMaxShares : shares;
}

// sums [rows, share_count(columns)] is scratch memory
template <typename T>
void launch_penalty(const T* grad, sum_t<T>* sums, sum_t<T>* norms, sum_t<T>* value, sum_t<T>* mean, std::int64_t rows, std::int64_t columns,
                    double target, bool one_sided, double weight, cudaStream_t stream) {
  using A = sum_t<T>;
  const std::int64_t shares = share_count(columns), length = ceil_div(ceil_div(columns, shares), 8) * 8;
  if (rows > 0) {
    const bool vector = columns % 8 == 0 && aligned16(grad);
    const unsigned blocks = static_cast<unsigned>(ceil_div(rows * shares, kThreads / 32));
    if (vector) GK_LAUNCH((squares_kernel<T, true>), blocks, kThreads, stream, grad, sums, rows, columns, shares, length);
    else GK_LAUNCH((squares_kernel<T, false>), blocks, kThreads, stream, grad, sums, rows, columns, shares, length);
  }
  GK_LAUNCH(finish_kernel<A>, 1, kFinishThreads, stream, sums, norms, value, mean, rows, shares, static_cast<A>(target), one_sided, static_cast<A>(weight));
}

template <typename T>
void launch_penalty_grad(const sum_t<T>* c, const T* grad, const sum_t<T>* norms, T* out, std::int64_t rows, std::int64_t columns, double target,
                         bool one_sided, double weight, cudaStream_t stream) {
  using A = sum_t<T>;
  if (rows * columns == 0) return;
  const A scale = static_cast<A>(2.0 * weight / static_cast<double>(rows)), t = static_cast<A>(target);
  const bool vector = columns % 8 == 0 && aligned16(grad) && aligned16(out);
  const unsigned blocks = grid_for(rows * ceil_div(columns, 8), kThreads);
  if (vector) GK_LAUNCH((grad_kernel<T, true>), blocks, kThreads, stream, c, grad, norms, out, rows, columns, t, one_sided, scale);
  else GK_LAUNCH((grad_kernel<T, false>), blocks, kThreads, stream, c, grad, norms, out, rows, columns, t, one_sided, scale);
}

#ifndef GK_SIM
constexpr const char* kOp = "gradient_norm_penalty";
constexpr const char* kGrad = "gradient_norm_penalty_grad";

struct Shape {
  std::int64_t rows, columns;
};

Shape shape_of(const char* op, const Tensor& grad) {
  check_contiguous(op, "grad", grad);
  check(grad.dim() >= 1, op, "grad", "have at least one dimension");
  const std::int64_t rows = grad.size(0);
  return {rows, rows > 0 ? grad.numel() / rows : 0};
}

// `count` values in the accumulation dtype, contiguous, on the device of grad
void check_values(const char* argument, const Tensor& t, const Tensor& grad, std::int64_t count) {
  check(t.scalar_type() == accumulate_dtype(grad.scalar_type()) && t.numel() == count, kGrad, argument, "have one value, norms one a sample, in the accumulation dtype");
  check(t.is_cuda() && t.get_device_index() == grad.get_device_index(), kGrad, argument, "be on the device of grad");
  check_contiguous(kGrad, argument, t);
}

std::tuple<Tensor, Tensor, Tensor> penalty(const Tensor& grad, double target, bool one_sided, double weight) {
  const auto [rows, columns] = shape_of(kOp, grad);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const ScalarType dtype = accumulate_dtype(grad.scalar_type());
  Tensor value = torch::stable::new_empty(grad, {}, dtype), norms = torch::stable::new_empty(grad, {rows}, dtype);
  Tensor mean = torch::stable::new_empty(grad, {}, dtype), sums = torch::stable::new_empty(grad, {rows, share_count(columns)}, dtype);
  dispatch_floating(kOp, grad.scalar_type(), [&, rows = rows, columns = columns](auto zero) {
    using T = device_t<decltype(zero)>;
    using A = sum_t<T>;
    launch_penalty<T>(data<T>(grad), mutable_data<A>(sums), mutable_data<A>(norms), mutable_data<A>(value), mutable_data<A>(mean), rows, columns, target,
                      one_sided, weight, current_stream(grad));
  });
  return {value, norms, mean};
}

Tensor penalty_grad(const Tensor& c, const Tensor& grad, const Tensor& norms, double target, bool one_sided, double weight) {
  const auto [rows, columns] = shape_of(kGrad, grad);
  check_values("c", c, grad, 1);
  check_values("norms", norms, grad, rows);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Tensor out = torch::stable::empty_like(grad);
  dispatch_floating(kGrad, grad.scalar_type(), [&, rows = rows, columns = columns](auto zero) {
    using T = device_t<decltype(zero)>;
    using A = sum_t<T>;
    launch_penalty_grad<T>(data<A>(c), data<T>(grad), data<A>(norms), mutable_data<T>(out), rows, columns, target, one_sided, weight,
                           current_stream(grad));
  });
  return out;
}
#endif

}  // namespace

#ifndef GK_SIM
STABLE_TORCH_LIBRARY_IMPL(gankern, CUDA, m) {
  m.impl("gradient_norm_penalty", TORCH_BOX(&penalty));
  m.impl("gradient_norm_penalty_grad", TORCH_BOX(&penalty_grad));
}
#endif

}  // namespace gankern
