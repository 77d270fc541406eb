// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), sixteen counters at a time.
// presto_rt/diffusion/noise.py describes how counters and keys are made and holds the same generator in torch.
#pragma once

#include "common.h"

namespace presto_rt {

constexpr int kLanes = 16;          // counters per batch
constexpr int kWords = 4 * kLanes;  // words per batch

// words[j][l] is word j of lane l: the counter on entry, the random words on return.
PRESTO_RT_INLINE void philox4x32_10(std::uint32_t words[4][kLanes], std::uint64_t seed) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < kLanes; ++l) {
      const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * words[0][l];
      const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * words[2][l];
      words[0][l] = static_cast<std::uint32_t>(product1 >> 32) ^ words[1][l] ^ key0;
      words[1][l] = static_cast<std::uint32_t>(product1);
      words[2][l] = static_cast<std::uint32_t>(product0 >> 32) ^ words[3][l] ^ key1;
      words[3][l] = static_cast<std::uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The words of elements 4 * block ... 4 * (block + kLanes) - 1: element 4 * (block + l) + j gets words[j][l].
PRESTO_RT_INLINE void random_words(std::uint32_t words[4][kLanes], std::uint64_t seed, std::uint32_t stream,
                                   std::uint64_t block) {
  for (int l = 0; l < kLanes; ++l) {
    const std::uint64_t counter = block + static_cast<std::uint64_t>(l);
    words[0][l] = static_cast<std::uint32_t>(counter);
    words[1][l] = static_cast<std::uint32_t>(counter >> 32);
    words[2][l] = stream;
    words[3][l] = 0;
  }
  philox4x32_10(words, seed);
}

}  // namespace presto_rt
