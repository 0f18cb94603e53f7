// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the dropout lanes drawn from it.
// gankern/ops/_philox.py is the definition; the bits are the same.
#pragma once

#include "math.h"

namespace gankern {

struct Words {
  std::uint32_t v[4];
};

GK_HD Words philox(std::uint64_t seed, std::uint64_t counter) {
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  std::uint32_t c0 = static_cast<std::uint32_t>(counter), c1 = static_cast<std::uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(0xD2511F53u) * c0, p1 = static_cast<std::uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// One byte of the dropout mask: bit k is set if 16-bit lane k of the draw is at least the threshold, that is, element k is kept.
GK_HD std::uint8_t keep_byte(std::uint64_t seed, std::uint64_t counter, std::uint32_t threshold) {
  const Words w = philox(seed, counter);
  std::uint32_t byte = 0;
  for (int k = 0; k < 8; ++k) {
    const std::uint32_t lane = (w.v[k >> 1] >> (16 * (k & 1))) & 0xFFFFu;
    byte |= static_cast<std::uint32_t>(lane >= threshold) << k;
  }
  return static_cast<std::uint8_t>(byte);
}

// A number in [0, 1): the upper 24 bits of word 0 times 2^-24, exact in float.
GK_HD float draw_unit(std::uint64_t seed, std::uint64_t counter) { return static_cast<float>(philox(seed, counter).v[0] >> 8) * 0x1p-24f; }

// What the host passes for a probability p: the threshold above, and the factor of kept elements.
inline std::uint32_t dropout_threshold(double p) { return static_cast<std::uint32_t>(std::nearbyint(p * 65536.0)); }
inline double dropout_scale(double p) { return p < 1.0 ? 1.0 / (1.0 - p) : 0.0; }

}  // namespace gankern
