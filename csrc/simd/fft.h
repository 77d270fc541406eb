// The discrete Fourier transform of 2048 real numbers, as one of 1024 complex numbers laid out as a 32 x 32 matrix (Bailey's
// four steps): transforms of 32 along the columns, which vectors do side by side, a twiddle, a transpose, and the columns once
// more. Samples lie in two planes, even ones and odd ones, which are the real and the imaginary part of those complex numbers.
#pragma once

#include <cstdint>

#ifdef PRESTO_RT_ISA
#include "vector.h"
#endif

namespace presto_rt {

constexpr std::int64_t kFft = 2048, kHalf = kFft / 2, kPad = 64;

// Made once in fp64 by simd/spectral.cpp.
struct FftTables {
  float turn_re[kHalf], turn_im[kHalf];  // e^(-2 pi i row column / 1024)
  float cosine[kHalf], sine[kHalf];      // of 2 pi k / 2048
  float small_re[32], small_im[32];      // e^(-2 pi i b k / 32) at b * 8 + k
};

// Two planes of 1024 (and one more number, the Nyquist bin of a spectrum), padded so that whole vectors may be read at the end.
struct Planes {
  alignas(64) float re[kHalf + kPad], im[kHalf + kPad];
};

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {

#if defined(__AVX512F__)
#define PRESTO_RT_LOW {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define PRESTO_RT_HIGH {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#define PRESTO_RT_BACK {15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}
#elif defined(__AVX2__)
#define PRESTO_RT_LOW {0, 8, 1, 9, 2, 10, 3, 11}
#define PRESTO_RT_HIGH {4, 12, 5, 13, 6, 14, 7, 15}
#define PRESTO_RT_BACK {7, 6, 5, 4, 3, 2, 1, 0}
#else
#define PRESTO_RT_LOW {0, 4, 1, 5}
#define PRESTO_RT_HIGH {2, 6, 3, 7}
#define PRESTO_RT_BACK {3, 2, 1, 0}
#endif

// The lower halves of a and b, element by element in turn, and the upper halves.
PRESTO_RT_INLINE Vec interleave_low(Vec a, Vec b) {
  const Ints order = PRESTO_RT_LOW;
  return __builtin_shuffle(a, b, order);
}

PRESTO_RT_INLINE Vec interleave_high(Vec a, Vec b) {
  const Ints order = PRESTO_RT_HIGH;
  return __builtin_shuffle(a, b, order);
}

PRESTO_RT_INLINE Vec backwards(Vec x) {
  const Ints order = PRESTO_RT_BACK;
  return __builtin_shuffle(x, order);
}

struct Complex {
  Vec re, im;
};

PRESTO_RT_INLINE Complex operator+(Complex a, Complex b) {
  return {a.re + b.re, a.im + b.im};
}

PRESTO_RT_INLINE Complex operator-(Complex a, Complex b) {
  return {a.re - b.re, a.im - b.im};
}

PRESTO_RT_INLINE Complex operator*(Complex a, Complex b) {
  return {fma(a.re, b.re, -(a.im * b.im)), fma(a.re, b.im, a.im * b.re)};
}

// Times -i.
PRESTO_RT_INLINE Complex quarter(Complex a) {
  return {a.im, -a.re};
}

PRESTO_RT_INLINE void dft4(Complex& a, Complex& b, Complex& c, Complex& d) {
  const Complex even = a + c, odd = b + d, even_less = a - c, odd_less = quarter(b - d);
  a = even + odd;
  b = even_less + odd_less;
  c = even - odd;
  d = even_less - odd_less;
}

PRESTO_RT_INLINE void dft8(Complex x[8]) {
  dft4(x[0], x[2], x[4], x[6]);
  dft4(x[1], x[3], x[5], x[7]);
  const float r = 0.70710678118654752f;
  const Complex w1{(x[3].re + x[3].im) * r, (x[3].im - x[3].re) * r}, w2 = quarter(x[5]);
  const Complex w3{(x[7].im - x[7].re) * r, (x[7].re + x[7].im) * -r};
  const Complex e0 = x[0], e1 = x[2], e2 = x[4], e3 = x[6], o0 = x[1];
  x[0] = e0 + o0;
  x[1] = e1 + w1;
  x[2] = e2 + w2;
  x[3] = e3 + w3;
  x[4] = e0 - o0;
  x[5] = e1 - w1;
  x[6] = e2 - w2;
  x[7] = e3 - w3;
}

// Transforms of 32 along the columns of a 32 x 32 matrix, in place: 32 = 4 times 8.
PRESTO_RT_INLINE void columns(float* re, float* im, const FftTables& t) {
  for (int c = 0; c < 32; c += kWidth) {
    Complex y[32];
    for (int b = 0; b < 4; ++b) {
      Complex* part = y + 8 * b;
      for (int a = 0; a < 8; ++a) part[a] = {load(re + (4 * a + b) * 32 + c), load(im + (4 * a + b) * 32 + c)};
      dft8(part);
      if (b)
        for (int k = 1; k < 8; ++k) part[k] = part[k] * Complex{all(t.small_re[8 * b + k]), all(t.small_im[8 * b + k])};
    }
    for (int k = 0; k < 8; ++k) {
      dft4(y[k], y[8 + k], y[16 + k], y[24 + k]);
      for (int q = 0; q < 4; ++q) {
        store(re + (k + 8 * q) * 32 + c, y[8 * q + k].re);
        store(im + (k + 8 * q) * 32 + c, y[8 * q + k].im);
      }
    }
  }
}

PRESTO_RT_INLINE void transpose(Vec x[kWidth]) {
  for (int size = 1; size < kWidth; size *= 2) {
    Vec y[kWidth];
    for (int i = 0; i < kWidth / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + kWidth / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + kWidth / 2]);
    }
    for (int i = 0; i < kWidth; ++i) x[i] = y[i];
  }
}

