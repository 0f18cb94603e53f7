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

// In the order of RELATIVE in gankern/ops/_objectives.py.
enum Relative : int64_t { kNo = 0, kPair = 1, kAverage = 2 };

template <typename A>
struct Sums {
  A loss = 0, slope = 0, sigmoid = 0, right = 0;

  void add(const Sums& s) {
    loss += s.loss;
    slope += s.slope;
    sigmoid += s.sigmoid;
    right += s.right;
  }
};

// What the logits of a half are taken relative to, if anything: their partners (else null), or the mean of the other half (else 0).
template <typename T, typename A>
struct Origin {
  bool shifts;
  const T* partners;
  A mean;
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

// kTile terms at x, of target t: values and slopes, with the sigmoids of the logits a.
template <typename A>
GK_HD void tile_slopes(int code, const A* a, const A* x, const A* t, A* value, A* slope, A* sig) {
  with_term(code, [&](auto k) {
    for (int64_t i = 0; i < kTile; ++i) {
      const Term<A> r = term<decltype(k)::value>(x[i], t[i]);
      value[i] = r.value;
      slope[i] = r.slope;
    }
  });
  for (int64_t i = 0; i < kTile; ++i) sig[i] = sigmoid(a[i]);
}

// The same of cross entropy in the logits themselves, which shares its exponential with the sigmoid.
template <typename A>
GK_HD void tile_bce(const A* a, const A* t, A* value, A* slope, A* sig) {
  for (int64_t i = 0; i < kTile; ++i) {
    const Term<A> r = bce(a[i], t[i]);
    value[i] = r.value;
    slope[i] = r.slope;
    sig[i] = sigmoid(a[i]);
  }
}

template <typename A>
GK_HD void tile_curvatures(int code, const A* x, const A* t, A* curvature) {
  with_term(code, [&](auto k) {
    for (int64_t i = 0; i < kTile; ++i) curvature[i] = term<decltype(k)::value>(x[i], t[i]).curvature;
  });
}

#define GK_TILES(A)                                                                                                                           \
  GK_CLONES void slopes(int code, const A* a, const A* x, const A* t, A* value, A* slope, A* sig) { tile_slopes(code, a, x, t, value, slope, sig); } \
  GK_CLONES void curvatures(int code, const A* x, const A* t, A* curvature) { tile_curvatures(code, x, t, curvature); }
GK_TILES(double)
GK_TILES(float)

// One chunk of a half: gradient in its own relative logits (scaled), losses (null unless reduction is none), sums.
template <typename T, typename A>
GK_HD void chunk_pass(const T* a, const Origin<T, A>& origin, int code, const A* targets, A target, A weight, A scale, bool fake, A* grad, A* losses,
                      int64_t n, Sums<A>& sums) {
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t count = std::min(kTile, n - first);
    A logit[kTile] = {}, x[kTile], t[kTile], value[kTile], slope[kTile], sig[kTile], right[kTile];
    for (int64_t i = 0; i < count; ++i) logit[i] = static_cast<A>(a[first + i]);
    for (int64_t i = 0; i < kTile; ++i) t[i] = target;
    if (targets != nullptr) std::copy(targets + first, targets + first + count, t);
    if (code == kBce && !origin.shifts) {
      tile_bce(logit, t, value, slope, sig);
    } else {
      for (int64_t i = 0; i < kTile; ++i) x[i] = logit[i] - origin.mean;
      if (origin.partners != nullptr)
        for (int64_t i = 0; i < count; ++i) x[i] = logit[i] - static_cast<A>(origin.partners[first + i]);
      slopes(code, logit, x, t, value, slope, sig);
    }
    if (fake) {
      for (int64_t i = 0; i < kTile; ++i) right[i] = logit[i] <= A(0) ? A(1) : A(0);
    } else {
      for (int64_t i = 0; i < kTile; ++i) right[i] = logit[i] > A(0) ? A(1) : A(0);
    }
    if (weight != A(0)) {
      for (int64_t i = 0; i < kTile; ++i) {
        value[i] *= weight;
        slope[i] *= scale;
      }
      for (int64_t i = count; i < kTile; ++i) value[i] = slope[i] = A(0);
      std::copy(slope, slope + count, grad + first);
      if (losses != nullptr) std::copy(value, value + count, losses + first);
      sums.loss += tile_sum(value);
      sums.slope += tile_sum(slope);
    } else {
      std::fill(grad + first, grad + first + count, A(0));
      if (losses != nullptr) std::fill(losses + first, losses + first + count, A(0));
    }
    for (int64_t i = count; i < kTile; ++i) sig[i] = right[i] = A(0);
    sums.sigmoid += tile_sum(sig);
    sums.right += tile_sum(right);
  }
}

