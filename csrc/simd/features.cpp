// Output of the codec's decoder: the sum of its two halves as log-magnitudes of mid and side and the cosine between them.
//
//   y = head + linear        log-magnitude = min(scale y + mean, ceiling)        cosine = tanh y = 1 - 2 / (exp(2 y) + 1)
//
// Rows of the input hold 3 x bands numbers and may be longer.
#include "operator.h"

namespace presto_rt {

struct Features {
  const void *head, *linear;    // (rows, stride), fp32 or bf16
  const float *mean, *ceiling;  // (2, bands)
  float* out;                   // (rows, 3, bands)
  std::int64_t bands, stride;
  float scale;
  bool bf16;
};

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {
namespace {

template <class T>
void rows(const Features& a, std::int64_t first, std::int64_t last) {
  const std::int64_t logs = 2 * a.bands;
  for (std::int64_t row = first; row < last; ++row) {
    const T *head = static_cast<const T*>(a.head) + row * a.stride, *linear = static_cast<const T*>(a.linear) + row * a.stride;
    float* out = a.out + row * 3 * a.bands;
    for (std::int64_t i = 0; i < logs; i += kWidth) {
      const std::int64_t n = logs - i;
      const Vec y = load(head + i, n) + load(linear + i, n);
      store(out + i, smaller(load(a.ceiling + i, n), fma(y, all(a.scale), load(a.mean + i, n))), n);
    }
    for (std::int64_t i = logs; i < logs + a.bands; i += kWidth) {
      const std::int64_t n = logs + a.bands - i;
      const Vec y = load(head + i, n) + load(linear + i, n);
      store(out + i, 1.0f - 2.0f / (exp(y * 2.0f) + 1.0f), n);
    }
  }
}

}  // namespace

void features(const Features& a, std::int64_t first, std::int64_t last) {
  a.bf16 ? rows<Bf16>(a, first, last) : rows<float>(a, first, last);
}

}  // namespace PRESTO_RT_ISA
#else

PRESTO_RT_VARIANTS(features, const Features&, std::int64_t, std::int64_t)

namespace {

void features_call(const TensorView& head, const TensorView& linear, const TensorView& mean, const TensorView& ceiling,
                   const TensorView& out, float scale, int threads) {
  const auto [batch, frames, parts, bands] = out.shape<4>("out");
  const std::int64_t stride = head.shape<3>("head")[2];
  const bool bf16 = head.is_bf16("head");
  const Dtype dtype = bf16 ? kBfloat16 : kFloat32;
  require(parts == 3 && bands >= 1, "out: expected the shape (batch, frames, 3, bands)");
  if (stride < 3 * bands)
    throw py::value_error("head: rows of " + std::to_string(stride) + " numbers do not hold three of " + std::to_string(bands) +
                          " bands");
  const Features a{head.data("head", dtype, {batch, frames, stride}),
                   linear.data("linear", dtype, {batch, frames, stride}),
                   mean.data<const float>("mean", {2, bands}),
                   ceiling.data<const float>("ceiling", {2, bands}),
                   out.data<float>("out", {batch, frames, 3, bands}),
                   bands,
                   stride,
                   scale,
                   bf16};
  const auto variant = features_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, batch * frames, 8, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

const Registrar registrar([](py::module_& module) {
  module.def(
      "features", &features_call, py::arg("head"), py::arg("linear"), py::arg("mean"), py::arg("ceiling"), py::arg("out"),
      py::arg("scale"), py::arg("threads"),
      "Log-magnitudes min(scale (head + linear) + mean, ceiling) of mid and side, and the cosine tanh(head + linear).\n\n"
      "head, linear (B, F, at least 3 bands) float32 or bfloat16; mean, ceiling (2, bands), out (B, F, 3, bands) float32.");
});

}  // namespace
#endif

}  // namespace presto_rt
