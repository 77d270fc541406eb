// Single-pass spectrogram inversion: a phase for each bin of a magnitude spectrogram, frame after frame.
// Source: Beauregard, Harish, Wyse, "Single Pass Spectrogram Inversion", DSP 2015.
//
// Each local maximum of a frame is taken for a sinusoid. A parabola through the maximum and its neighbours gives its
// frequency, its phase is that of the same bin one frame earlier plus frequency times hop, and all bins down to the valleys on
// both sides share it. Phases are kept relative to the frame's middle, where the lobe of a symmetric window has one phase; the
// factor (-1)^k at the end moves them to the frame's start, as an inverse FFT expects. Cosine and sine are computed once for
// each peak, not for each bin. The reference is presto_rt.models.spectral.spsi_numpy.
#include <cmath>
#include <complex>
#include <thread>
#include <vector>

#include "common.h"

namespace presto_rt {
namespace {

using Phasor = std::complex<float>;

constexpr double kTwoPi = 6.283185307179586476925286766559;

// One channel: magnitude and phasors are (frames, bins), contiguous.
void invert_channel(const float* magnitude, Phasor* phasors, std::int64_t frames, std::int64_t bins, std::int64_t hop,
                    std::int64_t n_fft) {
  std::vector<double> phase(bins, 0.0);
  const double step = kTwoPi * static_cast<double>(hop) / static_cast<double>(n_fft);
  for (std::int64_t t = 0; t < frames; ++t) {
    const float* m = magnitude + t * bins;
    Phasor* out = phasors + t * bins;
    std::int64_t start = 0;
    while (start < bins) {
      std::int64_t peak = start;
      while (peak + 1 < bins && m[peak + 1] > m[peak]) ++peak;
      std::int64_t end = peak;
      while (end + 1 < bins && m[end + 1] <= m[end]) ++end;

      double offset = 0.0;
      if (peak > 0 && peak + 1 < bins) {
        const double left = m[peak - 1], middle = m[peak], right = m[peak + 1];
        const double bend = left - 2.0 * middle + right;
        if (bend < 0.0) offset = 0.5 * (left - right) / bend;
      }
      const double angle = std::remainder(phase[peak] + step * (static_cast<double>(peak) + offset), kTwoPi);
      const Phasor value(static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle)));
      for (std::int64_t k = start; k <= end; ++k) {
        phase[k] = angle;
        out[k] = (k & 1) ? -value : value;
      }
      start = end + 1;
    }
  }
}

void spsi(const TensorView& magnitude, const TensorView& out, std::int64_t hop, std::int64_t n_fft) {
  const auto [channels, frames, bins] = magnitude.shape<3>("magnitude");
  require(hop > 0 && n_fft > 0 && bins == n_fft / 2 + 1, "magnitude: expected n_fft / 2 + 1 bins, and a hop above 0");
  const float* const source = magnitude.data<const float>("magnitude", {channels, frames, bins});
  Phasor* const phasors = out.data<Phasor>("out", {channels, frames, bins});
  py::gil_scoped_release release;
  std::vector<std::thread> workers;
  for (std::int64_t c = 1; c < channels; ++c)
    workers.emplace_back(invert_channel, source + c * frames * bins, phasors + c * frames * bins, frames, bins, hop, n_fft);
  if (channels > 0) invert_channel(source, phasors, frames, bins, hop, n_fft);
  for (std::thread& worker : workers) worker.join();
}

const Registrar registrar([](py::module_& module) {
  module.def("spsi", &spsi, py::arg("magnitude"), py::arg("out"), py::arg("hop"), py::arg("n_fft"),
             "Unit phasors of a magnitude spectrogram: magnitude (channels, frames, bins) float32 -> out, complex64.");
});

}  // namespace
}  // namespace presto_rt
