// Shared by the attention kernels: their arguments, the sizes of their scratch memory, and loading of queries. attention.cpp
// holds the vector kernels, amx/attention.cpp the tile kernel.
#pragma once

#include "operator.h"

namespace presto_rt {

struct Attention {
  const void *q, *k, *v;        // fp32 or bf16
  void* out;                    // (batch, tokens, heads, dim), contiguous
  const float* q_weight;        // (dim,) or null
  const std::int32_t* lengths;  // (batch,) visible keys of each clip, or null: all
  void* scratch;                // `attention_scratch` bytes for each head of each clip
  std::int64_t heads, tokens, keys, dim;
  std::int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;  // strides in numbers
  float scale, eps;
  bool bf16;
};

constexpr std::int64_t kPanel = 64;  // the widest panel of any instruction set, in keys and in dims

inline std::int64_t attention_scratch(std::int64_t keys, std::int64_t dim) {
  const std::int64_t padded_keys = (keys + kPanel - 1) / kPanel * kPanel, padded_dim = (dim + kPanel - 1) / kPanel * kPanel;
  return 4 * padded_keys * (dim + padded_dim);
}

constexpr std::int64_t kQueries = 96;  // queries of one piece of work; a multiple of every kernel's rows

// Working memory of one thread: queries, scores and weights of a tile. 32 rows of scores are the most that a kernel keeps.
inline std::int64_t attention_local(std::int64_t keys, std::int64_t dim) {
  const std::int64_t padded_keys = (keys + kPanel - 1) / kPanel * kPanel, padded_dim = (dim + kPanel - 1) / kPanel * kPanel;
  return 32 * (4 * (padded_keys + 16) + 4 * padded_dim) + 8192;
}

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {
namespace {

PRESTO_RT_INLINE std::int64_t round_up(std::int64_t count, std::int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

PRESTO_RT_INLINE std::int64_t visible_keys(const Attention& a, std::int64_t clip) {
  if (!a.lengths) return a.keys;
  const std::int64_t length = a.lengths[clip];
  return length < 0 ? 0 : length < a.keys ? length : a.keys;
}

PRESTO_RT_INLINE std::uint32_t* packed(const Attention& a, std::int64_t head) {
  return reinterpret_cast<std::uint32_t*>(static_cast<char*>(a.scratch) + head * attention_scratch(a.keys, a.dim));
}

// Loads kRows queries, RMS-normalized if there is a weight. Rows beyond the last one are 0.
template <int kRows, class Number, class T>
PRESTO_RT_INLINE void load_queries(const Attention& a, const T* from, std::int64_t rows, Number* to, std::int64_t to_row) {
  for (std::int64_t r = 0; r < kRows; ++r, to += to_row, from += a.q_token) {
    float factor = 1.0f;
    if (a.q_weight && r < rows) {
      Vec squares{};
      for (std::int64_t i = 0; i < a.dim; i += kWidth) {
        const Vec x = load(from + i, a.dim - i);
        squares = fma(x, x, squares);
      }
      factor = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(a.dim) + a.eps);
    }
    for (std::int64_t i = 0; i < a.dim; i += kWidth) {
      const std::int64_t n = a.dim - i;
      Vec x = r < rows ? load(from + i, n) : Vec{};
      if (a.q_weight) x = x * factor * load(a.q_weight + i, n);
      store(to + i, x, n);
    }
  }
}

}  // namespace
}  // namespace PRESTO_RT_ISA
#endif

}  // namespace presto_rt
