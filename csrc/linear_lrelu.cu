// linear_lrelu around the matrix product, on CUDA: bias + LeakyReLU + dropout forward, and its gradient with the bias sum.
// The contracts stand in gankern/ops/linear_lrelu.py. A matrix is [rows, columns]; a group is eight consecutive elements of a row
// (fewer at its end): one thread's work, one Philox call and one byte of the dropout mask, group i of the matrix having counter i.
#include "columns.h"
#include "philox.h"

namespace gankern {
namespace {

constexpr int kThreads = 128;  // elementwise kernels

// d = dy * keep * LeakyReLU'(y) for one group; byte: its dropout bits
template <typename A>
__device__ __forceinline__ void grad8(const A (&dy)[8], const A (&y)[8], unsigned byte, A slope, A scale, A (&d)[8]) {
  for (int k = 0; k < 8; ++k) d[k] = dy[k] * ((byte >> k & 1u) != 0 ? scale : A(0)) * lrelu_slope(y[k], slope);
}

// y = dropout(LeakyReLU(z + bias)), bits [rows, groups] when kDropout; bias and seed may be null where they are not used
template <typename T, bool kVector, bool kDropout>
__global__ void __launch_bounds__(kThreads)
    act_kernel(const T* __restrict__ z, const T* __restrict__ bias, T* __restrict__ y, std::uint8_t* __restrict__ bits,
               const std::int64_t* __restrict__ seed, std::int64_t rows, std::int64_t columns, std::uint32_t threshold, sum_t<T> scale,
               sum_t<T> slope) {
  using A = sum_t<T>;
  const std::int64_t groups = (columns + 7) / 8, total = rows * groups;
  std::uint64_t key = 0;
  if constexpr (kDropout) key = static_cast<std::uint64_t>(*seed);
  for (std::int64_t i = grid_thread(); i < total; i += grid_stride()) {
    const std::int64_t row = i / groups, column = (i - row * groups) * 8, at = row * columns + column;
    const int count = elements_left(columns, column);
    A v[8];
    load8<kVector>(z + at, count, v);
    if (bias != nullptr) {
      A b[8];
      load8<kVector>(bias + column, count, b);
      for (int k = 0; k < 8; ++k) v[k] += b[k];
    }
    for (int k = 0; k < 8; ++k) v[k] = lrelu(v[k], slope);
    if constexpr (kDropout) {
      const unsigned byte = keep_byte(key, static_cast<std::uint64_t>(i), threshold);
      bits[i] = static_cast<std::uint8_t>(byte);
      for (int k = 0; k < 8; ++k) v[k] *= (byte >> k & 1u) != 0 ? scale : A(0);
    }
    store8<kVector>(y + at, count, v);
  }
}

// dz = dy * keep * LeakyReLU'(y); bits null: everything is kept, scale 1
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    grad_kernel(const T* __restrict__ dy, const T* __restrict__ y, const std::uint8_t* __restrict__ bits, T* __restrict__ dz, std::int64_t rows,
                std::int64_t columns, sum_t<T> scale, sum_t<T> slope) {
  using A = sum_t<T>;
  const std::int64_t groups = (columns + 7) / 8, total = rows * groups;
  for (std::int64_t i = grid_thread(); i < total; i += grid_stride()) {
    const std::int64_t row = i / groups, column = (i - row * groups) * 8, at = row * columns + column;
    const int count = elements_left(columns, column);
    A dv[8], yv[8], d[8];
    load8<kVector>(dy + at, count, dv);
    load8<kVector>(y + at, count, yv);
    grad8(dv, yv, bits != nullptr ? bits[i] : 0xFFu, slope, scale, d);
    store8<kVector>(dz + at, count, d);
  }
}

// The same, and the column sums of dz before rounding.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kStripThreads)
    grad_bias_kernel(const T* __restrict__ dy, const T* __restrict__ y, const std::uint8_t* __restrict__ bits, T* __restrict__ dz,
                     T* __restrict__ dbias, sum_t<T>* __restrict__ partials, std::int64_t rows, std::int64_t columns, sum_t<T> scale,
                     sum_t<T> slope) {
  using A = sum_t<T>;
  const std::int64_t groups = (columns + 7) / 8;
  sum_strip(dbias, partials, rows, columns, [=](std::int64_t row, std::int64_t column, std::int64_t at, int count, A(&sum)[8]) {
    A dv[8], yv[8], d[8];
    load8<kVector>(dy + at, count, dv);
    load8<kVector>(y + at, count, yv);
    grad8(dv, yv, bits != nullptr ? bits[row * groups + column / 8] : 0xFFu, slope, scale, d);
    store8<kVector>(dz + at, count, d);
    for (int k = 0; k < 8; ++k) sum[k] += d[k];
  });
}

// --- launchers over raw pointers -----------------------------------------------------------------------------------------------
template <typename T>
void launch_act(const T* z, const T* bias, T* y, std::uint8_t* bits, const std::int64_t* seed, std::int64_t rows, std::int64_t columns, double slope,
                double p, cudaStream_t stream) {
  using A = sum_t<T>;
  if (rows * columns == 0) return;
  const bool vector = columns % 8 == 0 && aligned16(z) && aligned16(y) && (bias == nullptr || aligned16(bias));
  const unsigned blocks = grid_for(rows * ceil_div(columns, 8), kThreads);
  const A scale = static_cast<A>(dropout_scale(p)), s = static_cast<A>(slope);
  const std::uint32_t threshold = dropout_threshold(p);
  if (p > 0.0 && vector) GK_LAUNCH((act_kernel<T, true, true>), blocks, kThreads, stream, z, bias, y, bits, seed, rows, columns, threshold, scale, s);
  else if (p > 0.0) GK_LAUNCH((act_kernel<T, false, true>), blocks, kThreads, stream, z, bias, y, bits, seed, rows, columns, threshold, scale, s);
  else if (vector) GK_LAUNCH((act_kernel<T, true, false>), blocks, kThreads, stream, z, bias, y, bits, seed, rows, columns, threshold, scale, s);
  else GK_LAUNCH((act_kernel<T, false, false>), blocks, kThreads, stream, z, bias, y, bits, seed, rows, columns, threshold, scale, s);
}

// dbias null: not wanted. partials [shares, columns] is used when strip_shares(rows, columns) > 1.
template <typename T>
void launch_act_grad(const T* dy, const T* y, const std::uint8_t* bits, T* dz, T* dbias, sum_t<T>* partials, std::int64_t rows, std::int64_t columns,
                     double slope, double p, cudaStream_t stream) {
  using A = sum_t<T>;
  const bool vector = columns % 8 == 0 && aligned16(dy) && aligned16(y) && aligned16(dz);
  const A scale = static_cast<A>(dropout_scale(p)), s = static_cast<A>(slope);
  if (columns == 0 || (rows == 0 && dbias == nullptr)) return;
  if (dbias == nullptr) {
    const unsigned blocks = grid_for(rows * ceil_div(columns, 8), kThreads);
    if (vector) GK_LAUNCH((grad_kernel<T, true>), blocks, kThreads, stream, dy, y, bits, dz, rows, columns, scale, s);
    else GK_LAUNCH((grad_kernel<T, false>), blocks, kThreads, stream, dy, y, bits, dz, rows, columns, scale, s);
    return;
  }
  const std::int64_t shares = strip_shares(rows, columns);
  const dim3 grid = strip_grid(columns, shares);
  if (vector) GK_LAUNCH((grad_bias_kernel<T, true>), grid, kStripThreads, stream, dy, y, bits, dz, dbias, partials, rows, columns, scale, s);
  else GK_LAUNCH((grad_bias_kernel<T, false>), grid, kStripThreads, stream, dy, y, bits, dz, dbias, partials, rows, columns, scale, s);
  if (shares > 1) GK_LAUNCH(sum_shares_kernel<T>, grid_for(columns, kThreads), kThreads, stream, partials, dbias, shares, columns);
}

#ifndef GK_SIM
constexpr const char* kAct = "linear_lrelu_act";
constexpr const char* kGrad = "linear_lrelu_act_grad";

struct Shape {
  std::int64_t rows, columns;
};

Shape shape_of(const char* op, const Tensor& t) {
  check(t.dim() >= 1, op, "the first tensor", "have at least one dimension");
  check_contiguous(op, "the first tensor", t);
  const std::int64_t columns = t.size(t.dim() - 1);
  std::int64_t rows = 1;
  for (std::int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return {rows, columns};
}

std::tuple<Tensor, Tensor> linear_lrelu_act(const Tensor& z, const std::optional<Tensor>& bias, double slope, double p, const std::optional<Tensor>& seed) {
  const auto [rows, columns] = shape_of(kAct, z);
  if (bias.has_value()) {
    check_like(kAct, "bias", *bias, z);
    check(bias->numel() == columns, kAct, "bias", "have one element for each column of z");
  }
  const bool dropout = p > 0.0;
  if (dropout) {
    check(p <= 1.0, kAct, "p", "be in [0, 1]");
    check(seed.has_value() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, kAct, "seed", "be an int64 tensor of one element when p > 0");
    check(seed->is_cuda() && seed->get_device_index() == z.get_device_index(), kAct, "seed", "be on the device of z");
  }
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  Tensor y = torch::stable::empty_like(z);
  Tensor bits = dropout ? torch::stable::new_empty(z, {rows, ceil_div(columns, 8)}, ScalarType::Byte) : torch::stable::new_empty(z, {0}, ScalarType::Byte);
  dispatch_floating(kAct, z.scalar_type(), [&, rows = rows, columns = columns](auto zero) {
    using T = device_t<decltype(zero)>;
    launch_act<T>(data<T>(z), data_or_null<T>(bias), mutable_data<T>(y), mutable_data<std::uint8_t>(bits), dropout ? data<std::int64_t>(*seed) : nullptr,
                  rows, columns, slope, p, current_stream(z));
  });
  return {y, bits};
}

std::tuple<Tensor, Tensor> linear_lrelu_act_grad(const Tensor& dy, const Tensor& y, const Tensor& bits, double slope, double p, bool with_bias) {
  const auto [rows, columns] = shape_of(kGrad, dy);
  check_like(kGrad, "y", y, dy);
  check(y.numel() == dy.numel(), kGrad, "y", "have the shape of dy");
  if (p > 0.0) {
    check(bits.scalar_type() == ScalarType::Byte && bits.numel() == rows * ceil_div(columns, 8), kGrad, "bits", "be uint8 [rows, ceil(columns / 8)]");
    check(bits.is_cuda() && bits.get_device_index() == dy.get_device_index(), kGrad, "bits", "be on the device of dy");
    check_contiguous(kGrad, "bits", bits);
  }
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  Tensor dz = torch::stable::empty_like(dy), dbias = torch::stable::new_empty(dy, {with_bias ? columns : 0});
  const std::int64_t shares = with_bias ? strip_shares(rows, columns) : 1;
  std::optional<Tensor> partials;
  if (shares > 1) partials = torch::stable::new_empty(dy, {shares, columns}, accumulate_dtype(dy.scalar_type()));
  dispatch_floating(kGrad, dy.scalar_type(), [&, rows = rows, columns = columns](auto zero) {
    using T = device_t<decltype(zero)>;
    launch_act_grad<T>(data<T>(dy), data<T>(y), p > 0.0 ? data<std::uint8_t>(bits) : nullptr, mutable_data<T>(dz),
                       with_bias ? mutable_data<T>(dbias) : nullptr, partials.has_value() ? mutable_data<sum_t<T>>(*partials) : nullptr, rows, columns,
                       slope, p, current_stream(dy));
  });
  return {dz, dbias};
}
#endif

}  // namespace

#ifndef GK_SIM
STABLE_TORCH_LIBRARY_IMPL(gankern, CUDA, m) {
  m.impl("linear_lrelu_act", TORCH_BOX(&linear_lrelu_act));
  m.impl("linear_lrelu_act_grad", TORCH_BOX(&linear_lrelu_act_grad));
}
#endif

}  // namespace gankern
