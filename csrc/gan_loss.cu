// gan_loss on CUDA: loss, statistics and gradient of both halves in one pass, and the second-order kernel. The contracts stand in
// gankern/ops/gan_loss.py. One launch of one block up to kOneBlock logits; beyond, many blocks that leave partial sums and one that adds them
// (relative to averages: two more launches, for the means before and their share of the gradient after).
#include "launch.h"

namespace gankern {
namespace {

constexpr int kThreads = 512;
constexpr std::int64_t kOneBlock = 4096;
constexpr int kEach = 1024;  // logits a block takes when there are many blocks

enum Reduction : std::int64_t { kNone = 0, kMean = 1, kSum = 2 };
enum Relative : std::int64_t { kNo = 0, kPair = 1, kAverage = 2 };  // in the order of RELATIVE in gankern/ops/_objectives.py
enum Sum { kLossReal, kLossFake, kSigmoidReal, kSigmoidFake, kRight, kSlopeReal, kSlopeFake, kSums };

// What one half pays. scale: weight, divided by the number of logits of the half when the reduction is the mean.
template <typename A>
struct Part {
  const A* targets;  // one each, or null: target for all
  A target, weight, scale;
  int term;
};

// The logits: n_real of the real half at `real`, the others at `fake`. relative: what the terms take (Relative).
template <typename T>
struct Halves {
  const T *real, *fake;
  std::int64_t n_real, n;
  Part<sum_t<T>> real_part, fake_part;
  std::int64_t relative;
};

// Logit i of n, with what its half pays; mean: of the other half, when the terms are relative to it
template <typename T>
struct Logit {
  using A = sum_t<T>;
  bool fake;
  std::int64_t j;  // its place in its half
  A a, weight, scale;
  Term<A> term;

  __device__ __forceinline__ Logit(const Halves<T>& h, std::int64_t i, A mean_real = 0, A mean_fake = 0)
      : fake(i >= h.n_real), j(fake ? i - h.n_real : i) {
    const A* targets = fake ? h.fake_part.targets : h.real_part.targets;  // field by field: a reference to one of the parts is a stack frame
    const A t = targets != nullptr ? targets[j] : fake ? h.fake_part.target : h.real_part.target;
    a = static_cast<A>((fake ? h.fake : h.real)[j]);
    weight = fake ? h.fake_part.weight : h.real_part.weight;
    scale = fake ? h.fake_part.scale : h.real_part.scale;
    const A origin = h.relative == kPair ? static_cast<A>((fake ? h.real : h.fake)[j]) : fake ? mean_real : mean_fake;
    term = term_of(fake ? h.fake_part.term : h.real_part.term, h.relative == kNo ? a : a - origin, t);
  }

