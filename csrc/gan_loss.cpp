// gan_loss on the CPU: loss, statistics and gradient of both halves in one pass. The contracts stand in gankern/ops/gan_loss.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "math.h"

namespace gankern {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kTile = 64, kChunk = 8192;
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// What one half pays: the functor's code, its weight, and one target for all or one for each.
struct Part {
  int64_t term;
  double weight, target;
  const void* targets;
};

template <typename A>
struct Sums {
  A loss = 0, sigmoid = 0, right = 0;
};

// Sum of kTile values in a fixed order that the compiler can vectorise.
template <typename A>
GK_HD A tile_sum(const A* v) {
  A lanes[16];
  for (int k = 0; k < 16; ++k) lanes[k] = v[k];
  for (int64_t i = 16; i < kTile; i += 16)
    for (int k = 0; k < 16; ++k) lanes[k] += v[i + k];
  for (int width = 8; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0];
}

// One chunk of a half: gradient (scaled), losses (null unless reduction is none), sums.
template <typename T, typename A>
GK_HD void chunk_pass(const T* a, const A* targets, A target, A weight, A scale, bool fake, A* grad, A* losses, int64_t n, Sums<A>& sums) {
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t count = std::min(kTile, n - first);
    A logit[kTile] = {}, t[kTile], value[kTile], slope[kTile], sig[kTile], right[kTile];
    for (int64_t i = 0; i < count; ++i) logit[i] = static_cast<A>(a[first + i]);
    for (int64_t i = 0; i < kTile; ++i) t[i] = target;
    if (targets != nullptr) std::copy(targets + first, targets + first + count, t);
    for (int64_t i = 0; i < kTile; ++i) {
      const Term<A> term = bce(logit[i], t[i]);
      value[i] = weight * term.value;
      slope[i] = scale * term.slope;
      sig[i] = term.sigmoid;
    }
    if (fake) {
      for (int64_t i = 0; i < kTile; ++i) right[i] = logit[i] <= A(0) ? A(1) : A(0);
    } else {
      for (int64_t i = 0; i < kTile; ++i) right[i] = logit[i] > A(0) ? A(1) : A(0);
    }
    for (int64_t i = count; i < kTile; ++i) value[i] = sig[i] = right[i] = A(0);
    if (weight != A(0)) {
      std::copy(slope, slope + count, grad + first);
      if (losses != nullptr) std::copy(value, value + count, losses + first);
      sums.loss += tile_sum(value);
    } else {
      std::fill(grad + first, grad + first + count, A(0));
      if (losses != nullptr) std::fill(losses + first, losses + first + count, A(0));
    }
    sums.sigmoid += tile_sum(sig);
    sums.right += tile_sum(right);
  }
}

template <typename T, typename A>
GK_HD void chunk_curvature(const T* a, const A* targets, A target, A scale, const A* g, bool g_each, const A* c, A* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A curvature = bce(static_cast<A>(a[i]), targets != nullptr ? targets[i] : target).curvature;
    out[i] = scale == A(0) ? A(0) : g[g_each ? i : 0] * c[i] * scale * curvature;
  }
}

#define GK_CHUNKS(T)                                                                                                                          \
  GK_CLONES void pass(const T* a, const acc_t<T>* targets, acc_t<T> target, acc_t<T> weight, acc_t<T> scale, bool fake, acc_t<T>* grad,            \
                      acc_t<T>* losses, int64_t n, Sums<acc_t<T>>& sums) {                                                                                      \
    chunk_pass<T, acc_t<T>>(a, targets, target, weight, scale, fake, grad, losses, n, sums);                                                        \
  }                                                                                                                                           \
  GK_CLONES void curve(const T* a, const acc_t<T>* targets, acc_t<T> target, acc_t<T> scale, const acc_t<T>* g, bool g_each,                   \
                       const acc_t<T>* c, acc_t<T>* out, int64_t n) {                                                                         \
    chunk_curvature<T, acc_t<T>>(a, targets, target, scale, g, g_each, c, out, n);                                                             \
  }
GK_CHUNKS(double)
GK_CHUNKS(float)
GK_CHUNKS(BFloat16)
GK_CHUNKS(Half)

