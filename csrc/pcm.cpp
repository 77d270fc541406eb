// Samples to integers: scale, dither, round, clamp and interleave in one pass.
// presto_rt/audio/pcm.py states the rule and holds the torch reference, which gives the same integers.
#include <cmath>

#include "philox.h"

namespace presto_rt {
namespace {

// samples (channels, frames) -> out (frames, channels). Element i of the flattened output takes word i of its Philox stream.
template <class T>
PRESTO_RT_INLINE void quantize_tiles(const float* samples, T* out, std::int64_t channels, std::int64_t frames, float scale,
                                     bool dither, std::uint64_t seed, std::uint32_t stream) {
  alignas(64) std::uint32_t words[4][kLanes];
  alignas(64) float x[kWords];
  alignas(64) float noise[kWords] = {};
  const std::int64_t count = channels * frames;
  std::int64_t channel = 0, frame = 0;
  for (std::int64_t start = 0; start < count; start += kWords) {
    const std::int64_t n = count - start < kWords ? count - start : kWords;
    if (channels == 2) {
      const float* left = samples + start / 2;
      for (std::int64_t i = 0; i < n; ++i) x[i] = left[(i & 1) * frames + (i >> 1)];
    } else {
      for (std::int64_t i = 0; i < n; ++i) {
        x[i] = samples[channel * frames + frame];
        if (++channel == channels) channel = 0, ++frame;
      }
    }
    if (dither) {
      random_words(words, seed, stream, static_cast<std::uint64_t>(start) / 4);
      for (int i = 0; i < kWords; ++i) {
        const std::uint32_t word = words[i & 3][i >> 2];
        const std::int32_t difference = static_cast<std::int32_t>(word & 0xFFFFu) - static_cast<std::int32_t>(word >> 16);
        noise[i] = static_cast<float>(difference) * 0x1p-16f;
      }
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const float finite = x[i] == x[i] ? x[i] : 0.0f;
      float y = std::nearbyint(finite * scale + noise[i]);
      y = y < -scale ? -scale : y;
      y = y > scale - 1.0f ? scale - 1.0f : y;
      out[start + i] = static_cast<T>(y);
    }
  }
}

PRESTO_RT_MULTIVERSION
void quantize(const float* samples, std::int16_t* out, std::int64_t channels, std::int64_t frames, bool dither,
              std::uint64_t seed, std::uint32_t stream) {
  quantize_tiles(samples, out, channels, frames, 32768.0f, dither, seed, stream);
}

PRESTO_RT_MULTIVERSION
void quantize(const float* samples, std::int32_t* out, std::int64_t channels, std::int64_t frames, bool dither,
              std::uint64_t seed, std::uint32_t stream) {
  quantize_tiles(samples, out, channels, frames, 8388608.0f, dither, seed, stream);
}

template <class T>
void quantize_into(const TensorView& samples, const TensorView& out, bool dither, std::uint64_t seed, std::uint32_t stream) {
  const auto [channels, frames] = samples.shape<2>("samples");
  const float* const source = samples.data<const float>("samples", {channels, frames});
  T* const target = out.data<T>("out", {frames, channels});
  py::gil_scoped_release release;
  quantize(source, target, channels, frames, dither, seed, stream);
}

void to_pcm(const TensorView& samples, const TensorView& out, bool dither, std::uint64_t seed, std::uint32_t stream) {
  if (out.holds<std::int32_t>()) return quantize_into<std::int32_t>(samples, out, dither, seed, stream);
  quantize_into<std::int16_t>(samples, out, dither, seed, stream);
}

const Registrar registrar([](py::module_& module) {
  module.def(
      "to_pcm", &to_pcm, py::arg("samples"), py::arg("out"), py::arg("dither"), py::arg("seed"), py::arg("stream"),
      "Samples (channels, frames) float32 -> out (frames, channels): 16-bit integers in int16, or 24-bit ones in int32.");
});

}  // namespace
}  // namespace presto_rt