  __device__ __forceinline__ A slope() const { return weight != 0 ? scale * term.slope : A(0); }
};

// Mean from a sum over n logits: 0 / 0, NaN, when there are none
template <typename A>
__device__ __forceinline__ A mean_of(A sum, std::int64_t n) {
  return sum / static_cast<A>(n);
}

// From the sums over all logits: stats [3], the loss [1] unless the reduction is none, and what averages take off the gradient of the halves
template <typename T>
__device__ __forceinline__ void finish(const Halves<T>& h, const sum_t<T> (&sums)[kSums], std::int64_t reduction, sum_t<T>* loss, sum_t<T>* stats,
                                       sum_t<T>* shift) {
  const std::int64_t n_fake = h.n - h.n_real;
  stats[0] = mean_of(sums[kSigmoidReal], h.n_real);
  stats[1] = mean_of(sums[kSigmoidFake], n_fake);
  stats[2] = mean_of(sums[kRight], h.n);
  if (reduction == kNone) return;
  if (h.relative == kAverage) {
    shift[0] = mean_of(sums[kSlopeFake], h.n_real);
    shift[1] = mean_of(sums[kSlopeReal], n_fake);
  }
  sum_t<T> value = 0;
  if (h.real_part.weight != 0) value += reduction == kMean ? mean_of(sums[kLossReal], h.n_real) : sums[kLossReal];
  if (h.fake_part.weight != 0) value += reduction == kMean ? mean_of(sums[kLossFake], n_fake) : sums[kLossFake];
  *loss = value;
}

// The first K of the sums of a block, which thread 0 has, in every thread; after block_sum<K> of all threads.
template <int K, typename A>
__device__ __forceinline__ void broadcast(A (&v)[K]) {
  GK_SHARED(A, shared, [K]);
  if (threadIdx.x == 0)
    for (int k = 0; k < K; ++k) shared[k] = v[k];
  __syncthreads();
  for (int k = 0; k < K; ++k) v[k] = shared[k];
}

// The means of both halves, in every thread of the block: from the logits if it is the only one, else from parts [rows, 2] of their sums
template <typename T>
__device__ __forceinline__ void means(const Halves<T>& h, const sum_t<T>* parts, std::int64_t rows, sum_t<T> (&mean)[2]) {
  mean[0] = mean[1] = 0;
  if (parts == nullptr) {
    for (std::int64_t i = threadIdx.x; i < h.n; i += blockDim.x) {
      const bool fake = i >= h.n_real;
      const sum_t<T> a = static_cast<sum_t<T>>(fake ? h.fake[i - h.n_real] : h.real[i]);
      mean[0] += fake ? sum_t<T>(0) : a;
      mean[1] += fake ? a : sum_t<T>(0);
    }
  } else {
    for (std::int64_t i = threadIdx.x; i < rows; i += blockDim.x)
      for (int k = 0; k < 2; ++k) mean[k] += parts[i * 2 + k];
  }
  block_sum<2>(mean);
  mean[0] = mean_of(mean[0], h.n_real);
  mean[1] = mean_of(mean[1], h.n - h.n_real);
  broadcast<2>(mean);
}

// parts [blocks, 2]: what each block adds up of the real and of the fake logits
template <typename T>
__global__ void __launch_bounds__(kThreads) mean_kernel(Halves<T> h, sum_t<T>* __restrict__ parts) {
  sum_t<T> sums[2] = {};
  for (std::int64_t i = grid_thread(); i < h.n; i += grid_stride()) {
    const bool fake = i >= h.n_real;
    const sum_t<T> a = static_cast<sum_t<T>>(fake ? h.fake[i - h.n_real] : h.real[i]);
    sums[0] += fake ? sum_t<T>(0) : a;
    sums[1] += fake ? a : sum_t<T>(0);
  }
  block_sum<2>(sums);
  if (threadIdx.x != 0) return;
  for (int k = 0; k < 2; ++k) parts[static_cast<std::int64_t>(blockIdx.x) * 2 + k] = sums[k];
}

// The gradient of logit i loses its half's share of the slopes of the other half.
template <typename T>
__device__ __forceinline__ void shift_gradient(const Halves<T>& h, std::int64_t i, sum_t<T> shift_real, sum_t<T> shift_fake, sum_t<T>* grad_real,
                                               sum_t<T>* grad_fake) {
  if (i < h.n_real) grad_real[i] -= shift_real;
  else grad_fake[i - h.n_real] -= shift_fake;
}

// grad_real and grad_fake have a value for each logit of their half; loss [n] when the reduction is none. The only block finishes; one of
// many leaves its sums in partials [blocks, kSums], and has the sums of the logits in parts [blocks, 2] where averages are needed.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    loss_kernel(Halves<T> h, std::int64_t reduction, sum_t<T>* __restrict__ loss, sum_t<T>* __restrict__ stats, sum_t<T>* __restrict__ grad_real,
                sum_t<T>* __restrict__ grad_fake, sum_t<T>* __restrict__ partials, const sum_t<T>* __restrict__ parts) {
  using A = sum_t<T>;
  A sums[kSums] = {}, mean[2] = {};
  if (h.relative == kAverage) means(h, parts, gridDim.x, mean);
  for (std::int64_t i = grid_thread(); i < h.n; i += grid_stride()) {
    const Logit<T> l(h, i, mean[0], mean[1]);
    const A value = l.weight != 0 ? l.weight * l.term.value : A(0);
    (l.fake ? grad_fake : grad_real)[l.j] = l.slope();
    if (reduction == kNone) loss[i] = value;
    sums[kLossReal] += l.fake ? A(0) : value;
    sums[kLossFake] += l.fake ? value : A(0);
    const A d = sigmoid(l.a);
    sums[kSigmoidReal] += l.fake ? A(0) : d;
    sums[kSigmoidFake] += l.fake ? d : A(0);
    sums[kRight] += (l.fake ? l.a <= 0 : l.a > 0) ? A(1) : A(0);
  }
  if (h.relative == kAverage) {  // each thread reads what it wrote: the pass above needs its registers
    for (std::int64_t i = grid_thread(); i < h.n; i += grid_stride()) {
      if (i < h.n_real) sums[kSlopeReal] += grad_real[i];
      else sums[kSlopeFake] += grad_fake[i - h.n_real];
    }
  }
  block_sum<kSums>(sums);
  A shift[2] = {};
  if (threadIdx.x == 0) {
    if (gridDim.x == 1) finish(h, sums, reduction, loss, stats, shift);
    else
      for (int k = 0; k < kSums; ++k) partials[static_cast<std::int64_t>(blockIdx.x) * kSums + k] = sums[k];
  }
  if (h.relative == kNo || reduction == kNone) return;
  // from the slopes in what the terms take to the gradient, each thread where it wrote; a pass of its own needs fewer registers
  if (h.relative == kPair) {
    for (std::int64_t i = grid_thread(); i < h.n; i += grid_stride()) {
      const bool fake = i >= h.n_real;
      const std::int64_t j = fake ? i - h.n_real : i;
      (fake ? grad_fake : grad_real)[j] -= Logit<T>(h, fake ? j : h.n_real + j).slope();
    }
  } else if (gridDim.x == 1) {
    broadcast<2>(shift);
    for (std::int64_t i = threadIdx.x; i < h.n; i += blockDim.x) shift_gradient(h, i, shift[0], shift[1], grad_real, grad_fake);
  }
}

// One block: loss and stats from partials [blocks, kSums]; what averages take off returns in its first two
template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Halves<T> h, std::int64_t reduction, sum_t<T>* __restrict__ partials, std::int64_t blocks, sum_t<T>* __restrict__ loss,
                  sum_t<T>* __restrict__ stats) {
  sum_t<T> sums[kSums] = {};
  for (std::int64_t i = threadIdx.x; i < blocks; i += blockDim.x)
    for (int k = 0; k < kSums; ++k) sums[k] += partials[i * kSums + k];
  block_sum<kSums>(sums);  // after its barrier nobody reads partials
  if (threadIdx.x == 0) finish(h, sums, reduction, loss, stats, partials);
}

