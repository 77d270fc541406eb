// Residual sum, mix of five frames and layer norm, between two matrix products of the codec's blocks and of the text encoder:
//
//   r[t] = source[t] + branch[t]                         fp32; either may be null: 0
//   m[t] = sum over k of mix[k] r[t + k - 2]             five frames of the clip, zeros outside it; mix = null: m = r
//   y[t] = (m - mean m) / sqrt(var m + eps) * weight + bias                                 weight = null: y = m
//
// y goes to out, and r to residual in fp32; `after` (a post-norm network) writes y to residual instead. With a mix the residual
// must be another buffer than the source: neighbours of a frame may belong to another thread.
#include "operator.h"

namespace presto_rt {

constexpr std::int64_t kTaps = 5, kWidest = 4096;

struct MixNorm {
  const float* source;         // (batch, frames, width) or null
  const void* branch;          // the same, as out; or null
  const float* mix;            // (5, width) or null
  const float *weight, *bias;  // (width,) or null
  float* residual;             // (batch, frames, width) or null
  void* out;                   // the same, fp32 or bf16
  std::int64_t frames, width;
  float eps;
  bool bf16, after;  // after: residual takes y
};

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {
namespace {

template <class T>
PRESTO_RT_INLINE Vec added(const MixNorm& a, std::int64_t at, std::int64_t n) {
  Vec x{};
  if (a.source) x = load(a.source + at, n);
  if (a.branch) x += load(static_cast<const T*>(a.branch) + at, n);
  return x;
}

template <class T>
void rows(const MixNorm& a, std::int64_t first, std::int64_t last) {
  const std::int64_t width = a.width, whole = width / kWidth * kWidth;
  alignas(64) float mixed[kWidest + 16];
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t t = row % a.frames, at = row * width;
    const std::int64_t from = t < 2 ? 2 - t : 0, left = a.frames - t + 2, to = left < kTaps ? left : kTaps;
    Vec total{};
    for (std::int64_t i = 0; i < width; i += kWidth) {
      const std::int64_t n = width - i;
      const Vec r = added<T>(a, at + i, n);
      if (a.residual && !a.after) store(a.residual + at + i, r, n);
      Vec m = r;
      if (a.mix) {
        m = r * load(a.mix + 2 * width + i, n);
        for (std::int64_t k = from; k < to; ++k)
          if (k != 2) m = fma(added<T>(a, at + (k - 2) * width + i, n), load(a.mix + k * width + i, n), m);
      }
      store(mixed + i, m);
      total += m;
    }
    T* out = static_cast<T*>(a.out) + at;
    if (!a.weight) {
      for (std::int64_t i = 0; i < width; i += kWidth) store(out + i, load(mixed + i), width - i);
      continue;
    }
    const float mean = sum(total) / static_cast<float>(width);
    Vec squares{};
    for (std::int64_t i = 0; i < whole; i += kWidth) {
      const Vec x = load(mixed + i) - mean;
      squares = fma(x, x, squares);
    }
    float square = sum(squares);
    for (std::int64_t i = whole; i < width; ++i) square += (mixed[i] - mean) * (mixed[i] - mean);
    const float factor = 1.0f / __builtin_sqrtf(square / static_cast<float>(width) + a.eps);
    for (std::int64_t i = 0; i < width; i += kWidth) {
      const std::int64_t n = width - i;
      const Vec y = fma((load(mixed + i) - mean) * factor, load(a.weight + i, n), load(a.bias + i, n));
      if (a.residual && a.after) store(a.residual + at + i, y, n);
      store(out + i, y, n);
    }
  }
}

}  // namespace

void mix_norm(const MixNorm& a, std::int64_t first, std::int64_t last) {
  a.bf16 ? rows<Bf16>(a, first, last) : rows<float>(a, first, last);
}

}  // namespace PRESTO_RT_ISA
#else

PRESTO_RT_VARIANTS(mix_norm, const MixNorm&, std::int64_t, std::int64_t)

namespace {

void mix_norm_call(const TensorView& source, const TensorView& branch, const TensorView& mix, const TensorView& weight,
                   const TensorView& bias, const TensorView& residual, const TensorView& out, float eps, bool after,
                   int threads) {
  const auto [batch, frames, width] = out.shape<3>("out");
  const bool bf16 = out.is_bf16("out");
  const Dtype dtype = bf16 ? kBfloat16 : kFloat32;
  require(frames >= 1 && width >= 1 && width <= kWidest, "out: expected at least one frame and a width of 1 to 4096");
  require(source || branch, "source: expected source or branch; got None for both");
  require(static_cast<bool>(weight) == static_cast<bool>(bias), "bias: expected together with weight");
  require(!after || weight, "after: expected a weight to normalize with; got None");
  const MixNorm a{source.data_or_null<const float>("source", {batch, frames, width}),
                  branch.data_or_null("branch", dtype, {batch, frames, width}),
                  mix.data_or_null<const float>("mix", {kTaps, width}),
                  weight.data_or_null<const float>("weight", {width}),
                  bias.data_or_null<const float>("bias", {width}),
                  residual.data_or_null<float>("residual", {batch, frames, width}),
                  out.data("out", dtype, {batch, frames, width}),
                  frames,
                  width,
                  eps,
                  bf16,
                  after};
  require(!a.mix || !a.residual || a.residual != a.source, "residual: with a mix it must not be the source");
  const auto variant = mix_norm_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, batch * frames, 8, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

const Registrar registrar([](py::module_& module) {
  module.def("mix_norm", &mix_norm_call, py::arg("source"), py::arg("branch"), py::arg("mix"), py::arg("weight"),
             py::arg("bias"), py::arg("residual"), py::arg("out"), py::arg("eps"), py::arg("after"), py::arg("threads"),
             "Residual sum, mix of five frames and layer norm in one pass.\n\n"
             "source, residual (B, T, W) float32; branch, out (B, T, W) float32 or bfloat16; mix (5, W), weight and bias (W,)\n"
             "float32. None: left out. after: residual receives the normalized values, not the sum.");
});

}  // namespace
#endif

}  // namespace presto_rt
