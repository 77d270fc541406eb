// The bf16 attention of simd/attention.cpp in AMX tiles: 16 x 16 sums of 32 products each in one instruction.
//
// Keys and values are packed once for each head into tiles in the layout of the instruction's right side: 16 rows of 16 pairs,
// a pair being two neighbours along the sum. 32 queries then compute all their scores, the exact softmax (its maximum taken
// while the scores are in the L1 cache, its weights written over them) and their result. Compiled once, with AMX and AVX-512;
// isa.cpp chooses it where the processor and the kernel offer tiles.
#include "../simd/attention.h"

#if defined(PRESTO_RT_ISA) && defined(__AMX_BF16__)

// GCC's own headers create undefined vectors, which GCC then warns about.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace presto_rt {
namespace PRESTO_RT_ISA {
namespace {

constexpr std::int64_t kRows = 32, kDepth = 32, kSide = 16, kBlock = 1024;  // kBlock: bytes of a tile

// Tiles 0 to 3 hold sums, 4 and 5 the left side, 6 and 7 the right one: all of them 16 rows of 64 bytes.
struct Tiles {
  Tiles() {
    alignas(64) std::uint8_t config[64] = {1};
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;
      config[48 + i] = 16;
    }
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

PRESTO_RT_INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Adds 32 products to the sums of 32 rows and 32 columns. left: rows of bf16, `stride` bytes apart.
PRESTO_RT_INLINE void multiply(const char* left, std::int64_t stride, const char* first, const char* second) {
  _tile_loadd(4, left, stride);
  _tile_loadd(5, left + kSide * stride, stride);
  _tile_loadd(6, first, 64);
  _tile_loadd(7, second, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

PRESTO_RT_INLINE void store_sums(float* out, std::int64_t stride) {
  char* to = reinterpret_cast<char*>(out);
  _tile_stored(0, to, stride);
  _tile_stored(1, to + 64, stride);
  _tile_stored(2, to + kSide * stride, stride);
  _tile_stored(3, to + kSide * stride + 64, stride);
}

// The transpose of 16 x 16 words: of 2 x 2, then of 4 x 4 within each quarter of a vector, then of the quarters.
PRESTO_RT_INLINE void transpose(const __m512i in[16], __m512i out[16]) {
  __m512i pair[16], four[16];
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = _mm512_unpacklo_epi64(pair[i + j], pair[i + 2 + j]);
      four[i + 2 * j + 1] = _mm512_unpackhi_epi64(pair[i + j], pair[i + 2 + j]);
    }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(four[i], four[4 + i], 0x88), b = _mm512_shuffle_i32x4(four[i], four[4 + i], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(four[8 + i], four[12 + i], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(four[8 + i], four[12 + i], 0xDD);
    out[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    out[8 + i] = _mm512_shuffle_i32x4(a, c, 0xDD);
    out[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    out[12 + i] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

// Lanes below n, of 16.
PRESTO_RT_INLINE __mmask16 lanes(std::int64_t n) {
  return n <= 0 ? 0 : n >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1);
}

// Keys (count, dim) -> tiles [16 keys][32 dims]: in row r the pairs (2 r, 2 r + 1) of 16 keys.
void pack_keys(const Bf16* from, std::int64_t stride, std::int64_t count, std::int64_t dim, char* to) {
  for (std::int64_t key = 0; key < round_up(count, kDepth); key += kSide)
    for (std::int64_t d = 0; d < dim; d += kDepth, to += kBlock) {
      const __mmask16 mask = lanes((dim - d) / 2);
      __m512i in[16], out[16];
      for (std::int64_t i = 0; i < 16; ++i)
        in[i] = key + i < count ? _mm512_maskz_loadu_epi32(mask, from + (key + i) * stride + d) : _mm512_setzero_si512();
      transpose(in, out);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 64 * i, out[i]);
    }
}

// Values (count, dim) -> tiles [16 dims][32 keys]: in row r the pairs of keys (2 r, 2 r + 1) of 16 dims.
void pack_values(const Bf16* from, std::int64_t stride, std::int64_t count, std::int64_t dim, char* to) {
  for (std::int64_t d = 0; d < round_up(dim, kDepth); d += kSide) {
    const __mmask16 mask = lanes(dim - d);
    for (std::int64_t key = 0; key < round_up(count, kDepth); key += 2, to += 64) {
      const Bf16* one = from + key * stride + d;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(key < count ? mask : 0, one));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(key + 1 < count ? mask : 0, one + stride));
      _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// 2^x within 3e-6, far below the rounding to bf16 that follows.
PRESTO_RT_INLINE __m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(0.00957010143f);
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.0559178603f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.240247448f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.693121815f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.999999261f));
  return _mm512_scalef_ps(p, whole);
}

// Each row's maximum in each of 16 columns, with the 32 scores from `key` on.
PRESTO_RT_INLINE void raise_maxima(const char* scores, std::int64_t stride, std::int64_t key, std::int64_t keys,
                                   __m512 top[kRows]) {
  const __mmask16 one = lanes(keys - key), two = lanes(keys - key - kSide);
  for (std::int64_t r = 0; r < kRows; ++r) {
    const float* row = reinterpret_cast<const float*>(scores + r * stride) + key;
    top[r] = _mm512_mask_max_ps(top[r], one, top[r], _mm512_loadu_ps(row));
    top[r] = _mm512_mask_max_ps(top[r], two, top[r], _mm512_loadu_ps(row + kSide));
  }
}

// A row of scores to weights in its place, as bf16. top: the row's maximum in each of 16 columns. Returns 1 / sum.
PRESTO_RT_INLINE float softmax(float* row, __m512 top, std::int64_t keys, std::int64_t padded, float scale) {
  // A NaN among the scores reaches the sum by itself; what the maximum makes of it does not matter.
  float most = top[0];
  for (int i = 1; i < kWidth; ++i) most = top[i] > most ? top[i] : most;
  const __m512 factor = _mm512_set1_ps(scale * 1.44269504f), offset = _mm512_set1_ps(-most * scale * 1.44269504f);
  __m512 total = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < padded; i += kDepth) {
    const __mmask16 one = lanes(keys - i), two = lanes(keys - i - kSide);
    const __m512 a = _mm512_fmadd_ps(_mm512_loadu_ps(row + i), factor, offset);
    const __m512 b = _mm512_fmadd_ps(_mm512_loadu_ps(row + i + kSide), factor, offset);
    const __m512 x = _mm512_maskz_mov_ps(one, power_of_two(a)), y = _mm512_maskz_mov_ps(two, power_of_two(b));
    total = _mm512_add_ps(total, _mm512_add_ps(x, y));
    const __m512bh both = _mm512_cvtne2ps_pbh(y, x);
    __builtin_memcpy(reinterpret_cast<char*>(row) + 2 * i, &both, sizeof both);
  }
  return 1.0f / sum((Vec)total);
}

}  // namespace

void attention_pack(const Attention& a, std::int64_t head) {
  const std::int64_t clip = head / a.heads, h = head % a.heads, keys = visible_keys(a, clip);
  char* to = reinterpret_cast<char*>(packed(a, head));
  pack_keys(static_cast<const Bf16*>(a.k) + clip * a.k_batch + h * a.k_head, a.k_token, keys, a.dim, to);
  to += 2 * round_up(keys, kDepth) * round_up(a.dim, kDepth);
  pack_values(static_cast<const Bf16*>(a.v) + clip * a.v_batch + h * a.v_head, a.v_token, keys, a.dim, to);
}

void attention_queries(const Attention& a, std::int64_t head, std::int64_t first, std::int64_t last, void* local) {
  const std::int64_t clip = head / a.heads, h = head % a.heads, keys = visible_keys(a, clip);
  const std::int64_t padded = round_up(keys, kDepth), depth = round_up(a.dim, kDepth), steps = depth / kDepth;
  const std::int64_t stride = 4 * padded + 64;  // of a row of scores in bytes: never a multiple of a page
  const char* key_tiles = reinterpret_cast<const char*>(packed(a, head));
  const char* value_tiles = key_tiles + 2 * padded * depth;
  char* scores = static_cast<char*>(local);
  float* sums = reinterpret_cast<float*>(scores + kRows * stride);  // 32 x 32
  Bf16* q = reinterpret_cast<Bf16*>(sums + kRows * kRows);
  const Bf16* from = static_cast<const Bf16*>(a.q) + clip * a.q_batch + h * a.q_head;
  Bf16* out = static_cast<Bf16*>(a.out) + (clip * a.tokens * a.heads + h) * a.dim;
  __builtin_memset(q, 0, static_cast<std::size_t>(2 * kRows * depth));
  const Tiles tiles;

  for (std::int64_t token = first; token < last; token += kRows) {
    const std::int64_t rows = last - token < kRows ? last - token : kRows;
    load_queries<kRows>(a, from + token * a.q_token, rows, q, depth);
    __m512 top[kRows];
    for (__m512& t : top) t = _mm512_set1_ps(-__builtin_inff());
    for (std::int64_t key = 0; key < padded; key += kDepth) {
      const char* tile = key_tiles + key / kSide * steps * kBlock;
      clear_sums();
      for (std::int64_t s = 0; s < steps; ++s)
        multiply(reinterpret_cast<const char*>(q + s * kDepth), 2 * depth, tile + s * kBlock, tile + (steps + s) * kBlock);
      store_sums(reinterpret_cast<float*>(scores) + key, stride);
      // Those of the block before: what a tile has just stored cannot be read at once.
      if (key) raise_maxima(scores, stride, key - kDepth, keys, top);
    }
    if (padded) raise_maxima(scores, stride, padded - kDepth, keys, top);
    float share[kRows];
    for (std::int64_t r = 0; r < kRows; ++r)
      share[r] = softmax(reinterpret_cast<float*>(scores + r * stride), top[r], keys, padded, a.scale);
    for (std::int64_t column = 0; column < a.dim; column += kDepth) {
      const char* tile = value_tiles + column * 2 * padded;
      clear_sums();
      for (std::int64_t key = 0; key < padded; key += kDepth)
        multiply(scores + 2 * key, stride, tile + key / kDepth * kBlock, tile + 2 * padded * kSide + key / kDepth * kBlock);
      store_sums(sums, 4 * kRows);
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = 0; c < kDepth && column + c < a.dim; c += kSide) {
          const Vec y = keys ? load(sums + r * kRows + c) * share[r] : Vec{};
          store(out + (token + r) * a.heads * a.dim + column + c, y, a.dim - column - c);
        }
    }
  }
}

}  // namespace PRESTO_RT_ISA
}  // namespace presto_rt

#endif