// 1024 complex numbers, forward and unscaled; `work` is overwritten. With the planes swapped on the way in and out it is the
// inverse.
inline void fft(float* re, float* im, Planes& work, const FftTables& t) {
  columns(re, im, t);
  for (int row = 0; row < 32; row += kWidth)
    for (int c = 0; c < 32; c += kWidth) {
      Vec a[kWidth], b[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int at = (row + i) * 32 + c;
        const Complex x = Complex{load(re + at), load(im + at)} * Complex{load(t.turn_re + at), load(t.turn_im + at)};
        a[i] = x.re, b[i] = x.im;
      }
      transpose(a);
      transpose(b);
      for (int i = 0; i < kWidth; ++i) {
        store(work.re + (c + i) * 32 + row, a[i]);
        store(work.im + (c + i) * 32 + row, b[i]);
      }
    }
  columns(work.re, work.im, t);
  __builtin_memcpy(re, work.re, sizeof(float) * kHalf);
  __builtin_memcpy(im, work.im, sizeof(float) * kHalf);
}

// Samples in planes -> bins 0 ... 1024, in place.
inline void forward_real(Planes& x, Planes& work, const FftTables& t) {
  fft(x.re, x.im, work, t);
  float *zr = work.re, *zi = work.im;  // a copy of the transform, periodic
  zr[kHalf] = zr[0], zi[kHalf] = zi[0];
  for (std::int64_t k = 0; k < kHalf; k += kWidth) {
    const std::int64_t mirror = kHalf - k - kWidth + 1;
    const Vec ar = load(zr + k), ai = load(zi + k), br = backwards(load(zr + mirror)), bi = backwards(load(zi + mirror));
    const Complex even{(ar + br) * 0.5f, (ai - bi) * 0.5f}, odd{(ai + bi) * 0.5f, (br - ar) * 0.5f};
    const Complex y = even + odd * Complex{load(t.cosine + k), -load(t.sine + k)};
    store(x.re + k, y.re);
    store(x.im + k, y.im);
  }
  x.re[kHalf] = zr[0] - zi[0];
  x.im[kHalf] = 0.0f;
}

// Bins 0 ... 1024 -> samples in planes times 1024, in place. The imaginary parts of the first and the last bin count as 0.
inline void inverse_real(Planes& x, Planes& work, const FftTables& t) {
  x.im[0] = x.im[kHalf] = 0.0f;
  for (std::int64_t k = 0; k < kHalf; k += kWidth) {
    const std::int64_t mirror = kHalf - k - kWidth + 1;
    const Vec ar = load(x.re + k), ai = load(x.im + k), br = backwards(load(x.re + mirror));
    const Vec bi = backwards(load(x.im + mirror));
    const Complex even{(ar + br) * 0.5f, (ai - bi) * 0.5f}, odd{(ar - br) * 0.5f, (ai + bi) * 0.5f};
    const Complex turned = odd * Complex{load(t.cosine + k), load(t.sine + k)};
    store(work.re + k, even.re - turned.im);
    store(work.im + k, even.im + turned.re);
  }
  fft(work.im, work.re, x, t);
  __builtin_memcpy(x.re, work.re, sizeof(float) * kHalf);
  __builtin_memcpy(x.im, work.im, sizeof(float) * kHalf);
}

}  // namespace PRESTO_RT_ISA
#endif

}  // namespace presto_rt