// The two halves of the logits, wherever they lie.
struct Halves {
  int64_t n[2];
  const char* at[2];
};

Halves halves_of(const char* op, const Tensor& a, const std::optional<Tensor>& b, int64_t n_real) {
  check_contiguous(op, "a", a);
  const char* first = static_cast<const char*>(a.const_data_ptr());
  if (b.has_value()) {
    check_like(op, "b", *b, a);
    return {{a.numel(), b->numel()}, {first, static_cast<const char*>(b->const_data_ptr())}};
  }
  check(n_real >= 0 && n_real <= a.numel(), op, "n_real", "be between 0 and the number of logits");
  return {{n_real, a.numel() - n_real}, {first, first + n_real * static_cast<int64_t>(a.element_size())}};
}

Part part_of(const char* op, const Tensor& a, int64_t term, double weight, double target, const std::optional<Tensor>& targets, int64_t n) {
  check(term == 0, op, "term", "be a known code");
  if (targets.has_value()) {
    check(targets->scalar_type() == accumulate_dtype(a.scalar_type()) && targets->numel() == n, op, "targets",
          "have one value a logit, in the accumulation dtype");
    check(targets->is_cpu(), op, "targets", "be on the device of a");
    check_contiguous(op, "targets", *targets);
  }
  return {term, weight, target, targets.has_value() ? targets->const_data_ptr() : nullptr};
}

double scale_of(const Part& part, int64_t n, int64_t reduction) {
  return reduction == kMean ? part.weight / static_cast<double>(std::max<int64_t>(1, n)) : part.weight;
}

using Targets = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor> gan_loss(const Tensor& a, const std::optional<Tensor>& b, int64_t n_real, int64_t term_real, double weight_real,
                                            double target_real, const Targets& targets_real, int64_t term_fake, double weight_fake,
                                            double target_fake, const Targets& targets_fake, int64_t reduction) {
  constexpr const char* op = "gan_loss";
  const Halves halves = halves_of(op, a, b, n_real);
  const Part parts[2] = {part_of(op, a, term_real, weight_real, target_real, targets_real, halves.n[0]),
                         part_of(op, a, term_fake, weight_fake, target_fake, targets_fake, halves.n[1])};
  const ScalarType dtype = accumulate_dtype(a.scalar_type());
  const int64_t total = halves.n[0] + halves.n[1];
  Tensor loss = reduction == kNone ? empty_on_cpu({total}, dtype) : empty_on_cpu({}, dtype);
  Tensor stats = empty_on_cpu({3}, dtype), grad_a = empty_on_cpu(a.sizes(), dtype);
  Tensor grad_b = b.has_value() ? empty_on_cpu(b->sizes(), dtype) : empty_on_cpu({0}, dtype);
  dispatch_floating(op, a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    A* slopes[2] = {mutable_data<A>(grad_a), b.has_value() ? mutable_data<A>(grad_b) : mutable_data<A>(grad_a) + halves.n[0]};
    A* losses = reduction == kNone ? mutable_data<A>(loss) : nullptr;
    Sums<A> sums[2];
    for (int h = 0; h < 2; ++h) {
      const T* logits = reinterpret_cast<const T*>(halves.at[h]);
      const A* targets = static_cast<const A*>(parts[h].targets);
      const int64_t n = halves.n[h], offset = h == 0 ? 0 : halves.n[0], chunks = (n + kChunk - 1) / kChunk;
      const A weight = static_cast<A>(parts[h].weight), scale = static_cast<A>(scale_of(parts[h], n, reduction));
      const auto run = [&](int64_t chunk, Sums<A>& into) {
        const int64_t first = chunk * kChunk;
        pass(logits + first, targets == nullptr ? nullptr : targets + first, static_cast<A>(parts[h].target), weight, scale, h == 1, slopes[h] + first,
             losses == nullptr ? nullptr : losses + offset + first, std::min(kChunk, n - first), into);
      };
      if (chunks <= 1) {
        if (chunks == 1) run(0, sums[h]);
        continue;
      }
      std::vector<Sums<A>> partial(static_cast<size_t>(chunks));
      torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) run(chunk, partial[static_cast<size_t>(chunk)]);
      });
      for (const Sums<A>& s : partial) {
        sums[h].loss += s.loss;
        sums[h].sigmoid += s.sigmoid;
        sums[h].right += s.right;
      }
    }
    const A nan = std::numeric_limits<A>::quiet_NaN();
    const A n0 = static_cast<A>(halves.n[0]), n1 = static_cast<A>(halves.n[1]);
    A* s = mutable_data<A>(stats);
    s[0] = n0 > 0 ? sums[0].sigmoid / n0 : nan;
    s[1] = n1 > 0 ? sums[1].sigmoid / n1 : nan;
    s[2] = total > 0 ? (sums[0].right + sums[1].right) / (n0 + n1) : nan;
    if (reduction != kNone) {
      A value = 0;
      for (int h = 0; h < 2; ++h) {
        if (parts[h].weight == 0.0) continue;
        value += reduction == kSum ? sums[h].loss : halves.n[h] > 0 ? sums[h].loss / static_cast<A>(halves.n[h]) : nan;
      }
      *mutable_data<A>(loss) = value;
    }
  });
  return {loss, stats, grad_a, grad_b};
}

