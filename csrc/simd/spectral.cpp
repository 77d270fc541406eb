// From the codec's features to samples in one pass over time: magnitudes, phases by single-pass spectrogram inversion, fast
// Griffin-Lim iterations and overlap-add. presto_rt/models/spectral.py states the equations and holds the torch
// reference.
//
// A frame of one iteration depends on the frames up to three later of the iteration before, so all iterations run at once, each
// three frames behind the one before. The data they exchange stays in the L2 cache, and the memory needed does not grow
// with the clip. Left and right are independent but for the phases, so two threads process a channel each and both compute the
// phases.
#include "fft.h"
#include "operator.h"

namespace presto_rt {

constexpr std::int64_t kHop = 512, kParts = kFft / kHop, kBins = kHalf + 1, kRow = kHalf + kPad, kRing = 8;

struct SpectralTables {
  FftTables fft;
  float analysis[kFft], synthesis[kFft], square[kFft];  // windows in planes: 1024 even samples, then 1024 odd ones
};

struct Spectral {
  const float* features;      // (frames, 3, bands): log-magnitudes of mid and side, cosine of the angle between them
  const float* gain;          // (kRow,) factor of each bin
  const std::int32_t* below;  // (kRow,) the band below each bin
  const float* fraction;      // (kRow,) how far the bin is towards the band above
  float* out;                 // (2, frames * kHop)
  float* memory;              // spectral_memory(iterations) floats, zeroed
  const SpectralTables* tables;
  std::int64_t frames, bands, iterations;
  float momentum, floor;
};

// One channel at one iteration.
struct Level {
  float ring[kRing][kHop];  // sums of windowed frames, a hop each; in planes: 256 even samples, then 256 odd ones
  Planes before[4];         // this iteration's spectra, for the momentum of the next
};

struct Frame {
  alignas(64) float left_right[2][kRow];  // magnitudes
};

struct Shared {
  alignas(64) float mid[kRow], side[kRow], cosine[kRow], energy[kRow];
  alignas(64) float pair[2][2][kRow];     // left and right, real and imaginary part, before the phase
  alignas(64) std::uint32_t phase[kRow];  // 2^32 is one turn
  alignas(64) float bands[4096];
  Planes spectrum, work;
};

inline std::int64_t spectral_kept(std::int64_t iterations) {
  return 3 * iterations + 1;
}

inline std::int64_t spectral_memory(std::int64_t iterations) {
  const std::int64_t bytes = sizeof(Shared) + 2 * (iterations + 1) * sizeof(Level) + spectral_kept(iterations) * sizeof(Frame);
  return bytes / 4;
}

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {
namespace {

// A row of bands -> bins. Neighbouring bins lie in neighbouring bands, so one load and a permutation fetch all of a vector's.
PRESTO_RT_INLINE void to_bins(const Spectral& a, const float* bands, float* padded, float* bins) {
  __builtin_memcpy(padded, bands, sizeof(float) * static_cast<std::size_t>(a.bands));
  for (std::int64_t k = 0; k < kBins; k += kWidth) {
    const float* from = padded + a.below[k];
    Ints index;
    __builtin_memcpy(&index, a.below + k, sizeof index);
    index -= a.below[k];
    const Vec low = __builtin_shuffle(load(from), index), high = __builtin_shuffle(load(from + 1), index);
    store(bins + k, fma(load(a.fraction + k), high - low, low));
  }
}

PRESTO_RT_INLINE Vec magnitude(Vec logs, float floor) {
  const Vec power = larger(exp(logs * 2.0f) - floor, Vec{});
  return root(larger(power * power / (power + 0.3f * floor), all(1e-16f)));
}

// Magnitudes and, before the phase, real and imaginary parts of both channels. The louder of mid and side lies on the real
// axis.
void read_frame(const Spectral& a, std::int64_t t, Shared& s, Frame& frame) {
  const float* row = a.features + t * 3 * a.bands;
  to_bins(a, row, s.bands, s.mid);
  to_bins(a, row + a.bands, s.bands, s.side);
  to_bins(a, row + 2 * a.bands, s.bands, s.cosine);
  for (std::int64_t k = 0; k < kBins; k += kWidth) {
    const Vec gain = load(a.gain + k);
    const Vec mid = magnitude(load(s.mid + k), a.floor) * gain, side = magnitude(load(s.side + k), a.floor) * gain;
    const Vec cosine = larger(smaller(load(s.cosine + k), all(1.0f)), all(-1.0f));
    const Vec sine = root(1.0f - cosine * cosine);
    const Vec zero{};
    const Vec mid_re = mid >= side ? mid : mid * cosine, mid_im = mid >= side ? zero : -(mid * sine);
    const Vec side_re = mid >= side ? side * cosine : side, side_im = mid >= side ? side * sine : zero;
    const Vec pair[2][2] = {{mid_re + side_re, mid_im + side_im}, {mid_re - side_re, mid_im - side_im}};
    for (int c = 0; c < 2; ++c) {
      store(s.pair[c][0] + k, pair[c][0]);
      store(s.pair[c][1] + k, pair[c][1]);
      store(frame.left_right[c] + k, root(fma(pair[c][0], pair[c][0], pair[c][1] * pair[c][1])));
    }
    store(s.energy + k, root(fma(mid, mid, side * side)));
  }
}

// The step of single-pass spectrogram inversion: see spsi.cpp. Phases are whole numbers of 2^-32 turns and wrap by themselves.
void advance_phases(const float* m, std::uint32_t* phase) {
  std::int64_t start = 0;
  while (start < kBins) {
    std::int64_t peak = start;
    while (peak + 1 < kBins && m[peak + 1] > m[peak]) ++peak;
    std::int64_t end = peak;
    while (end + 1 < kBins && m[end + 1] <= m[end]) ++end;
    double offset = 0.0;
    if (peak > 0 && peak + 1 < kBins) {
      const double left = m[peak - 1], middle = m[peak], right = m[peak + 1], bend = left - 2.0 * middle + right;
      if (bend < 0.0) offset = 0.5 * (left - right) / bend;
    }
    // One hop is a quarter of the transform: bin k advances by k / 4 turns.
    const std::uint32_t step = static_cast<std::uint32_t>(peak) << 30;
    const std::uint32_t angle = phase[peak] + step + static_cast<std::uint32_t>(static_cast<std::int64_t>(offset * 0x1p30));
    for (std::int64_t k = start; k <= end; ++k) phase[k] = angle;
    start = end + 1;
  }
}

// cos and sin of 2 pi turns / 2^32: the quadrant by integers, the rest by polynomials, as in noise.cpp.
PRESTO_RT_INLINE Complex circle(Words turns) {
  const Words shifted = turns + 0x20000000u, quadrant = shifted >> 30;
  const Ints rest = (Ints)(shifted & 0x3FFFFFFFu) - 0x20000000;
  const Vec a = __builtin_convertvector(rest, Vec) * static_cast<float>(6.283185307179586 / 4294967296.0), b = a * a;
  Vec p = fma(b, all(1.0f / 362880.0f), all(-1.0f / 5040.0f));
  p = fma(p, b, all(1.0f / 120.0f));
  p = fma(p, b, all(-1.0f / 6.0f));
  const Vec sine = fma(a * b, p, a);
  Vec q = fma(b, all(1.0f / 40320.0f), all(-1.0f / 720.0f));
  q = fma(q, b, all(1.0f / 24.0f));
  q = fma(q, b, all(-0.5f));
  const Vec cosine = fma(b, q, all(1.0f));
  const Vec x = (quadrant & 1u) != 0 ? sine : cosine, y = (quadrant & 1u) != 0 ? cosine : sine;
  return {((quadrant + 1u) & 2u) != 0 ? -x : x, (quadrant & 2u) != 0 ? -y : y};
}

void first_spectrum(const Shared& s, int channel, Planes& out) {
  Words odd;
  for (int i = 0; i < kWidth; ++i)
    odd[i] = static_cast<std::uint32_t>(i & 1) << 31;  // (-1)^k: from the frame's middle to its start
  for (std::int64_t k = 0; k < kBins; k += kWidth) {
    Words turns;
    __builtin_memcpy(&turns, s.phase + k, sizeof turns);
    const Complex y = Complex{load(s.pair[channel][0] + k), load(s.pair[channel][1] + k)} * circle(turns + odd);
    store(out.re + k, y.re);
    store(out.im + k, y.im);
  }
}

// The spectrum of the signal so far, its phase pushed on by the momentum, with the wanted magnitude. `before`: the spectrum of
// the iteration before, or null; `kept`: where this one goes for the next iteration, or null.
void refine(const Spectral& a, Level& signal, std::int64_t t, const Planes* before, Planes* kept, const float* wanted,
            Shared& s) {
  for (std::int64_t part = 0; part < kParts; ++part) {
    const float* hop = signal.ring[(t + part) % kRing];
    const float* window = a.tables->analysis + part * kHop / 2;
    for (std::int64_t i = 0; i < kHop / 2; i += kWidth) {
      store(s.spectrum.re + part * kHop / 2 + i, load(hop + i) * load(window + i));
      store(s.spectrum.im + part * kHop / 2 + i, load(hop + kHop / 2 + i) * load(window + kHalf + i));
    }
  }
  forward_real(s.spectrum, s.work, a.tables->fft);
  for (std::int64_t k = 0; k < kBins; k += kWidth) {
    Vec re = load(s.spectrum.re + k), im = load(s.spectrum.im + k);
    if (kept) {
      store(kept->re + k, re);
      store(kept->im + k, im);
    }
    if (before) {
      re = fma(re - load(before->re + k), all(a.momentum), re);
      im = fma(im - load(before->im + k), all(a.momentum), im);
    }
    const Vec factor = load(wanted + k) / larger(root(fma(re, re, im * im)), all(1e-9f));
    store(s.spectrum.re + k, re * factor);
    store(s.spectrum.im + k, im * factor);
  }
}

// Adds the frame to the hops that it covers.
void add_frame(const Spectral& a, Level& signal, std::int64_t t, Shared& s) {
  inverse_real(s.spectrum, s.work, a.tables->fft);
  for (std::int64_t part = 0; part < kParts; ++part) {
    float* hop = signal.ring[(t + part) % kRing];
    const float* window = a.tables->synthesis + part * kHop / 2;
    for (std::int64_t i = 0; i < kHop / 2; i += kWidth) {
      store(hop + i, fma(load(s.spectrum.re + part * kHop / 2 + i), load(window + i), load(hop + i)));
      float* second = hop + kHop / 2 + i;
      store(second, fma(load(s.spectrum.im + part * kHop / 2 + i), load(window + kHalf + i), load(second)));
    }
  }
}

// Finishes a hop that has all its frames: divides by their squared windows and silences the 768 samples outside the clip at
// both ends.
void finish_hop(const Spectral& a, Level& signal, std::int64_t hop) {
  float* x = signal.ring[hop % kRing];
  for (std::int64_t half = 0; half < 2; ++half)
    for (std::int64_t i = 0; i < kHop / 2; i += kWidth) {
      Vec weight{};
      for (std::int64_t part = 0; part < kParts; ++part)
        if (hop >= part && hop - part < a.frames) weight += load(a.tables->square + half * kHalf + part * kHop / 2 + i);
      const bool inside = hop >= 1 + (i < kHop / 4) && hop <= a.frames + (i < kHop / 4);
      float* at = x + half * kHop / 2 + i;
      store(at, inside ? load(at) / larger(weight, all(1e-3f)) : Vec{});
    }
}

// Samples of a finished hop to where they belong, even and odd ones in turn again.
void write_hop(const Spectral& a, const Level& signal, std::int64_t hop, float* out) {
  const float* x = signal.ring[hop % kRing];
  const std::int64_t first = hop * kHop - 3 * kHop / 2, last = a.frames * kHop;
  for (std::int64_t i = 0; i < kHop / 2; i += kWidth) {
    const std::int64_t at = first + 2 * i;
    if (at < 0 || at >= last) continue;
    const Vec even = load(x + i), odd = load(x + kHop / 2 + i);
    store(out + at, interleave_low(even, odd));
    store(out + at + kWidth, interleave_high(even, odd));
  }
}

}  // namespace

// Channels first ... last - 1 of one clip.
void spectral(const Spectral& a, int first, int last) {
  Shared& s = *reinterpret_cast<Shared*>(a.memory);
  Level* levels = reinterpret_cast<Level*>(&s + 1);  // by channel and iteration
  const std::int64_t depth = a.iterations + 1, kept = spectral_kept(a.iterations);
  Frame* frames = reinterpret_cast<Frame*>(levels + 2 * depth);
  for (std::int64_t now = 0; now < a.frames + 3 * depth; ++now) {
    if (now < a.frames) {
      read_frame(a, now, s, frames[now % kept]);
      advance_phases(s.energy, s.phase);
    }
    for (int channel = first; channel < last; ++channel)
      for (std::int64_t level = 0; level < depth; ++level) {
        const std::int64_t t = now - 3 * level;
        if (t < 0 || t >= a.frames + 3) continue;
        Level& here = levels[channel * depth + level];
        if (t < a.frames) {
          if (level == 0) {
            first_spectrum(s, channel, s.spectrum);
          } else {
            Planes* mine = level < a.iterations ? &here.before[t % 4] : nullptr;
            const Planes* before = level > 1 ? &(&here)[-1].before[t % 4] : nullptr;
            refine(a, (&here)[-1], t, before, mine, frames[t % kept].left_right[channel], s);
          }
          add_frame(a, here, t, s);
        }
        finish_hop(a, here, t);
        if (level == a.iterations) write_hop(a, here, t, a.out + channel * a.frames * kHop);
        // The hop that the next frame reaches first must be empty; the readers of its old content are done.
        __builtin_memset(here.ring[(t + kParts) % kRing], 0, sizeof here.ring[0]);
      }
  }
}

}  // namespace PRESTO_RT_ISA
#else

PRESTO_RT_VARIANTS(spectral, const Spectral&, int, int)

namespace {

constexpr double kTurn = 6.283185307179586476925286766559;

std::unique_ptr<SpectralTables> make_tables() {
  auto t = std::make_unique<SpectralTables>();
  for (int k = 0; k < kHalf; ++k) {
    const double turn = kTurn * (k / 32) * (k % 32) / kHalf, real = kTurn * k / kFft,
                 small = kTurn * (k / 8 % 4) * (k % 8) / 32;
    t->fft.turn_re[k] = static_cast<float>(std::cos(turn));
    t->fft.turn_im[k] = static_cast<float>(-std::sin(turn));
    t->fft.cosine[k] = static_cast<float>(std::cos(real));
    t->fft.sine[k] = static_cast<float>(std::sin(real));
    t->fft.small_re[k % 32] = static_cast<float>(std::cos(small));
    t->fft.small_im[k % 32] = static_cast<float>(-std::sin(small));
  }
  for (int i = 0; i < kFft; ++i) {
    const int at = i % 2 * kHalf + i / 2;
    const double window = 0.5 - 0.5 * std::cos(kTurn * i / kFft);
    t->analysis[at] = static_cast<float>(window * 4.0 / kFft);  // a full-scale sine has magnitude 1
    t->synthesis[at] = static_cast<float>(window * 0.5);        // the transform leaves a factor of 1024
    t->square[at] = static_cast<float>(window * window);
  }
  return t;
}

void spectral_call(const TensorView& features, const TensorView& gain, const TensorView& below, const TensorView& fraction,
                   const TensorView& out, std::int64_t iterations, float momentum, float floor, int threads) {
  const auto [batch, frames, parts, bands] = features.shape<4>("features");
  require(frames >= 1 && parts == 3 && bands >= 2 && bands <= 4000,
          "features: expected the shape (batch, frames, 3, bands) with 2 to 4000 bands");
  require(iterations >= 0 && iterations <= 64, "iterations: expected 0 to 64");
  const float* const source = features.data<const float>("features", {batch, frames, 3, bands});
  const float* const factor = gain.data<const float>("gain", {kRow});
  const std::int32_t* const index = below.data<const std::int32_t>("below", {kRow});
  const float* const part = fraction.data<const float>("fraction", {kRow});
  float* const target = out.data<float>("out", {batch, 2, frames * kHop});
  for (std::int64_t k = 0; k < kRow; ++k) {
    const bool near = k == 0 || (index[k] >= index[k - 1] && index[k] <= index[k - 1] + 1);
    require(index[k] >= 0 && index[k] <= bands - 2 && near, "below: expected indices of bands that rise by 0 or 1");
  }
  static const std::unique_ptr<SpectralTables> tables = make_tables();
  const std::int64_t shares = threads > 1 ? 2 : 1, size = spectral_memory(iterations);
  const auto variant = spectral_variant();
  py::gil_scoped_release release;
  parallel(threads, batch * shares, [&, frames = frames, bands = bands](std::int64_t share) {
    std::vector<float> memory(static_cast<std::size_t>(size) + 16, 0.0f);
    const std::uintptr_t start = (reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64;
    const std::int64_t clip = share / shares;
    const int channel = static_cast<int>(share % shares);
    const Spectral a{source + clip * frames * 3 * bands,
                     factor,
                     index,
                     part,
                     target + clip * 2 * frames * kHop,
                     reinterpret_cast<float*>(start),
                     tables.get(),
                     frames,
                     bands,
                     iterations,
                     momentum,
                     floor};
    variant(a, channel, shares == 2 ? channel + 1 : 2);
  });
}

const Registrar registrar([](py::module_& module) {
  module.def("spectral", &spectral_call, py::arg("features"), py::arg("gain"), py::arg("below"), py::arg("fraction"),
             py::arg("out"), py::arg("iterations"), py::arg("momentum"), py::arg("floor"), py::arg("threads"),
             "Features (B, F, 3, bands) -> samples, out (B, 2, 512 F), both float32, by fast Griffin-Lim iterations.\n\n"
             "gain, fraction (float32) and below (int32), all (1088,): each bin's factor and its place among the bands.");
});

}  // namespace
#endif

}  // namespace presto_rt
