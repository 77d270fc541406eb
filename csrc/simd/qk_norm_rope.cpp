// RMS norm of queries and keys, rotary positions in fp32 and head-major layout, from packed QKV in one pass:
//
//   n = x / sqrt(mean x^2 + eps) * weight        y[i] = n[i] cos - n[i + half] sin        y[i + half] = n[i + half] cos + n[i]
//   sin
//
// kernels/qk_norm_rope.py is the same operator. Values are read by attention where they lie.
#include "operator.h"

namespace presto_rt {

struct QkNormRope {
  const void* qkv;                   // (batch, tokens, 3, heads, dim), fp32 or bf16
  void *q, *k;                       // (batch, heads, tokens, dim)
  const float *cos, *sin;            // (tokens, dim / 2)
  const float *q_weight, *k_weight;  // (dim,)
  std::int64_t tokens, heads, dim;
  float eps;
  bool bf16;
};

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {
namespace {

template <class T>
void head(const T* x, T* y, const float* weight, const float* cos, const float* sin, std::int64_t dim, float eps) {
  const std::int64_t half = dim / 2;
  Vec squares{};
  for (std::int64_t i = 0; i < half; i += kWidth) {
    const Vec a = load(x + i, half - i), b = load(x + half + i, half - i);
    squares = fma(a, a, fma(b, b, squares));
  }
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(dim) + eps);
  for (std::int64_t i = 0; i < half; i += kWidth) {
    const std::int64_t n = half - i;
    const Vec a = load(x + i, n) * factor * load(weight + i, n);
    const Vec b = load(x + half + i, n) * factor * load(weight + half + i, n);
    const Vec c = load(cos + i, n), s = load(sin + i, n);
    store(y + i, a * c - b * s, n);
    store(y + half + i, b * c + a * s, n);
  }
}

template <class T>
void tokens(const QkNormRope& a, std::int64_t first, std::int64_t last) {
  const std::int64_t half = a.dim / 2, width = a.heads * a.dim;
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t clip = row / a.tokens, token = row % a.tokens;
    for (std::int64_t h = 0; h < a.heads; ++h) {
      const T* x = static_cast<const T*>(a.qkv) + row * 3 * width + h * a.dim;
      const std::int64_t to = ((clip * a.heads + h) * a.tokens + token) * a.dim;
      const float *c = a.cos + token * half, *s = a.sin + token * half;
      head(x, static_cast<T*>(a.q) + to, a.q_weight, c, s, a.dim, a.eps);
      head(x + width, static_cast<T*>(a.k) + to, a.k_weight, c, s, a.dim, a.eps);
    }
  }
}

}  // namespace

void qk_norm_rope(const QkNormRope& a, std::int64_t first, std::int64_t last) {
  a.bf16 ? tokens<Bf16>(a, first, last) : tokens<float>(a, first, last);
}

}  // namespace PRESTO_RT_ISA
#else

PRESTO_RT_VARIANTS(qk_norm_rope, const QkNormRope&, std::int64_t, std::int64_t)

namespace {

void qk_norm_rope_call(std::uintptr_t qkv, std::uintptr_t q, std::uintptr_t k, bool bf16, std::int64_t batch,
                       std::int64_t tokens, std::int64_t heads, std::int64_t dim, std::uintptr_t cos, std::uintptr_t sin,
                       std::uintptr_t q_weight, std::uintptr_t k_weight, float eps, int threads) {
  require(qkv && q && k && cos && sin && q_weight && k_weight, "qk_norm_rope: an address is missing");
  require(batch >= 0 && tokens >= 1 && heads >= 1 && dim >= 2 && dim % 2 == 0, "qk_norm_rope: head sizes must be even");
  const QkNormRope a{pointer<void>(qkv),
                     pointer<void>(q),
                     pointer<void>(k),
                     pointer<const float>(cos),
                     pointer<const float>(sin),
                     pointer<const float>(q_weight),
                     pointer<const float>(k_weight),
                     tokens,
                     heads,
                     dim,
                     eps,
                     bf16};
  const auto variant = qk_norm_rope_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, batch * tokens, 8, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

}  // namespace
#endif

}  // namespace presto_rt

#ifndef PRESTO_RT_ISA
void bind_qk_norm_rope(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("qk_norm_rope", &presto_rt::qk_norm_rope_call, py::arg("qkv"), py::arg("q"), py::arg("k"), py::arg("bf16"),
             py::arg("batch"), py::arg("tokens"), py::arg("heads"), py::arg("dim"), py::arg("cos"), py::arg("sin"),
             py::arg("q_weight"), py::arg("k_weight"), py::arg("eps"), py::arg("threads"),
             "qkv (batch, tokens, 3, heads, dim) -> q and k (batch, heads, tokens, dim), normalised and rotated. Addresses.");
}
#endif
