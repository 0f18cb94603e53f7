// What bias_lrelu.cpp and bias_lrelu.cu share: how a tensor [N, C, ...] lies in memory.
#pragma once

#include <optional>

#include "check.h"

namespace gankern {

// The dense memory of a tensor: [outer, channels, inner]. Contiguous: [N, C, pixels]; channels-last: [N * pixels, C, 1].
struct Memory {
  int64_t outer = 1, channels = 1, inner = 1;
  int64_t elements() const { return outer * channels * inner; }
};

inline Memory memory_of(const char* op, const Tensor& t) {
  check(t.dim() >= 2, op, "the first tensor", "have at least two dimensions");
  Memory m{t.size(0), t.size(1), 1};
  for (int64_t d = 2; d < t.dim(); ++d) m.inner *= t.size(d);
  if (t.is_contiguous()) return m;
  int64_t step = m.channels;
  bool last = m.channels == 1 || t.stride(1) == 1;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (d == 1) continue;
    last = last && (t.size(d) == 1 || t.stride(d) == step);
    step *= t.size(d);
  }
  check(last, op, "the first tensor", "be contiguous or channels-last");
  return {m.outer * m.inner, m.channels, 1};
}

// `t` has the dtype, device, shape and memory layout of `like`.
inline void check_same_memory(const char* op, const char* argument, const Tensor& t, const Tensor& like) {
  check(t.scalar_type() == like.scalar_type(), op, argument, "have the dtype of the first tensor");
  check(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), op, argument, "be on the device of the first tensor");
  bool same = t.dim() == like.dim() && t.is_contiguous() == like.is_contiguous();
  for (int64_t d = 0; same && d < t.dim(); ++d)
    same = t.size(d) == like.size(d) && (t.size(d) == 1 || t.numel() == 0 || t.stride(d) == like.stride(d));
  check(same, op, argument, "have the shape and strides of the first tensor");
}

inline void check_bias(const char* op, const Tensor& bias, const Tensor& x) {
  check_like(op, "bias", bias, x);
  check(bias.dim() == 1 && bias.numel() == x.size(1), op, "bias", "have one element for each channel of x");
}

}  // namespace gankern