// The part of the gradient that passes through the means; partials as finish_kernel leaves them
template <typename T>
__global__ void __launch_bounds__(kThreads)
    shift_kernel(Halves<T> h, const sum_t<T>* __restrict__ partials, sum_t<T>* __restrict__ grad_real, sum_t<T>* __restrict__ grad_fake) {
  for (std::int64_t i = grid_thread(); i < h.n; i += grid_stride())
    shift_gradient(h, i, partials[0], partials[1], grad_real, grad_fake);
}

// d = g * c * curvature, scaled as the gradient is, c and d halved as the logits are; g [n] or, when !g_each, [1]
template <typename T>
__global__ void __launch_bounds__(kThreads)
    grad2_kernel(Halves<T> h, const sum_t<T>* __restrict__ g, bool g_each, const T* __restrict__ ca, const T* __restrict__ cb, T* __restrict__ da,
                 T* __restrict__ db) {
  for (std::int64_t i = grid_thread(); i < h.n; i += grid_stride()) {
    const Logit<T> l(h, i);
    const sum_t<T> c = static_cast<sum_t<T>>((l.fake ? cb : ca)[l.j]);
    (l.fake ? db : da)[l.j] = static_cast<T>(l.weight != 0 ? g[g_each ? i : 0] * c * (l.scale * l.term.curvature) : sum_t<T>(0));
  }
}

// --- launchers over raw pointers -----------------------------------------------------------------------------------------------
inline std::int64_t loss_blocks(std::int64_t n) { return n <= kOneBlock ? 1 : grid_for(n, kEach); }

