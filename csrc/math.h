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
template <typename T>
GK_HD T lrelu(T z, T slope) {
  return z > T(0) ? z : z * slope;
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

// sigmoid(a), from e = exp(-|a|)
template <typename T>
GK_HD T sigmoid_from(T a, T e) {
  return a >= T(0) ? T(1) / (T(1) + e) : e / (T(1) + e);
}

template <typename T>
GK_HD T sigmoid(T a) {
  return sigmoid_from(a, exp_nonpositive(-abs_value(a)));
}

// --- the terms of gan_loss: value, slope and curvature in the logit a, target t; the codes are those of gankern/ops/gan_loss.py --
template <typename T>
struct Term {
  T value, slope, curvature, sigmoid;
};

// binary cross entropy of sigmoid(a) against t: softplus(a) - t a
template <typename T>
GK_HD Term<T> bce(T a, T t) {
  const T e = exp_nonpositive(-abs_value(a));
  const T s = sigmoid_from(a, e), q = T(1) / (T(1) + e);
  return {(a > T(0) ? T(1) - t : -t) * a + log1p_unit(e), s - t, e * q * q, s};
}

}  // namespace gankern
