// Counter-based normal noise. presto_rt/diffusion/noise.py states the algorithm and holds the torch reference, which this
// equals to the bit: only correctly rounded fp32 operations, in a fixed order, without fused multiply-adds.
#include <cmath>
#include <cstring>

#include "philox.h"

namespace presto_rt {
namespace {

constexpr float fp32(double value) {
  return static_cast<float>(value);
}

PRESTO_RT_INLINE float as_float(std::int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

PRESTO_RT_INLINE std::int32_t as_int(float value) {
  std::int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// sqrt(-2 ln u) of a uniform u in (0, 1] made from one word.
PRESTO_RT_INLINE float radius(std::uint32_t word) {
  const float u = static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
  const std::int32_t bits = as_int(u);
  const std::int32_t exponent = (bits - 0x3F3504F3) >> 23;  // u = 2^exponent m, m in [sqrt(1/2), sqrt(2))
  const float m = as_float(bits - exponent * (1 << 23));
  const float s = (m - 1.0f) / (m + 1.0f);  // ln m = 2 artanh s
  const float t = s * s;
  float p = t * fp32(1.0 / 9.0) + fp32(1.0 / 7.0);
  p = t * p + fp32(1.0 / 5.0);
  p = t * p + fp32(1.0 / 3.0);
  const float artanh = (s * t) * p + s;
  const float ln = static_cast<float>(exponent) * fp32(0.6931471805599453) + artanh * 2.0f;
  return std::sqrt(ln * -2.0f);
}

// cos and sin of 2 pi word / 2^32: the quadrant by integers, the rest by polynomials on [-pi/4, pi/4).
PRESTO_RT_INLINE void circle(std::uint32_t word, float& cosine, float& sine) {
  const std::uint32_t shifted = word + 0x20000000u;
  const std::uint32_t quadrant = shifted >> 30;
  const std::int32_t rest = static_cast<std::int32_t>(shifted & 0x3FFFFFFFu) - 0x20000000;
  const float a = static_cast<float>(rest) * fp32(6.283185307179586 / 4294967296.0);
  const float b = a * a;
  float p = b * fp32(1.0 / 362880.0) + fp32(-1.0 / 5040.0);
  p = b * p + fp32(1.0 / 120.0);
  p = b * p + fp32(-1.0 / 6.0);
  const float s = (a * b) * p + a;
  float q = b * fp32(1.0 / 40320.0) + fp32(-1.0 / 720.0);
  q = b * q + fp32(1.0 / 24.0);
  q = b * q + -0.5f;
  const float c = b * q + 1.0f;
  const float x = quadrant & 1u ? s : c;
  const float y = quadrant & 1u ? c : s;
  cosine = (quadrant == 1u || quadrant == 2u) ? -x : x;
  sine = quadrant >= 2u ? -y : y;
}

PRESTO_RT_MULTIVERSION
void fill_normal(float* out, std::int64_t count, std::uint64_t seed, std::uint32_t stream) {
  alignas(64) std::uint32_t words[4][kLanes];
  alignas(64) float z[4][kLanes];
  for (std::int64_t start = 0; start < count; start += kWords) {
    random_words(words, seed, stream, static_cast<std::uint64_t>(start) / 4);
    for (int pair = 0; pair < 4; pair += 2) {
      for (int l = 0; l < kLanes; ++l) {
        float cosine, sine;
        circle(words[pair + 1][l], cosine, sine);
        const float r = radius(words[pair][l]);
        z[pair][l] = r * cosine;
        z[pair + 1][l] = r * sine;
      }
    }
    const std::int64_t n = count - start < kWords ? count - start : kWords;
    for (std::int64_t i = 0; i < n; ++i) out[start + i] = z[i & 3][i >> 2];
  }
}

void normal(const TensorView& out, std::uint64_t seed, std::uint32_t stream) {
  const std::int64_t count = out.numel("out");
  float* const data = out.data<float>("out");
  py::gil_scoped_release release;
  fill_normal(data, count, seed, stream);
}

// For the published test vectors, whose counters no stream has.
void philox(const TensorView& counters, std::uint64_t seed, const TensorView& out) {
  const std::int64_t count = counters.shape<2>("counters")[0];
  const std::uint32_t* const source = counters.data<const std::uint32_t>("counters", {count, 4});
  std::uint32_t* const target = out.data<std::uint32_t>("out", {count, 4});
  py::gil_scoped_release release;
  for (std::int64_t start = 0; start < count; start += kLanes) {
    std::uint32_t words[4][kLanes] = {};
    const std::int64_t n = count - start < kLanes ? count - start : kLanes;
    for (std::int64_t l = 0; l < n; ++l)
      for (int j = 0; j < 4; ++j) words[j][l] = source[(start + l) * 4 + j];
    philox4x32_10(words, seed);
    for (std::int64_t l = 0; l < n; ++l)
      for (int j = 0; j < 4; ++j) target[(start + l) * 4 + j] = words[j][l];
  }
}

const Registrar registrar([](py::module_& module) {
  module.def("normal", &normal, py::arg("out"), py::arg("seed"), py::arg("stream"),
             "Fill out, contiguous float32 of any shape, with standard normal noise.");
  module.def("philox", &philox, py::arg("counters"), py::arg("seed"), py::arg("out"),
             "Philox4x32-10 of counters (n, 4) uint32 under a 64-bit key, into out (n, 4) uint32.");
});

}  // namespace
}  // namespace presto_rt
