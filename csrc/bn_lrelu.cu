// bn_lrelu on CUDA: statistics, normalisation with LeakyReLU, first and second backward pass. The contracts stand in
// gankern/ops/bn_lrelu.py, the formulas in bn_lrelu.h. x is [B, C, S]. With S > 1 a block takes one channel and each thread groups of eight
// elements of it; with S == 1 (kMatrix) a block takes 32 columns and each thread one of them. Block (i, j) takes the j-th share of the
// batch. With one share one launch does everything (phase 0); with several each phase ends with sums in partials [sums, shares, C], which
// the blocks of the next phase add in a fixed order.
#include "bn_lrelu.h"
#include "launch.h"

namespace gankern {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr std::int64_t kShareElements = 8192, kMaxShares = 64, kFillBlocks = 264;  // shares: as many as fill the device, unless they get small
constexpr std::int64_t kEvalElements = 2048, kEvalShares = 4096;
constexpr int kAll = 0;

// --- where a thread works --------------------------------------------------------------------------------------------------------------
struct Space {
  std::int64_t batch, channels, space;
};

template <bool kMatrix>
__device__ __forceinline__ std::int64_t my_channel() {
  return kMatrix ? static_cast<std::int64_t>(blockIdx.x) * 32 + threadIdx.x % 32 : blockIdx.x;
}

// Whether the thread writes what there is one of for its channel.
template <bool kMatrix>
__device__ __forceinline__ bool owns_channel() {
  return blockIdx.y == 0 && threadIdx.x < (kMatrix ? 32u : 1u);
}

// Calls f(offset, count of consecutive elements) for each of the thread's groups.
template <bool kMatrix, typename F>
__device__ __forceinline__ void for_groups(const Space& s, F&& f) {
  const std::int64_t channel = my_channel<kMatrix>(), groups = kMatrix ? 1 : (s.space + 7) / 8, total = s.batch * groups;
  const std::int64_t share = (total + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * share, end = begin + share < total ? begin + share : total;
  if (channel >= s.channels) return;
  if constexpr (kMatrix) {
    for (std::int64_t row = begin + threadIdx.x / 32; row < end; row += kWarps) f(row * s.channels + channel, 1);
  } else {
    for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const std::int64_t b = i / groups, at = (i - b * groups) * 8;
      f((b * s.channels + channel) * s.space + at, static_cast<int>(s.space - at < 8 ? s.space - at : 8));
    }
  }
}

template <bool kMatrix, bool kVector, typename T>
__device__ __forceinline__ void load(const T* p, int count, sum_t<T> (&out)[kMatrix ? 1 : 8]) {
  if constexpr (kMatrix) out[0] = static_cast<sum_t<T>>(*p);
  else load8<kVector>(p, count, out);
}

template <bool kMatrix, bool kVector, typename T>
__device__ __forceinline__ void store(T* p, int count, const sum_t<T> (&in)[kMatrix ? 1 : 8]) {
  if constexpr (kMatrix) *p = static_cast<T>(in[0]);
  else store8<kVector>(p, count, in);
}

// --- sums over a channel ---------------------------------------------------------------------------------------------------------------
// Every thread gets the sums of its channel over the block, in a fixed order.
template <int K, bool kMatrix, typename A>
__device__ __forceinline__ void channel_sums(A (&v)[K]) {
  constexpr int kColumns = kMatrix ? 32 : 1;
  GK_SHARED(A, partial, [kWarps][kColumns][K]);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, column = kMatrix ? lane : 0;
  if constexpr (!kMatrix) warp_sum<K>(v);
  __syncthreads();  // the sums before these have been read
  if (lane < kColumns)
    for (int k = 0; k < K; ++k) partial[warp][column][k] = v[k];
  __syncthreads();
  for (int k = 0; k < K; ++k) {
    v[k] = A(0);
    for (int w = 0; w < kWarps; ++w) v[k] += partial[w][column][k];
  }
}

// partials [sums, shares, C], from its `first` sum on
template <int K, bool kMatrix, typename A>
__device__ __forceinline__ void put_sums(const A (&v)[K], A* partials, int first, const Space& s) {
  const std::int64_t channel = my_channel<kMatrix>();
  if (threadIdx.x < (kMatrix ? 32u : 1u) && channel < s.channels)
    for (int k = 0; k < K; ++k) partials[((first + k) * static_cast<std::int64_t>(gridDim.y) + blockIdx.y) * s.channels + channel] = v[k];
}

template <int K, bool kMatrix, typename A>
__device__ __forceinline__ void get_sums(A (&v)[K], const A* partials, int first, const Space& s) {
  constexpr int kColumns = kMatrix ? 32 : 1;
  GK_SHARED(A, total, [kColumns][K]);
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (thread < kColumns * K) {
    const int k = thread / kColumns, column = thread % kColumns;
    const std::int64_t channel = static_cast<std::int64_t>(blockIdx.x) * kColumns + column;
    A sum = 0;
    if (channel < s.channels)
      for (unsigned j = 0; j < gridDim.y; ++j) sum += partials[((first + k) * static_cast<std::int64_t>(gridDim.y) + j) * s.channels + channel];
    total[column][k] = sum;
  }
  __syncthreads();
  for (int k = 0; k < K; ++k) v[k] = total[kMatrix ? thread % 32 : 0][k];
}

// --- kernels -----------------------------------------------------------------------------------------------------------------------------
template <typename A>
struct Parameters {
  const A *mean, *var, *weight, *bias;  // weight and bias may be null
  A eps, slope;
};

// What a thread needs of its channel.
template <typename A>
struct Channel {
  A mean, weight, r, scale, bias;
};

template <bool kMatrix, typename A>
__device__ __forceinline__ Channel<A> channel_of(const Parameters<A>& p, A mean, A var, const Space& s) {
  const std::int64_t c = my_channel<kMatrix>();
  const bool exists = c < s.channels;
  const A weight = p.weight != nullptr && exists ? p.weight[c] : A(1), r = bn_rstd(var, p.eps);
  return {mean, weight, r, weight * r, p.bias != nullptr && exists ? p.bias[c] : A(0)};
}

template <bool kMatrix, typename A>
__device__ __forceinline__ Channel<A> channel_of(const Parameters<A>& p, const Space& s) {
  const std::int64_t c = my_channel<kMatrix>();
  return channel_of<kMatrix>(p, c < s.channels ? p.mean[c] : A(0), c < s.channels ? p.var[c] : A(1), s);
}

template <bool kMatrix, bool kVector, typename T>
__device__ __forceinline__ void normalise(const T* x, T* y, const Channel<sum_t<T>>& f, sum_t<T> slope, const Space& s) {
  for_groups<kMatrix>(s, [&](std::int64_t at, int count) {
    sum_t<T> v[kMatrix ? 1 : 8];
    load<kMatrix, kVector>(x + at, count, v);
    for (auto& e : v) e = lrelu((e - f.mean) * f.scale + f.bias, slope);
    store<kMatrix, kVector>(y + at, count, v);
  });
}

// Phases: 1 sums, 2 sums of squares about the mean, 3 the rest. parameters.mean and .var are not read. running_* may be null.
template <typename T, bool kVector, bool kMatrix>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(const T* __restrict__ x, Parameters<sum_t<T>> p, sum_t<T>* __restrict__ running_mean, sum_t<T>* __restrict__ running_var,
                   T* __restrict__ y, sum_t<T>* __restrict__ mean, sum_t<T>* __restrict__ var, sum_t<T>* __restrict__ partials, Space s,
                   sum_t<T> momentum, int phase) {
  using A = sum_t<T>;
  const A n = static_cast<A>(s.batch * s.space);
  const std::int64_t c = my_channel<kMatrix>();
  const A first = c < s.channels ? static_cast<A>(x[c * s.space]) : A(0);  // sums of differences keep their digits
  A sum[1] = {A(0)};
  if (phase < 2) {
    for_groups<kMatrix>(s, [&](std::int64_t at, int count) {
      A v[kMatrix ? 1 : 8];
      load<kMatrix, kVector>(x + at, count, v);
      for (int k = 0; k < (kMatrix ? 1 : 8); ++k) sum[0] += k < count ? v[k] - first : A(0);
    });
    channel_sums<1, kMatrix>(sum);
    if (phase == 1) return put_sums<1, kMatrix>(sum, partials, 0, s);
  } else {
    get_sums<1, kMatrix>(sum, partials, 0, s);
  }
  const A m = first + sum[0] / n;
  A squares[1] = {A(0)};
  if (phase < 3) {
    for_groups<kMatrix>(s, [&](std::int64_t at, int count) {
      A v[kMatrix ? 1 : 8];
      load<kMatrix, kVector>(x + at, count, v);
      for (int k = 0; k < (kMatrix ? 1 : 8); ++k) squares[0] += k < count ? (v[k] - m) * (v[k] - m) : A(0);
    });
    channel_sums<1, kMatrix>(squares);
    if (phase == 2) return put_sums<1, kMatrix>(squares, partials, 1, s);
  } else {
    get_sums<1, kMatrix>(squares, partials, 1, s);
  }
  const A v = squares[0] / n;
  if (owns_channel<kMatrix>() && c < s.channels) {
    mean[c] = m;
    var[c] = v;
    if (running_mean != nullptr) running_mean[c] = momentum * m + (A(1) - momentum) * running_mean[c];
    if (running_var != nullptr) running_var[c] = momentum * (squares[0] / (n - A(1))) + (A(1) - momentum) * running_var[c];
  }
  normalise<kMatrix, kVector>(x, y, channel_of<kMatrix>(p, m, v, s), p.slope, s);
}

template <typename T, bool kVector, bool kMatrix>
__global__ void __launch_bounds__(kThreads, 2) eval_kernel(const T* __restrict__ x, Parameters<sum_t<T>> p, T* __restrict__ y, Space s) {
  normalise<kMatrix, kVector>(x, y, channel_of<kMatrix>(p, s), p.slope, s);
}

// Phases: 1 the sums of g and g c, 2 the rest.
template <typename T, bool kVector, bool kMatrix>
__global__ void __launch_bounds__(kThreads, 2)
    grad_kernel(const T* __restrict__ dy, const T* __restrict__ x, Parameters<sum_t<T>> p, T* __restrict__ dx, sum_t<T>* __restrict__ dweight,
                sum_t<T>* __restrict__ dbias, sum_t<T>* __restrict__ partials, Space s, bool training, int phase) {
  using A = sum_t<T>;
  constexpr int kGroup = kMatrix ? 1 : 8;
  const Channel<A> f = channel_of<kMatrix>(p, s);
  A sum[2] = {};
  if (phase < 2) {
    for_groups<kMatrix>(s, [&](std::int64_t at, int count) {
      A v[kGroup], d[kGroup];
      load<kMatrix, kVector>(x + at, count, v);
      load<kMatrix, kVector>(dy + at, count, d);  // 0 beyond the count
      for (int k = 0; k < kGroup; ++k) {
        const A c = v[k] - f.mean, g = d[k] * lrelu_slope(c * f.scale + f.bias, p.slope);
        sum[0] += g;
        sum[1] += g * c;
      }
    });
    channel_sums<2, kMatrix>(sum);
    if (phase == 1) return put_sums<2, kMatrix>(sum, partials, 0, s);
  } else {
    get_sums<2, kMatrix>(sum, partials, 0, s);
  }
  const std::int64_t channel = my_channel<kMatrix>();
  if (owns_channel<kMatrix>() && channel < s.channels) {
    dweight[channel] = f.r * sum[1];
    dbias[channel] = sum[0];
  }
  const BnGrad<A> a = bn_grad(f.weight, f.r, sum[0], sum[1], static_cast<A>(s.batch * s.space), training);
  for_groups<kMatrix>(s, [&](std::int64_t at, int count) {
    A v[kGroup], d[kGroup];
    load<kMatrix, kVector>(x + at, count, v);
    load<kMatrix, kVector>(dy + at, count, d);
    for (int k = 0; k < kGroup; ++k) {
      const A c = v[k] - f.mean, g = d[k] * lrelu_slope(c * f.scale + f.bias, p.slope);
      v[k] = g * a.g_ + bn_times(c, a.c_) + a.one_;
    }
    store<kMatrix, kVector>(dx + at, count, v);
  });
}

// Phases: 1 the five sums, 2 the rest. ddweight and ddbias may be null.
template <typename T, bool kVector, bool kMatrix>
__global__ void __launch_bounds__(kThreads, 2)
    grad2_kernel(const T* __restrict__ ddx, const sum_t<T>* __restrict__ ddweight, const sum_t<T>* __restrict__ ddbias, const T* __restrict__ dy,
                 const T* __restrict__ x, Parameters<sum_t<T>> p, T* __restrict__ ddy, T* __restrict__ dx, sum_t<T>* __restrict__ dweight,
                 sum_t<T>* __restrict__ partials, Space s, bool training, int phase) {
  using A = sum_t<T>;
  constexpr int kGroup = kMatrix ? 1 : 8;
  const Channel<A> f = channel_of<kMatrix>(p, s);
  A sum[5] = {};
  if (phase < 2) {
    for_groups<kMatrix>(s, [&](std::int64_t at, int count) {
      A v[kGroup], d[kGroup], u[kGroup];
      load<kMatrix, kVector>(x + at, count, v);
      load<kMatrix, kVector>(dy + at, count, d);  // 0 beyond the count
      load<kMatrix, kVector>(ddx + at, count, u);
      for (int k = 0; k < kGroup; ++k) {
        const A c = v[k] - f.mean, g = d[k] * lrelu_slope(c * f.scale + f.bias, p.slope);
        sum[0] += u[k];
        sum[1] += u[k] * c;
        sum[2] += g;
        sum[3] += g * c;
        sum[4] += u[k] * g;
      }
    });
    channel_sums<5, kMatrix>(sum);
    if (phase == 1) return put_sums<5, kMatrix>(sum, partials, 0, s);
  } else {
    get_sums<5, kMatrix>(sum, partials, 0, s);
  }
  const std::int64_t channel = my_channel<kMatrix>();
  const bool exists = channel < s.channels;
  const BnGrad2<A> a = bn_grad2(f.weight, f.r, ddweight != nullptr && exists ? ddweight[channel] : A(0), ddbias != nullptr && exists ? ddbias[channel] : A(0),
                                BnSums2<A>{sum[0], sum[1], sum[2], sum[3], sum[4]}, static_cast<A>(s.batch * s.space), training);
  if (owns_channel<kMatrix>() && exists) dweight[channel] = a.dweight;
  for_groups<kMatrix>(s, [&](std::int64_t at, int count) {
    A v[kGroup], d[kGroup], u[kGroup];
    load<kMatrix, kVector>(x + at, count, v);
    load<kMatrix, kVector>(dy + at, count, d);
    load<kMatrix, kVector>(ddx + at, count, u);
    for (int k = 0; k < kGroup; ++k) {
      const A c = v[k] - f.mean, m = lrelu_slope(c * f.scale + f.bias, p.slope), along = u[k];
      u[k] = m * (along * a.dy_p + bn_times(c, a.dy_c) + a.dy_one);
      v[k] = bn_times(along, a.x_p) + bn_times(d[k] * m, a.x_g) + bn_times(c, a.x_c) + a.x_one;
    }
    store<kMatrix, kVector>(ddy + at, count, u);
    store<kMatrix, kVector>(dx + at, count, v);
  });
}

// --- launchers over raw pointers -----------------------------------------------------------------------------------------------------------
inline std::int64_t channel_blocks(const Space& s) { return s.space == 1 ? ceil_div(s.channels, 32) : s.channels; }

inline std::int64_t block_elements(const Space& s) { return s.batch * (s.space == 1 ? 32 : s.space); }

inline std::int64_t bn_shares(const Space& s) {
  if (s.batch * s.channels * s.space == 0) return 1;
  const std::int64_t by_blocks = ceil_div(kFillBlocks, channel_blocks(s)), by_size = block_elements(s) / kShareElements;
  const std::int64_t shares = by_blocks < by_size ? by_blocks : by_size;
  return shares < 1 ? 1 : shares > kMaxShares ? kMaxShares : shares;
}

template <typename... P>
bool vectorised(const Space& s, const P*... p) {
  return s.space != 1 && s.space % 8 == 0 && (aligned16(p) && ...);
}

// Launches kernel<T, kVector, kMatrix> once (phase 0), or phases 1 to `last` one after another.
#define GK_BN_PHASES(kernel, vector, last, s, stream, ...)                                                                \
  do {                                                                                                                    \
    const std::int64_t shares = bn_shares(s);                                                                             \
    const dim3 grid(static_cast<unsigned>(channel_blocks(s)), static_cast<unsigned>(shares));                             \
    for (int phase = shares > 1 ? 1 : kAll; phase <= (shares > 1 ? (last) : kAll); ++phase) {                             \
      if ((s).space == 1) GK_LAUNCH((kernel<T, false, true>), grid, kThreads, stream, __VA_ARGS__, phase);                \
      else if (vector) GK_LAUNCH((kernel<T, true, false>), grid, kThreads, stream, __VA_ARGS__, phase);                   \
      else GK_LAUNCH((kernel<T, false, false>), grid, kThreads, stream, __VA_ARGS__, phase);                              \
    }                                                                                                                     \
  } while (0)

// partials [2, bn_shares(s), C] is scratch memory, used when there are several shares. Nothing is launched for no elements.
template <typename T>
void launch_forward(const T* x, const Parameters<sum_t<T>>& p, sum_t<T>* running_mean, sum_t<T>* running_var, T* y, sum_t<T>* mean, sum_t<T>* var,
                    sum_t<T>* partials, const Space& s, double momentum, cudaStream_t stream) {
  if (s.batch * s.channels * s.space == 0) return;
  GK_BN_PHASES(forward_kernel, vectorised(s, x, y), 3, s, stream, x, p, running_mean, running_var, y, mean, var, partials, s,
               static_cast<sum_t<T>>(momentum));
}

template <typename T>
void launch_eval(const T* x, const Parameters<sum_t<T>>& p, T* y, const Space& s, cudaStream_t stream) {
  if (s.batch * s.channels * s.space == 0) return;
  const std::int64_t parts = ceil_div(block_elements(s), kEvalElements), shares = parts < kEvalShares ? parts : kEvalShares;
  const dim3 grid(static_cast<unsigned>(channel_blocks(s)), static_cast<unsigned>(shares));
  if (s.space == 1) GK_LAUNCH((eval_kernel<T, false, true>), grid, kThreads, stream, x, p, y, s);
  else if (vectorised(s, x, y)) GK_LAUNCH((eval_kernel<T, true, false>), grid, kThreads, stream, x, p, y, s);
  else GK_LAUNCH((eval_kernel<T, false, false>), grid, kThreads, stream, x, p, y, s);
}

// partials [2, bn_shares(s), C]
template <typename T>
void launch_grad(const T* dy, const T* x, const Parameters<sum_t<T>>& p, T* dx, sum_t<T>* dweight, sum_t<T>* dbias, sum_t<T>* partials, const Space& s,
                 bool training, cudaStream_t stream) {
  if (s.batch * s.channels * s.space == 0) return;
  GK_BN_PHASES(grad_kernel, vectorised(s, dy, x, dx), 2, s, stream, dy, x, p, dx, dweight, dbias, partials, s, training);
}

// partials [5, bn_shares(s), C]
template <typename T>
void launch_grad2(const T* ddx, const sum_t<T>* ddweight, const sum_t<T>* ddbias, const T* dy, const T* x, const Parameters<sum_t<T>>& p, T* ddy, T* dx,
                  sum_t<T>* dweight, sum_t<T>* partials, const Space& s, bool training, cudaStream_t stream) {
  if (s.batch * s.channels * s.space == 0) return;
  GK_BN_PHASES(grad2_kernel, vectorised(s, ddx, dy, x, ddy, dx), 2, s, stream, ddx, ddweight, ddbias, dy, x, p, ddy, dx, dweight, partials, s, training);
}

#ifndef GK_SIM
constexpr const char* kForward = "bn_lrelu";
constexpr const char* kEval = "bn_lrelu_eval";
constexpr const char* kGrad = "bn_lrelu_grad";
constexpr const char* kGrad2 = "bn_lrelu_grad2";

Space space_of(const char* op, const Tensor& x) {
  check_contiguous(op, "x", x);
  check(x.dim() >= 2, op, "x", "have at least two dimensions");
  Space s{x.size(0), x.size(1), 1};
  for (std::int64_t d = 2; d < x.dim(); ++d) s.space *= x.size(d);
  return s;
}

void check_channels(const char* op, const char* argument, const std::optional<Tensor>& t, const Tensor& x, const Space& s) {
  if (!t.has_value()) return;
  check(t->scalar_type() == accumulate_dtype(x.scalar_type()), op, argument, "be in the accumulation dtype");
  check(t->is_cuda() && t->get_device_index() == x.get_device_index(), op, argument, "be on the device of x");
  check(t->numel() == s.channels, op, argument, "have one element a channel");
  check_contiguous(op, argument, *t);
}

void check_same(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  check_like(op, argument, t, x);
  check(t.numel() == x.numel(), op, argument, "have the shape of x");
}

void check_parameters(const char* op, const std::optional<Tensor>& mean, const std::optional<Tensor>& var, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, const Tensor& x, const Space& s) {
  check_channels(op, "mean", mean, x, s);
  check_channels(op, "var", var, x, s);
  check_channels(op, "weight", weight, x, s);
  check_channels(op, "bias", bias, x, s);
}

template <typename A>
Parameters<A> parameters_of(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                            double slope) {
  return {data<A>(mean), data<A>(var), data_or_null<A>(weight), data_or_null<A>(bias), static_cast<A>(eps), static_cast<A>(slope)};
}

Tensor new_channels(const Tensor& x, std::int64_t sums, const Space& s) {
  return torch::stable::new_empty(x, {sums, s.channels}, accumulate_dtype(x.scalar_type()));
}

Tensor new_channels(const Tensor& x, const Space& s) { return torch::stable::new_empty(x, {s.channels}, accumulate_dtype(x.scalar_type())); }

template <typename A>
A* mutable_or_null(std::optional<Tensor>& t) {
  return t.has_value() ? mutable_data<A>(*t) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                           std::optional<Tensor> running_mean, std::optional<Tensor> running_var, double momentum, double eps,
                                           double slope) {
  const Space s = space_of(kForward, x);
  check_parameters(kForward, running_mean, running_var, weight, bias, x, s);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x), mean = new_channels(x, s), var = new_channels(x, s), partials = new_channels(x, 2 * bn_shares(s), s);
  if (x.numel() == 0) {
    mean = torch::stable::fill_(mean, 0.0);
    var = torch::stable::fill_(var, 1.0);
  }
  dispatch_floating(kForward, x.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    using A = sum_t<T>;
    launch_forward<T>(data<T>(x), parameters_of<A>(mean, var, weight, bias, eps, slope), mutable_or_null<A>(running_mean), mutable_or_null<A>(running_var),
                      mutable_data<T>(y), mutable_data<A>(mean), mutable_data<A>(var), mutable_data<A>(partials), s, momentum, current_stream(x));
  });
  return {y, mean, var};
}

