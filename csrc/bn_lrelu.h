// The scalar formulas of bn_lrelu, for the CPU loops, the CUDA kernels and their simulation. Per channel, over its n elements:
//     c = x - mean,  r = 1 / sqrt(var + eps),  z = c * (weight r) + bias,  y = LeakyReLU(z),  g = dy * LeakyReLU'(z)
// Every derivative is then linear in what is read, with coefficients from a few sums over the channel.
#pragma once

#include "math.h"

namespace gankern {

template <typename A>
GK_HD A bn_rstd(A var, A eps) {
  return A(1) / std::sqrt(var + eps);
}

// v times a coefficient; where that is 0 the value does not count, and may be NaN.
template <typename A>
GK_HD A bn_times(A v, A coefficient) {
  return coefficient == A(0) ? A(0) : v * coefficient;
}

// dx = g * g_ + c * c_ + one_
template <typename A>
struct BnGrad {
  A g_, c_, one_;
};

// From sum g and sum g c. Evaluation mode: mean and variance are constants.
template <typename A>
GK_HD BnGrad<A> bn_grad(A weight, A r, A sum_g, A sum_gc, A n, bool training) {
  const A scale = weight * r;
  if (!training) return {scale, A(0), A(0)};
  return {scale, -scale * r * r * (sum_gc / n), -scale * (sum_g / n)};
}

// The double backward pass, for cotangents p of dx, q of dweight, s of dbias:
//     d<.>/ddy = LeakyReLU'(z) * (p * dy_p + c * dy_c + dy_one),  d<.>/dx = p * x_p + g * x_g + c * x_c + x_one
template <typename A>
struct BnGrad2 {
  A dy_p, dy_c, dy_one, x_p, x_g, x_c, x_one, dweight;
};

// The sums over a channel that it needs.
template <typename A>
struct BnSums2 {
  A p, pc, g, gc, pg;
};

template <typename A>
GK_HD BnGrad2<A> bn_grad2(A weight, A r, A q, A s, const BnSums2<A>& sum, A n, bool training) {
  const A scale = weight * r;
  if (!training) return {scale, q * r, s, A(0), q * r, A(0), A(0), r * sum.pg};
  const A p = sum.p / n, a = r * (sum.pc / n), g = sum.g / n, b = r * (sum.gc / n), pg = sum.pg / n;
  const A along = r * (q - scale * a);  // of c in ddy, of g in dx: the two are each other's transpose
  return {scale, along, s - scale * p, -scale * r * b, along, -r * r * (scale * (pg - p * g - A(3) * a * b) + q * b),
          r * (scale * (p * b + g * a) - q * g), r * n * (pg - p * g - a * b)};
}

}  // namespace gankern