template <typename T, typename A>
GK_HD A chunk_sum(const T* a, int64_t n) {
  A total = 0;
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t count = std::min(kTile, n - first);
    A v[kTile] = {};
    for (int64_t i = 0; i < count; ++i) v[i] = static_cast<A>(a[first + i]);
    total += tile_sum(v);
  }
  return total;
}

template <typename T, typename A>
GK_HD void chunk_curvature(const T* a, int code, const A* targets, A target, A scale, const A* g, bool g_each, const T* c, T* out, int64_t n) {
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t count = std::min(kTile, n - first);
    if (scale == A(0)) {
      std::fill(out + first, out + first + count, T(0));
      continue;
    }
    A x[kTile] = {}, t[kTile], curvature[kTile], factor[kTile];
    for (int64_t i = 0; i < count; ++i) x[i] = static_cast<A>(a[first + i]);
    for (int64_t i = 0; i < kTile; ++i) t[i] = target;
    if (targets != nullptr) std::copy(targets + first, targets + first + count, t);
    for (int64_t i = 0; i < kTile; ++i) factor[i] = g[0];
    if (g_each) std::copy(g + first, g + first + count, factor);
    curvatures(code, x, t, curvature);
    for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<T>(factor[i] * static_cast<A>(c[first + i]) * scale * curvature[i]);
  }
}

#define GK_CHUNKS(T)                                                                                                                          \
  GK_CLONES void pass(const T* a, const Origin<T, acc_t<T>>& origin, int code, const acc_t<T>* targets, acc_t<T> target, acc_t<T> weight,     \
                      acc_t<T> scale, bool fake, acc_t<T>* grad, acc_t<T>* losses, int64_t n, Sums<acc_t<T>>& sums) {                         \
    chunk_pass<T, acc_t<T>>(a, origin, code, targets, target, weight, scale, fake, grad, losses, n, sums);                                    \
  }                                                                                                                                           \
  GK_CLONES acc_t<T> sum(const T* a, int64_t n) { return chunk_sum<T, acc_t<T>>(a, n); }                                                      \
  GK_CLONES void curve(const T* a, int code, const acc_t<T>* targets, acc_t<T> target, acc_t<T> scale, const acc_t<T>* g, bool g_each,        \
                       const T* c, T* out, int64_t n) {                                                                                       \
    chunk_curvature<T, acc_t<T>>(a, code, targets, target, scale, g, g_each, c, out, n);                                                      \
  }
GK_CHUNKS(double)
GK_CHUNKS(float)
GK_CHUNKS(BFloat16)
GK_CHUNKS(Half)

// work(chunk, R&) for each chunk of n values, on several threads when there are more than one; the results are added in their order.
template <typename R, typename F>
R over_chunks(int64_t n, const F& work) {
  R total{};
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  if (chunks <= 1) {
    if (chunks == 1) work(0, total);
    return total;
  }
  std::vector<R> partial(static_cast<size_t>(chunks));
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) work(chunk, partial[static_cast<size_t>(chunk)]);
  });
  for (const R& p : partial) total.add(p);
  return total;
}