Tensor evaluate(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                double slope) {
  const Space s = space_of(kEval, x);
  check_parameters(kEval, mean, var, weight, bias, x, s);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  dispatch_floating(kEval, x.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    launch_eval<T>(data<T>(x), parameters_of<sum_t<T>>(mean, var, weight, bias, eps, slope), mutable_data<T>(y), s, current_stream(x));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> grad(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& bias, double eps, double slope, bool training) {
  const Space s = space_of(kGrad, x);
  check_same(kGrad, "dy", dy, x);
  check_parameters(kGrad, mean, var, weight, bias, x, s);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x), dweight = new_channels(x, s), dbias = new_channels(x, s), partials = new_channels(x, 2 * bn_shares(s), s);
  if (x.numel() == 0) {
    dweight = torch::stable::fill_(dweight, 0.0);
    dbias = torch::stable::fill_(dbias, 0.0);
  }
  dispatch_floating(kGrad, x.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    using A = sum_t<T>;
    launch_grad<T>(data<T>(dy), data<T>(x), parameters_of<A>(mean, var, weight, bias, eps, slope), mutable_data<T>(dx), mutable_data<A>(dweight),
                   mutable_data<A>(dbias), mutable_data<A>(partials), s, training, current_stream(x));
  });
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> grad2(const Tensor& ddx, const std::optional<Tensor>& ddweight, const std::optional<Tensor>& ddbias, const Tensor& dy,
                                         const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                                         const std::optional<Tensor>& bias, double eps, double slope, bool training) {
  const Space s = space_of(kGrad2, x);
  check_same(kGrad2, "ddx", ddx, x);
  check_same(kGrad2, "dy", dy, x);
  check_channels(kGrad2, "ddweight", ddweight, x, s);
  check_channels(kGrad2, "ddbias", ddbias, x, s);
  check_parameters(kGrad2, mean, var, weight, bias, x, s);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor ddy = torch::stable::empty_like(x), dx = torch::stable::empty_like(x), dweight = new_channels(x, s), partials = new_channels(x, 5 * bn_shares(s), s);
  if (x.numel() == 0) dweight = torch::stable::fill_(dweight, 0.0);
  dispatch_floating(kGrad2, x.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    using A = sum_t<T>;
    launch_grad2<T>(data<T>(ddx), data_or_null<A>(ddweight), data_or_null<A>(ddbias), data<T>(dy), data<T>(x),
                    parameters_of<A>(mean, var, weight, bias, eps, slope), mutable_data<T>(ddy), mutable_data<T>(dx), mutable_data<A>(dweight),
                    mutable_data<A>(partials), s, training, current_stream(x));
  });
  return {ddy, dx, dweight};
}
#endif

}  // namespace

#ifndef GK_SIM
STABLE_TORCH_LIBRARY_IMPL(gankern, CUDA, m) {
  m.impl("bn_lrelu", TORCH_BOX(&forward));
  m.impl("bn_lrelu_eval", TORCH_BOX(&evaluate));
  m.impl("bn_lrelu_grad", TORCH_BOX(&grad));
  m.impl("bn_lrelu_grad2", TORCH_BOX(&grad2));
}
#endif

}  // namespace gankern