// partials [loss_blocks(n), kSums + 2] is used when there is more than one block
template <typename T>
void launch_loss(const Halves<T>& h, std::int64_t reduction, sum_t<T>* loss, sum_t<T>* stats, sum_t<T>* grad_real, sum_t<T>* grad_fake,
                 sum_t<T>* partials, cudaStream_t stream) {
  const std::int64_t blocks = loss_blocks(h.n), warps = ceil_div(h.n, 32);
  const int threads = warps >= kThreads / 32 ? kThreads : warps > 1 ? static_cast<int>(warps) * 32 : 32;
  const unsigned grid = static_cast<unsigned>(blocks);
  sum_t<T>* parts = blocks > 1 ? partials + blocks * kSums : nullptr;
  const bool averages = blocks > 1 && h.relative == kAverage;
  if (averages) GK_LAUNCH(mean_kernel<T>, grid, kThreads, stream, h, parts);
  GK_LAUNCH(loss_kernel<T>, grid, threads, stream, h, reduction, loss, stats, grad_real, grad_fake, partials, parts);
  if (blocks > 1) GK_LAUNCH(finish_kernel<T>, 1, kThreads, stream, h, reduction, partials, blocks, loss, stats);
  if (averages && reduction != kNone) GK_LAUNCH(shift_kernel<T>, grid, kThreads, stream, h, partials, grad_real, grad_fake);
}

template <typename T>
void launch_grad2(const Halves<T>& h, const sum_t<T>* g, bool g_each, const T* ca, const T* cb, T* da, T* db, cudaStream_t stream) {
  constexpr int threads = 128;
  if (h.n > 0) GK_LAUNCH(grad2_kernel<T>, grid_for(h.n, threads), threads, stream, h, g, g_each, ca, cb, da, db);
}

template <typename A>
Part<A> make_part(std::int64_t term, double weight, double target, const A* targets, std::int64_t n, std::int64_t reduction) {
  const double scale = reduction == kMean && n > 0 ? weight / static_cast<double>(n) : weight;
  return {targets, static_cast<A>(target), static_cast<A>(weight), static_cast<A>(scale), static_cast<int>(term)};
}

#ifndef GK_SIM
using Maybe = std::optional<Tensor>;

// The logits as the caller gave them, checked; T comes later.
struct Arguments {
  const Tensor& a;
  const Maybe& b;
  std::int64_t n_real, n;

  Arguments(const char* op, const Tensor& a_, const Maybe& b_, std::int64_t n_real_)
      : a(a_), b(b_), n_real(b_.has_value() ? a_.numel() : n_real_), n(a_.numel() + (b_.has_value() ? b_->numel() : 0)) {
    check_contiguous(op, "a", a);
    if (b.has_value()) check_like(op, "b", *b, a);
    check(n_real >= 0 && n_real <= n, op, "n_real", "be between 0 and the number of logits");
  }

  void check_term(const char* op, std::int64_t term, const Maybe& targets, std::int64_t count) const {
    check(term >= 0 && term < kTerms, op, "term", "be a known code");
    if (targets.has_value()) check_values(op, "targets", *targets, count);
  }

  // `count` values in the accumulation dtype, contiguous, on the device of a
  void check_values(const char* op, const char* argument, const Tensor& t, std::int64_t count) const {
    check(t.scalar_type() == accumulate_dtype(a.scalar_type()) && t.numel() == count, op, argument, "have one value a logit, in the accumulation dtype");
    check(t.is_cuda() && t.get_device_index() == a.get_device_index(), op, argument, "be on the device of a");
    check_contiguous(op, argument, t);
  }

