// Overlap-add with window-square normalisation, the second half of an inverse short-time Fourier transform.
// presto_rt/overlap.py states the equation and holds the torch twin, which adds in the same order and gives the same bits.
#include "common.h"

namespace presto_rt {
namespace {

// out[f hop + j] += frames[f, j] window[j], frames in ascending order.
PRESTO_RT_MULTIVERSION
void add_frames(const float* frames, const float* window, float* out, std::int64_t count, std::int64_t size, std::int64_t hop) {
  for (std::int64_t f = 0; f < count; ++f) {
    const float* frame = frames + f * size;
    float* target = out + f * hop;
    for (std::int64_t j = 0; j < size; ++j) target[j] += frame[j] * window[j];
  }
}

PRESTO_RT_MULTIVERSION
void add_squares(const float* window, float* out, std::int64_t count, std::int64_t size, std::int64_t hop) {
  for (std::int64_t f = 0; f < count; ++f)
    for (std::int64_t j = 0; j < size; ++j) out[f * hop + j] += window[j] * window[j];
}

PRESTO_RT_MULTIVERSION
void divide(float* out, const float* envelope, std::int64_t total) {
  for (std::int64_t i = 0; i < total; ++i) out[i] /= envelope[i];
}

void overlap_add(Array<float> frames, Array<float> window, std::int64_t hop, Array<float> out, Array<float> envelope) {
  require(frames.ndim() == 3 && frames.shape(1) >= 1, "overlap_add: frames must have the shape (batch, frames >= 1, size)");
  const std::int64_t batch = frames.shape(0), count = frames.shape(1), size = frames.shape(2);
  require(hop >= 1 && hop <= size, "overlap_add: hop must be from 1 to the frame size");
  require(window.ndim() == 1 && window.shape(0) == size, "overlap_add: window must have the shape (size,)");
  const std::int64_t total = (count - 1) * hop + size;
  require(out.ndim() == 2 && out.shape(0) == batch && out.shape(1) == total,
          "overlap_add: out must have the shape (batch, (frames - 1) * hop + size)");
  require(envelope.ndim() == 1 && envelope.shape(0) == total, "overlap_add: envelope must be as long as a row of out");
  const float* source = frames.data();
  const float* shape = window.data();
  float* target = out.mutable_data();
  float* squares = envelope.mutable_data();
  py::gil_scoped_release release;
  for (std::int64_t i = 0; i < total; ++i) squares[i] = 0.0f;
  add_squares(shape, squares, count, size, hop);
  for (std::int64_t b = 0; b < batch; ++b) {
    float* row = target + b * total;
    for (std::int64_t i = 0; i < total; ++i) row[i] = 0.0f;
    add_frames(source + b * count * size, shape, row, count, size, hop);
    divide(row, squares, total);
  }
}

}  // namespace
}  // namespace presto_rt

void bind_overlap_add(pybind11::module_& module) {
  module.def("overlap_add", &presto_rt::overlap_add, pybind11::arg("frames").noconvert(), pybind11::arg("window").noconvert(),
             pybind11::arg("hop"), pybind11::arg("out").noconvert(), pybind11::arg("envelope").noconvert(),
             "Windows frames (batch, frames, size), overlaps and adds them into out (batch, total) and divides by the sum of\n"
             "squared windows, which goes to envelope (total,). All float32.");
}
