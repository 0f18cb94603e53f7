// LeakyReLU of a channel bias, on CUDA: forward, and its gradient with the bias sum. The contracts stand in gankern/ops/bias_lrelu.py.
// Memory is [outer, channels, inner]: samples, channels and pixels, or with inner == 1 pixels and channels (channels-last, matrices).
// A group is eight consecutive elements, one thread's work.
#include "columns.h"

#ifndef GK_SIM
#include "bias_lrelu.h"
#endif

namespace gankern {
namespace {

constexpr int kThreads = 128;         // elementwise kernels
constexpr int kPlaneThreads = 256;    // a block that sums a channel of planes

// a / b, in 32 bits where both fit: several times as fast
__device__ __forceinline__ std::int64_t quotient(std::int64_t a, std::int64_t b) {
  return ((a | b) >> 32) == 0 ? static_cast<std::int64_t>(static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b)) : a / b;
}

// Eight elements from p on, of which `count` exist; kVector: p is a multiple of 16 bytes.
template <bool kVector, typename T>
__device__ __forceinline__ void load_group(const T* p, int count, sum_t<T> (&out)[8]) {
  if (kVector && count == 8) load8<kVector>(p, 8, out);
  else load8<false>(p, count, out);
}

template <bool kVector, typename T>
__device__ __forceinline__ void store_group(T* p, int count, const sum_t<T> (&in)[8]) {
  if (kVector && count == 8) store8<kVector>(p, 8, in);
  else store8<false>(p, count, in);
}

// dx of one group, stored; d: before rounding, 0 where there is no element
template <bool kVector, typename T>
__device__ __forceinline__ void grad_group(const T* dy, const T* y, T* dx, int count, sum_t<T> slope, sum_t<T> (&d)[8]) {
  sum_t<T> yv[8];
  load_group<kVector>(dy, count, d);
  load_group<kVector>(y, count, yv);
  for (int k = 0; k < 8; ++k) d[k] *= lrelu_slope(yv[k], slope);
  store_group<kVector>(dx, count, d);
}

// y = LeakyReLU(x + bias) of `total` elements; bias may be null
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    act_kernel(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, std::int64_t total, std::int64_t channels, std::int64_t inner,
               sum_t<T> slope) {
  using A = sum_t<T>;
  for (std::int64_t group = grid_thread(); group * 8 < total; group += grid_stride()) {
    const std::int64_t at = group * 8;
    const int count = elements_left(total, at);
    A v[8];
    load_group<kVector>(x + at, count, v);
    if (bias != nullptr) {
      const std::int64_t plane = quotient(at, inner);
      std::int64_t pixel = at - plane * inner, channel = plane - quotient(plane, channels) * channels;
      A b = static_cast<A>(bias[channel]);
      for (int k = 0; k < 8; ++k) {
        v[k] += b;
        if (++pixel == inner && k < 7) {
          pixel = 0;
          channel = channel + 1 == channels ? 0 : channel + 1;
          b = static_cast<A>(bias[channel]);
        }
      }
    }
    for (int k = 0; k < 8; ++k) v[k] = lrelu(v[k], slope);
    store_group<kVector>(y + at, count, v);
  }
}

// dx = dy * LeakyReLU'(y)
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    grad_kernel(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dx, std::int64_t total, sum_t<T> slope) {
  for (std::int64_t group = grid_thread(); group * 8 < total; group += grid_stride()) {
    const std::int64_t at = group * 8;
    sum_t<T> d[8];
    grad_group<kVector>(dy + at, y + at, dx + at, elements_left(total, at), slope, d);
  }
}

// The same, and the sums of dx before rounding, of planes. Block (c, s) takes the s-th share of the groups of channel c. With one share the
// sums go to dbias [channels], else to partials [shares, channels]. kVector: inner is a multiple of 8.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kPlaneThreads)
    grad_planes_kernel(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dx, T* __restrict__ dbias, sum_t<T>* __restrict__ partials,
                       std::int64_t outer, std::int64_t channels, std::int64_t inner, sum_t<T> slope) {
  using A = sum_t<T>;
  const std::int64_t groups = (inner + 7) / 8, total = outer * groups, share = (total + gridDim.y - 1) / gridDim.y;
  const std::int64_t begin = blockIdx.y * share, end = begin + share < total ? begin + share : total;
  A sum[1] = {};
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kPlaneThreads) {
    const std::int64_t sample = quotient(i, groups), pixel = (i - sample * groups) * 8, at = (sample * channels + blockIdx.x) * inner + pixel;
    A d[8];
    grad_group<kVector>(dy + at, y + at, dx + at, elements_left(inner, pixel), slope, d);
    for (int k = 0; k < 8; ++k) sum[0] += d[k];
  }
  block_sum<1>(sum);
  if (threadIdx.x == 0) {
    if (gridDim.y == 1) dbias[blockIdx.x] = static_cast<T>(sum[0]);
    else partials[blockIdx.y * channels + blockIdx.x] = sum[0];
  }
}

// The same of rows [rows, columns], whose columns are the channels.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kStripThreads)
    grad_rows_kernel(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dx, T* __restrict__ dbias, sum_t<T>* __restrict__ partials,
                     std::int64_t rows, std::int64_t columns, sum_t<T> slope) {
  using A = sum_t<T>;
  sum_strip(dbias, partials, rows, columns, [=](std::int64_t, std::int64_t, std::int64_t at, int count, A(&sum)[8]) {
    A d[8];
    grad_group<kVector>(dy + at, y + at, dx + at, count, slope, d);
    for (int k = 0; k < 8; ++k) sum[k] += d[k];
  });
}

