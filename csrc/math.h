// The scalar formulas of every op, written once: the CPU loops, the CUDA kernels and the CPU simulation of those kernels all call them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define GK_HD __host__ __device__ __forceinline__
#else
#define GK_HD inline __attribute__((always_inline))
#endif

namespace gankern {

// --- LeakyReLU ----------------------------------------------------------------------------------------------------------------
// With slope 0 it is 0 at minus infinity too, where the product is NaN.
template <typename T>
GK_HD T lrelu(T z, T slope) {
  return z > T(0) ? z : slope == T(0) && z < T(0) ? T(0) : z * slope;
}

// Derivative of LeakyReLU, read off the sign of its output (or of its input: slope >= 0 keeps the sign).
template <typename T>
GK_HD T lrelu_slope(T y, T slope) {
  return y > T(0) ? T(1) : slope;
}

// --- the input-gradient penalty of mlp_critic: weight * mean (norm - target)^2 ---------------------------------------------------------
// norm - target; a one-sided penalty pays nothing below the target. NaN stays.
template <typename T>
GK_HD T penalty_gap(T norm, T target, bool one_sided) {
  const T gap = norm - target;
  return one_sided && gap < T(0) ? T(0) : gap;
}

// What the gradient is multiplied by to become the slope of the penalty in it; two_weight is 2 weight / samples. 0 at a norm of 0.
template <typename T>
GK_HD T penalty_slope(T norm, T two_weight, T target, bool one_sided) {
  return norm > T(0) ? two_weight * penalty_gap(norm, target, one_sided) / norm : T(0);
}

// --- exp and log1p on the ranges that softplus needs --------------------------------------------------------------------------
// exp(x), x <= 0. On the CPU in float: Cody-Waite reduction and a polynomial, so that the compiler vectorises the loop around it.
template <typename T>
GK_HD T exp_nonpositive(T x) {
#if !defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float>) {
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low mantissa bits now hold round(x / ln 2)
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0.0f : p * scale;
  } else {
    return std::exp(x);
  }
#else
  if constexpr (std::is_same_v<T, float>) return expf(x);
  else return exp(x);
#endif
}

// log(1 + u), 0 <= u <= 1. On the CPU in float: 2 atanh(u / (2 + u)) as a series in s^2 <= 1/9.
template <typename T>
GK_HD T log1p_unit(T u) {
#if !defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float>) {
    const float s = u / (2.0f + u), q = s * s;
    float p = 1.0f / 15.0f;
    p = p * q + 1.0f / 13.0f;
    p = p * q + 1.0f / 11.0f;
    p = p * q + 1.0f / 9.0f;
    p = p * q + 1.0f / 7.0f;
    p = p * q + 1.0f / 5.0f;
    p = p * q + 1.0f / 3.0f;
    return 2.0f * (s + s * q * p);
  } else {
    return std::log1p(u);
  }
#else
  if constexpr (std::is_same_v<T, float>) return log1pf(u);
  else return log1p(u);
#endif
}

template <typename T>
GK_HD T abs_value(T a) {
  return a < T(0) ? -a : a;
}

// 1, 0 or -1; 0 for NaN
template <typename T>
GK_HD T sign_of(T a) {
  return a > T(0) ? T(1) : a < T(0) ? T(-1) : T(0);
}

// sigmoid(a), from e = exp(-|a|)
template <typename T>
GK_HD T sigmoid_from(T a, T e) {
  return a >= T(0) ? T(1) / (T(1) + e) : e / (T(1) + e);
}

template <typename T>
GK_HD T sigmoid(T a) {
  return sigmoid_from(a, exp_nonpositive(-abs_value(a)));
}

// --- the terms of gan_loss: value, slope and curvature in the logit a, target t ------------------------------------------------------
// t = 1 is what a real sample pays, t = 0 what a fake one does, between them the mixture. The formulas and codes are those of
// gankern/ops/_objectives.py.
template <typename T>
struct Term {
  T value, slope, curvature;
};

// t * real + (1 - t) * fake, where a share of 0 leaves out even what is infinite
template <typename T>
GK_HD T mix(T t, T real, T fake) {
  const T r = t * real, f = (T(1) - t) * fake;
  return (t != T(0) ? r : T(0)) + (t != T(1) ? f : T(0));
}

template <typename T>
GK_HD Term<T> mix(T t, const Term<T>& real, const Term<T>& fake) {
  return {mix(t, real.value, fake.value), mix(t, real.slope, fake.slope), mix(t, real.curvature, fake.curvature)};
}

// exp(x), continued beyond x = kExpLimit by its tangent
constexpr double kExpLimit = 30.0;
template <typename T>
GK_HD Term<T> guarded_exp(T x) {
  const T limit = T(kExpLimit), over = x - limit;
  const T m = x > limit ? limit : x, down = exp_nonpositive(-abs_value(m)), inverse = T(1) / down;
  const T e = m > T(0) ? inverse : down, line = e * (T(1) + over);
  return {over > T(0) ? line : e, e, over > T(0) ? T(0) : e};
}

