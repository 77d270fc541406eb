// Vectors of fp32, the vocabulary of the operators in this folder. Every file here is compiled once for each instruction set,
// with PRESTO_RT_ISA naming it and its namespace. Nothing from the standard library is inlined into these objects, so that no
// code compiled for a newer processor can be linked in where an older one runs.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define PRESTO_RT_INLINE inline __attribute__((always_inline))

namespace presto_rt {
namespace PRESTO_RT_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Bf16 = std::uint16_t;  // the upper half of an fp32 number

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kWidth)));

// Not Vec{} + x: that adds (-0.0 + 0.0 is 0.0), where a broadcast from memory costs nothing.
PRESTO_RT_INLINE Vec all(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

// a * b + c, rounded once where the instruction set can. All other products and sums stay apart (-ffp-contract=off).
PRESTO_RT_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

PRESTO_RT_INLINE Vec root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kWidth; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

PRESTO_RT_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

PRESTO_RT_INLINE Vec load(const Bf16* p) {
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)  // in one instruction; from the conversion below GCC 12 makes four
  return (Vec)((Words)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)h) << 16);
#else
  return (Vec)(__builtin_convertvector(h, Words) << 16);
#endif
}

PRESTO_RT_INLINE void store(float* p, Vec x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// To nearest, ties to even; NaN stays NaN and denormals stay denormals, as in torch (the processor's own instruction drops
// them).
PRESTO_RT_INLINE Halves to_bf16(Vec x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : Words{} + 0x7FC0u, Halves);
}

PRESTO_RT_INLINE void store(Bf16* p, Vec x) {
  const Halves h = to_bf16(x);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first n numbers, or all kWidth where n is larger; the others are 0 on loading and untouched on storing.
template <class T>
PRESTO_RT_INLINE Vec load(const T* p, std::int64_t n) {
  if (n >= kWidth) return load(p);
  T part[kWidth] = {};
  for (int i = 0; i < kWidth; ++i)
    if (i < n) part[i] = p[i];
  return load(part);
}

template <class T>
PRESTO_RT_INLINE void store(T* p, Vec x, std::int64_t n) {
  if (n >= kWidth) return store(p, x);
  T part[kWidth];
  store(part, x);
  for (int i = 0; i < kWidth; ++i)
    if (i < n) p[i] = part[i];
}

PRESTO_RT_INLINE float sum(Vec x) {
  typedef float Four __attribute__((vector_size(16)));
  Four part[kWidth / 4];
  __builtin_memcpy(part, &x, sizeof x);
  for (int i = 1; i < kWidth / 4; ++i) part[0] += part[i];
  return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}

// NaN in the first argument is lost, in the second kept.
PRESTO_RT_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

PRESTO_RT_INLINE Vec smaller(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

// e^x with about 1 ulp; 0 below -104, infinity above 88.8, NaN for NaN. x = n ln 2 + r, 2^n put together from two factors.
PRESTO_RT_INLINE Vec exp(Vec x) {
  x = smaller(all(89.0f), larger(all(-104.0f), x));
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec n = fma(x, all(1.44269504f), magic) - magic;
  Vec r = fma(n, all(-0.693145752f), x);
  r = fma(n, all(-1.42860677e-6f), r);
  Vec p = all(1.0f / 5040.0f);
  p = fma(p, r, all(1.0f / 720.0f));
  p = fma(p, r, all(1.0f / 120.0f));
  p = fma(p, r, all(1.0f / 24.0f));
  p = fma(p, r, all(1.0f / 6.0f));
  p = fma(p, r, all(0.5f));
  p = fma(p * r, r, r) + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)n);
#else
  const Ints whole = __builtin_convertvector(n == n ? n : Vec{}, Ints);
  const Ints half = whole >> 1;
  return p * (Vec)((half + 127) << 23) * (Vec)((whole - half + 127) << 23);
#endif
}

}  // namespace PRESTO_RT_ISA
}  // namespace presto_rt