// --- launchers over raw pointers -----------------------------------------------------------------------------------------------
template <typename T>
void launch_act(const T* x, const T* bias, T* y, std::int64_t outer, std::int64_t channels, std::int64_t inner, double slope, cudaStream_t stream) {
  const std::int64_t total = outer * channels * inner;
  if (total == 0) return;
  const auto s = static_cast<sum_t<T>>(slope);
  const unsigned blocks = grid_for(ceil_div(total, 8), kThreads);
  if (aligned16(x) && aligned16(y)) GK_LAUNCH((act_kernel<T, true>), blocks, kThreads, stream, x, bias, y, total, channels, inner, s);
  else GK_LAUNCH((act_kernel<T, false>), blocks, kThreads, stream, x, bias, y, total, channels, inner, s);
}

// Into how many shares the bias gradient of a channel is split.
inline std::int64_t bias_shares(std::int64_t outer, std::int64_t channels, std::int64_t inner) {
  return inner == 1 ? strip_shares(outer, channels) : shares_of(outer * ceil_div(inner, 8), channels);
}

// dbias null: not wanted. partials [shares, channels] is used when there is more than one share.
template <typename T>
void launch_grad(const T* dy, const T* y, T* dx, T* dbias, sum_t<T>* partials, std::int64_t outer, std::int64_t channels, std::int64_t inner, double slope,
                 cudaStream_t stream) {
  const std::int64_t total = outer * channels * inner;
  const auto s = static_cast<sum_t<T>>(slope);
  const bool aligned = aligned16(dy) && aligned16(y) && aligned16(dx);
  if (channels == 0 || (total == 0 && dbias == nullptr)) return;
  if (dbias == nullptr) {
    const unsigned blocks = grid_for(ceil_div(total, 8), kThreads);
    if (aligned) GK_LAUNCH((grad_kernel<T, true>), blocks, kThreads, stream, dy, y, dx, total, s);
    else GK_LAUNCH((grad_kernel<T, false>), blocks, kThreads, stream, dy, y, dx, total, s);
    return;
  }
  const std::int64_t shares = bias_shares(outer, channels, inner);
  if (inner == 1) {
    const dim3 grid = strip_grid(channels, shares);
    if (aligned && channels % 8 == 0)
      GK_LAUNCH((grad_rows_kernel<T, true>), grid, kStripThreads, stream, dy, y, dx, dbias, partials, outer, channels, s);
    else GK_LAUNCH((grad_rows_kernel<T, false>), grid, kStripThreads, stream, dy, y, dx, dbias, partials, outer, channels, s);
  } else {
    const dim3 grid(static_cast<unsigned>(channels), static_cast<unsigned>(shares));
    if (aligned && inner % 8 == 0)
      GK_LAUNCH((grad_planes_kernel<T, true>), grid, kPlaneThreads, stream, dy, y, dx, dbias, partials, outer, channels, inner, s);
    else GK_LAUNCH((grad_planes_kernel<T, false>), grid, kPlaneThreads, stream, dy, y, dx, dbias, partials, outer, channels, inner, s);
  }
  if (shares > 1) GK_LAUNCH(sum_shares_kernel<T>, grid_for(channels, kThreads), kThreads, stream, partials, dbias, shares, channels);
}

#ifndef GK_SIM
constexpr const char* kAct = "bias_lrelu";
constexpr const char* kGrad = "bias_lrelu_grad";

Tensor bias_lrelu(const Tensor& x, const std::optional<Tensor>& bias, double slope) {
  const Memory m = memory_of(kAct, x);
  if (bias.has_value()) check_bias(kAct, *bias, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  dispatch_floating(kAct, x.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    launch_act<T>(data<T>(x), data_or_null<T>(bias), mutable_data<T>(y), m.outer, m.channels, m.inner, slope, current_stream(x));
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_lrelu_grad(const Tensor& dy, const Tensor& y, double slope, bool with_bias) {
  const Memory m = memory_of(kGrad, dy);
  check_same_memory(kGrad, "y", y, dy);
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  Tensor dx = torch::stable::empty_like(dy), dbias = torch::stable::new_empty(dy, {with_bias ? m.channels : 0});
  const std::int64_t shares = with_bias ? bias_shares(m.outer, m.channels, m.inner) : 1;
  std::optional<Tensor> partials;
  if (shares > 1) partials = torch::stable::new_empty(dy, {shares, m.channels}, accumulate_dtype(dy.scalar_type()));
  dispatch_floating(kGrad, dy.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    launch_grad<T>(data<T>(dy), data<T>(y), mutable_data<T>(dx), with_bias ? mutable_data<T>(dbias) : nullptr,
                   partials.has_value() ? mutable_data<sum_t<T>>(*partials) : nullptr, m.outer, m.channels, m.inner, slope, current_stream(dy));
  });
  return {dx, dbias};
}
#endif

}  // namespace

#ifndef GK_SIM
STABLE_TORCH_LIBRARY_IMPL(gankern, CUDA, m) {
  m.impl("bias_lrelu", TORCH_BOX(&bias_lrelu));
  m.impl("bias_lrelu_grad", TORCH_BOX(&bias_lrelu_grad));
}
#endif

}  // namespace gankern
