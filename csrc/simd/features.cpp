// The end of the codec's decoder: the sums of its two halves become log-magnitudes of mid and side and the cosine between them.
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

void features_call(std::uintptr_t head, std::uintptr_t linear, std::uintptr_t mean, std::uintptr_t ceiling, std::uintptr_t out,
                   bool bf16, std::int64_t rows, std::int64_t bands, std::int64_t stride, float scale, int threads) {
  require(head && linear && mean && ceiling && out && rows >= 0 && bands >= 1 && stride >= 3 * bands,
          "features: needs head, linear, mean, ceiling, out and rows of at least three times as many numbers as bands");
  const Features a{pointer<void>(head),
                   pointer<void>(linear),
                   pointer<const float>(mean),
                   pointer<const float>(ceiling),
                   pointer<float>(out),
                   bands,
                   stride,
                   scale,
                   bf16};
  const auto variant = features_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, rows, 8, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

}  // namespace
#endif

}  // namespace presto_rt

#ifndef PRESTO_RT_ISA
void bind_features(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("features", &presto_rt::features_call, py::arg("head"), py::arg("linear"), py::arg("mean"), py::arg("ceiling"),
             py::arg("out"), py::arg("bf16"), py::arg("rows"), py::arg("bands"), py::arg("stride"), py::arg("scale"),
             py::arg("threads"), "Both halves of the decoder's output (rows, stride) to features (rows, 3, bands). Addresses.");
}
#endif