  template <typename T>
  Halves<T> halves(std::int64_t term_real, double weight_real, double target_real, const Maybe& targets_real, std::int64_t term_fake, double weight_fake,
                   double target_fake, const Maybe& targets_fake, std::int64_t reduction, std::int64_t relative) const {
    using A = sum_t<T>;
    const T* first = data<T>(a);
    return {first, b.has_value() ? data<T>(*b) : first + n_real, n_real, n,
            make_part<A>(term_real, weight_real, target_real, data_or_null<A>(targets_real), n_real, reduction),
            make_part<A>(term_fake, weight_fake, target_fake, data_or_null<A>(targets_fake), n - n_real, reduction), relative};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> gan_loss(const Tensor& a, const Maybe& b, std::int64_t n_real, std::int64_t term_real, double weight_real,
                                            double target_real, const Maybe& targets_real, std::int64_t term_fake, double weight_fake,
                                            double target_fake, const Maybe& targets_fake, std::int64_t reduction, std::int64_t relative) {
  constexpr const char* op = "gan_loss";
  const Arguments in(op, a, b, n_real);
  check(relative >= kNo && relative <= kAverage, op, "relative", "be 0, 1 or 2");
  check(relative != kPair || in.n == 2 * in.n_real, op, "n_real", "be half the number of logits when they pair");
  in.check_term(op, term_real, targets_real, in.n_real);
  in.check_term(op, term_fake, targets_fake, in.n - in.n_real);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const ScalarType dtype = accumulate_dtype(a.scalar_type());
  Tensor loss = reduction == kNone ? torch::stable::new_empty(a, {in.n}, dtype) : torch::stable::new_empty(a, {}, dtype);
  Tensor stats = torch::stable::new_empty(a, {3}, dtype), grad_a = torch::stable::new_empty(a, a.sizes(), dtype);
  Tensor grad_b = b.has_value() ? torch::stable::new_empty(a, b->sizes(), dtype) : torch::stable::new_empty(a, {0}, dtype);
  const std::int64_t blocks = loss_blocks(in.n);
  Maybe partials;
  if (blocks > 1) partials = torch::stable::new_empty(a, {blocks, static_cast<std::int64_t>(kSums) + 2}, dtype);
  dispatch_floating(op, a.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    using A = sum_t<T>;
    launch_loss<T>(in.halves<T>(term_real, weight_real, target_real, targets_real, term_fake, weight_fake, target_fake, targets_fake, reduction,
                                 relative),
                   reduction, mutable_data<A>(loss), mutable_data<A>(stats), mutable_data<A>(grad_a),
                   b.has_value() ? mutable_data<A>(grad_b) : mutable_data<A>(grad_a) + in.n_real,
                   partials.has_value() ? mutable_data<A>(*partials) : nullptr, current_stream(a));
  });
  return {loss, stats, grad_a, grad_b};
}

std::tuple<Tensor, Tensor> gan_loss_grad2(const Tensor& a, const Maybe& b, std::int64_t n_real, std::int64_t term_real, double weight_real,
                                          double target_real, const Maybe& targets_real, std::int64_t term_fake, double weight_fake,
                                          double target_fake, const Maybe& targets_fake, std::int64_t reduction, const Tensor& g, const Tensor& ca,
                                          const Maybe& cb) {
  constexpr const char* op = "gan_loss_grad2";
  const Arguments in(op, a, b, n_real);
  in.check_term(op, term_real, targets_real, in.n_real);
  in.check_term(op, term_fake, targets_fake, in.n - in.n_real);
  check_like(op, "ca", ca, a);
  if (cb.has_value()) check_like(op, "cb", *cb, a);
  check(ca.numel() == a.numel() && cb.has_value() == b.has_value() && (!b.has_value() || cb->numel() == b->numel()), op, "ca and cb",
        "have one value a logit, halved as a and b are");
  const bool g_each = reduction == kNone;
  in.check_values(op, "g", g, g_each ? in.n : 1);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  Tensor da = torch::stable::empty_like(a), db = b.has_value() ? torch::stable::empty_like(*b) : torch::stable::new_empty(a, {0});
  dispatch_floating(op, a.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    using A = sum_t<T>;
    launch_grad2<T>(in.halves<T>(term_real, weight_real, target_real, targets_real, term_fake, weight_fake, target_fake, targets_fake, reduction, kNo),
                    data<A>(g), g_each, data<T>(ca), cb.has_value() ? data<T>(*cb) : data<T>(ca) + in.n_real, mutable_data<T>(da),
                    b.has_value() ? mutable_data<T>(db) : mutable_data<T>(da) + in.n_real, current_stream(a));
  });
  return {da, db};
}
#endif

}  // namespace

#ifndef GK_SIM
STABLE_TORCH_LIBRARY_IMPL(gankern, CUDA, m) {
  m.impl("gan_loss", TORCH_BOX(&gan_loss));
  m.impl("gan_loss_grad2", TORCH_BOX(&gan_loss_grad2));
}
#endif

}  // namespace gankern