// exp(-a) - shift, as guarded
template <typename T>
GK_HD Term<T> guarded_decay(T a, T shift) {
  const Term<T> e = guarded_exp(-a);
  return {e.value - shift, -e.slope, e.curvature};
}

// max(0, 1 + a); not below 0, so that NaN passes
template <typename T>
GK_HD Term<T> margin(T a) {
  const T v = T(1) + a;
  return {v <= T(0) ? T(0) : v, v <= T(0) ? T(0) : T(1), T(0)};
}

enum TermCode : int { kBce, kLinear, kSquare, kSquareSides, kHinge, kKl, kReverseKl, kPearson, kHellinger, kJensenShannon, kTerms };

// binary cross entropy of sigmoid(a) against t: softplus(a) - t a
template <typename T>
GK_HD Term<T> bce(T a, T t) {
  const T e = exp_nonpositive(-abs_value(a)), q = T(1) / (T(1) + e);
  return {(a > T(0) ? T(1) - t : -t) * a + log1p_unit(e), sigmoid_from(a, e) - t, e * q * q};
}

template <int kCode, typename T>
GK_HD Term<T> term(T a, T t) {
  if constexpr (kCode == kBce) return bce(a, t);
  else if constexpr (kCode == kLinear) return {(T(1) - T(2) * t) * a, T(1) - T(2) * t, T(0)};
  else if constexpr (kCode == kSquare) return {T(0.5) * (a - t) * (a - t), a - t, T(1)};
  else if constexpr (kCode == kSquareSides)
    return {mix(t, T(0.5) * (a - T(1)) * (a - T(1)), T(0.5) * (a + T(1)) * (a + T(1))), a - (T(2) * t - T(1)), T(1)};
  else if constexpr (kCode == kHinge) {
    const Term<T> real = margin(-a);
    return mix(t, {real.value, -real.slope, T(0)}, margin(a));
  } else if constexpr (kCode == kKl) return mix(t, {-a, T(-1), T(0)}, guarded_exp(a - T(1)));
  else if constexpr (kCode == kReverseKl) return mix(t, guarded_decay(a, T(0)), {a - T(1), T(1), T(0)});
  else if constexpr (kCode == kPearson) return mix(t, {-a, T(-1), T(0)}, {a * (T(0.25) * a + T(1)), T(0.5) * a + T(1), T(0.5)});
  else if constexpr (kCode == kHellinger) {
    Term<T> fake = guarded_exp(a);
    fake.value -= T(1);
    return mix(t, guarded_decay(a, T(1)), fake);
  } else {
    Term<T> b = bce(a, t);
    b.value -= log1p_unit(T(1));  // log 2, and 0 at a = 0 to the bit: a last bit more at every logit would add up in a sum
    return b;
  }
}

// f(std::integral_constant<int, code>), for a code known only at run time
template <typename F>
GK_HD void with_term(int code, F&& f) {
  switch (code) {
    case kLinear: return f(std::integral_constant<int, kLinear>{});
    case kSquare: return f(std::integral_constant<int, kSquare>{});
    case kSquareSides: return f(std::integral_constant<int, kSquareSides>{});
    case kHinge: return f(std::integral_constant<int, kHinge>{});
    case kKl: return f(std::integral_constant<int, kKl>{});
    case kReverseKl: return f(std::integral_constant<int, kReverseKl>{});
    case kPearson: return f(std::integral_constant<int, kPearson>{});
    case kHellinger: return f(std::integral_constant<int, kHellinger>{});
    case kJensenShannon: return f(std::integral_constant<int, kJensenShannon>{});
    default: return f(std::integral_constant<int, kBce>{});
  }
}

template <typename T>
GK_HD Term<T> term_of(int code, T a, T t) {
  Term<T> result{};
  with_term(code, [&](auto k) { result = term<decltype(k)::value>(a, t); });
  return result;
}

// --- the gradient penalty of one sample, in its norm n ----------------------------------------------------------------------------
// How far the norm is from the target; one-sided: above it. NaN stays NaN.
template <typename T>
GK_HD T norm_excess(T n, T target, bool one_sided) {
  return one_sided && n <= target ? T(0) : n - target;
}

// excess / n, what the gradient g is multiplied by in d(excess^2 / 2)/dg; at n = 0, where the norm has no derivative: 0.
template <typename T>
GK_HD T norm_slope(T n, T target, bool one_sided) {
  if (target == T(0)) return T(1);  // excess^2 is the sum of squares, smooth everywhere
  return n == T(0) ? T(0) : norm_excess(n, target, one_sided) / n;
}

}  // namespace gankern