template <typename A>
struct Total {
  A sum = 0;
  void add(const Total& t) { sum += t.sum; }
};

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
  check(term >= 0 && term < kTerms, op, "term", "be a known code");
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
                                            double target_fake, const Targets& targets_fake, int64_t reduction, int64_t relative) {
  constexpr const char* op = "gan_loss";
  const Halves halves = halves_of(op, a, b, n_real);
  check(relative >= kNo && relative <= kAverage, op, "relative", "be 0, 1 or 2");
  check(relative != kPair || halves.n[0] == halves.n[1], op, "n_real", "be half the number of logits when they pair");
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
    const T* logits[2] = {reinterpret_cast<const T*>(halves.at[0]), reinterpret_cast<const T*>(halves.at[1])};
    A means[2] = {0, 0};
    for (int h = 0; h < 2 && relative == kAverage; ++h) {
      const auto add = [&](int64_t chunk, Total<A>& into) {
        into.sum += sum(logits[h] + chunk * kChunk, std::min(kChunk, halves.n[h] - chunk * kChunk));
      };
      means[h] = over_chunks<Total<A>>(halves.n[h], add).sum / static_cast<A>(halves.n[h]);
    }
    Sums<A> sums[2];
    for (int h = 0; h < 2; ++h) {
      const A* targets = static_cast<const A*>(parts[h].targets);
      const int64_t n = halves.n[h], offset = h == 0 ? 0 : halves.n[0];
      const A weight = static_cast<A>(parts[h].weight), scale = static_cast<A>(scale_of(parts[h], n, reduction));
      sums[h] = over_chunks<Sums<A>>(n, [&](int64_t chunk, Sums<A>& into) {
        const int64_t first = chunk * kChunk;
        const Origin<T, A> origin{relative != kNo, relative == kPair ? logits[1 - h] + first : nullptr, means[1 - h]};
        pass(logits[h] + first, origin, static_cast<int>(parts[h].term), targets == nullptr ? nullptr : targets + first,
             static_cast<A>(parts[h].target), weight, scale, h == 1, slopes[h] + first, losses == nullptr ? nullptr : losses + offset + first,
             std::min(kChunk, n - first), into);
      });
    }
    if (reduction != kNone && relative != kNo) {  // from the slopes in the relative logits to the gradient in the logits
      for (int64_t i = 0; i < halves.n[0] && relative == kPair; ++i) {
        slopes[0][i] -= slopes[1][i];
        slopes[1][i] = -slopes[0][i];
      }
      for (int h = 0; h < 2 && relative == kAverage; ++h) {
        const A shift = sums[1 - h].slope / static_cast<A>(halves.n[h]);
        for (int64_t i = 0; i < halves.n[h]; ++i) slopes[h][i] -= shift;
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

std::tuple<Tensor, Tensor> gan_loss_grad2(const Tensor& a, const std::optional<Tensor>& b, int64_t n_real, int64_t term_real, double weight_real,
                                          double target_real, const Targets& targets_real, int64_t term_fake, double weight_fake, double target_fake,
                                          const Targets& targets_fake, int64_t reduction, const Tensor& g, const Tensor& ca,
                                          const std::optional<Tensor>& cb) {
  constexpr const char* op = "gan_loss_grad2";
  const Halves halves = halves_of(op, a, b, n_real);
  const Part parts[2] = {part_of(op, a, term_real, weight_real, target_real, targets_real, halves.n[0]),
                         part_of(op, a, term_fake, weight_fake, target_fake, targets_fake, halves.n[1])};
  const int64_t total = halves.n[0] + halves.n[1];
  const ScalarType dtype = accumulate_dtype(a.scalar_type());
  const bool g_each = reduction == kNone;
  const Halves cotangents = halves_of(op, ca, cb, n_real);
  check_like(op, "ca", ca, a);
  check(ca.numel() == a.numel() && cb.has_value() == b.has_value() && cotangents.n[1] == halves.n[1], op, "ca and cb",
        "have one value a logit, halved as a and b are");
  check(g.scalar_type() == dtype && g.numel() == (g_each ? total : 1) && g.is_cpu(), op, "g",
        "be a scalar, or with reduction none have one value a logit, in the accumulation dtype");
  check_contiguous(op, "g", g);
  Tensor da = torch::stable::empty_like(a), db = b.has_value() ? torch::stable::empty_like(*b) : empty_on_cpu({0}, a.scalar_type());
  dispatch_floating(op, a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    T* outputs[2] = {mutable_data<T>(da), b.has_value() ? mutable_data<T>(db) : mutable_data<T>(da) + halves.n[0]};
    for (int h = 0; h < 2; ++h) {
      const T *logits = reinterpret_cast<const T*>(halves.at[h]), *c = reinterpret_cast<const T*>(cotangents.at[h]);
      const A* targets = static_cast<const A*>(parts[h].targets);
      const int64_t n = halves.n[h], offset = h == 0 ? 0 : halves.n[0];
      const A scale = static_cast<A>(scale_of(parts[h], n, reduction));
      torch::stable::parallel_for(0, n, kChunk, [&](int64_t begin, int64_t end) {
        curve(logits + begin, static_cast<int>(parts[h].term), targets == nullptr ? nullptr : targets + begin, static_cast<A>(parts[h].target), scale,
              data<A>(g) + (g_each ? offset + begin : 0), g_each, c + begin, outputs[h] + begin, end - begin);
      });
    }
  });
  return {da, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankern, m) {
  m.def(
      "gan_loss(Tensor a, Tensor? b, int n_real, int term_real, float weight_real, float target_real, Tensor? targets_real, int term_fake, "
      "float weight_fake, float target_fake, Tensor? targets_fake, int reduction, int relative) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gan_loss_grad2(Tensor a, Tensor? b, int n_real, int term_real, float weight_real, float target_real, Tensor? targets_real, int term_fake, "
      "float weight_fake, float target_fake, Tensor? targets_fake, int reduction, Tensor g, Tensor ca, Tensor? cb) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("gan_loss", TORCH_BOX(&gan_loss));
  m.impl("gan_loss_grad2", TORCH_BOX(&gan_loss_grad2));
}

}  // namespace gankern
