// What the CPU kernels share. GK_CLONES compiles a function for several instruction sets; the loader picks the one that this machine has.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "math.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define GK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GK_CLONES
#endif

namespace gankern {

// Dropout's factors of n elements, n <= kChunk, whose bits begin with a byte: scale where the bit is set, 0 elsewhere. Made for a chunk at a
// time, in a loop of its own: with the bits taken one by one no loop over the elements is vectorised, and takes eight times as long.
constexpr int64_t kChunk = 256;

template <typename A>
GK_HD void keep_factors(const uint8_t* bits, int64_t n, A scale, A* keep) {
  for (int64_t g = 0; g < (n + 7) / 8; ++g)
    for (int k = 0; k < 8; ++k) keep[g * 8 + k] = static_cast<A>((bits[g] >> k) & 1) * scale;
}

}  // namespace gankern
