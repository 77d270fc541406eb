// Single-pass spectrogram inversion: a phase for each bin of a magnitude spectrogram, frame after frame.
// Source: Beauregard, Harish, Wyse, "Single Pass Spectrogram Inversion", DSP 2015.
//
// Each local maximum of a frame is taken for a sinusoid. A parabola through the maximum and its neighbours gives its
// frequency, its phase is that of the same bin one frame earlier plus frequency times hop, and all bins down to the valleys on
// both sides share it. Phases are kept relative to the frame's middle, where the lobe of a symmetric window has one phase; the
// factor (-1)^k at the end moves them to the frame's start, which is what an inverse FFT wants.
// Cosine and sine are taken once for each peak, not for each bin. The twin in Python is
// presto_rt.models.spectral.spsi_numpy.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <complex>
#include <stdexcept>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

using Phasor = std::complex<float>;

constexpr double kTwoPi = 6.283185307179586476925286766559;

// One channel: magnitude and phasors are (frames, bins), contiguous.
void invert_channel(const float* magnitude, Phasor* phasors, long frames, long bins, long hop, long n_fft) {
  std::vector<double> phase(bins, 0.0);
  const double step = kTwoPi * static_cast<double>(hop) / static_cast<double>(n_fft);
  for (long t = 0; t < frames; ++t) {
    const float* m = magnitude + t * bins;
    Phasor* out = phasors + t * bins;
    long start = 0;
    while (start < bins) {
      long peak = start;
      while (peak + 1 < bins && m[peak + 1] > m[peak]) ++peak;
      long end = peak;
      while (end + 1 < bins && m[end + 1] <= m[end]) ++end;

      double offset = 0.0;
      if (peak > 0 && peak + 1 < bins) {
        const double left = m[peak - 1], middle = m[peak], right = m[peak + 1];
        const double bend = left - 2.0 * middle + right;
        if (bend < 0.0) offset = 0.5 * (left - right) / bend;
      }
      const double angle = std::remainder(phase[peak] + step * (static_cast<double>(peak) + offset), kTwoPi);
      const Phasor value(static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle)));
      for (long k = start; k <= end; ++k) {
        phase[k] = angle;
        out[k] = (k & 1) ? -value : value;
      }
      start = end + 1;
    }
  }
}

py::array_t<Phasor> spsi(const py::array_t<float, py::array::c_style | py::array::forcecast>& magnitude, long hop, long n_fft) {
  if (magnitude.ndim() != 3) throw std::invalid_argument("spsi: magnitude must have the shape (channels, frames, bins)");
  const long channels = magnitude.shape(0), frames = magnitude.shape(1), bins = magnitude.shape(2);
  if (hop <= 0 || n_fft <= 0 || bins != n_fft / 2 + 1)
    throw std::invalid_argument("spsi: bins must be n_fft / 2 + 1 and hop above 0");
  py::array_t<Phasor> phasors({channels, frames, bins});
  const float* in = magnitude.data();
  Phasor* out = phasors.mutable_data();
  {
    py::gil_scoped_release release;
    std::vector<std::thread> workers;
    for (long c = 1; c < channels; ++c)
      workers.emplace_back(invert_channel, in + c * frames * bins, out + c * frames * bins, frames, bins, hop, n_fft);
    if (channels > 0) invert_channel(in, out, frames, bins, hop, n_fft);
    for (std::thread& worker : workers) worker.join();
  }
  return phasors;
}

}  // namespace

void bind_spsi(py::module_& module) {
  module.def("spsi", &spsi, py::arg("magnitude"), py::arg("hop"), py::arg("n_fft"),
             "Unit phasors (channels, frames, bins), complex64, for a float32 magnitude spectrogram of that shape.");
}