Tensor gan_loss_grad2(const Tensor& a, const std::optional<Tensor>& b, int64_t n_real, int64_t term_real, double weight_real, double target_real,
                      const Targets& targets_real, int64_t term_fake, double weight_fake, double target_fake, const Targets& targets_fake,
                      int64_t reduction, const Tensor& g, const Tensor& c) {
  constexpr const char* op = "gan_loss_grad2";
  const Halves halves = halves_of(op, a, b, n_real);
  const Part parts[2] = {part_of(op, a, term_real, weight_real, target_real, targets_real, halves.n[0]),
                         part_of(op, a, term_fake, weight_fake, target_fake, targets_fake, halves.n[1])};
  const int64_t total = halves.n[0] + halves.n[1];
  const ScalarType dtype = accumulate_dtype(a.scalar_type());
  const bool g_each = reduction == kNone;
  check(c.scalar_type() == dtype && c.numel() == total && c.is_cpu(), op, "c", "have one value a logit, in the accumulation dtype");
  check(g.scalar_type() == dtype && g.numel() == (g_each ? total : 1) && g.is_cpu(), op, "g",
        "be a scalar, or with reduction none have one value a logit, in the accumulation dtype");
  check_contiguous(op, "c", c);
  check_contiguous(op, "g", g);
  Tensor out = torch::stable::empty_like(c);
  dispatch_floating(op, a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    for (int h = 0; h < 2; ++h) {
      const T* logits = reinterpret_cast<const T*>(halves.at[h]);
      const A* targets = static_cast<const A*>(parts[h].targets);
      const int64_t n = halves.n[h], offset = h == 0 ? 0 : halves.n[0];
      const A scale = static_cast<A>(scale_of(parts[h], n, reduction));
      torch::stable::parallel_for(0, n, kChunk, [&](int64_t begin, int64_t end) {
        curve(logits + begin, targets == nullptr ? nullptr : targets + begin, static_cast<A>(parts[h].target), scale,
              data<A>(g) + (g_each ? offset + begin : 0), g_each, data<A>(c) + offset + begin, mutable_data<A>(out) + offset + begin, end - begin);
      });
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankern, m) {
  m.def(
      "gan_loss(Tensor a, Tensor? b, int n_real, int term_real, float weight_real, float target_real, Tensor? targets_real, int term_fake, "
      "float weight_fake, float target_fake, Tensor? targets_fake, int reduction) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gan_loss_grad2(Tensor a, Tensor? b, int n_real, int term_real, float weight_real, float target_real, Tensor? targets_real, int term_fake, "
      "float weight_fake, float target_fake, Tensor? targets_fake, int reduction, Tensor g, Tensor c) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("gan_loss", TORCH_BOX(&gan_loss));
  m.impl("gan_loss_grad2", TORCH_BOX(&gan_loss_grad2));
}

}  // namespace gankern
