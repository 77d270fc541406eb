// RMS norm of queries and keys, rotary positions in fp32 and head-major layout, from packed QKV in one pass:
//
//   n = x / sqrt(mean x^2 + eps) * weight
//   y[i] = n[i] cos - n[i + half] sin
//   y[i + half] = n[i + half] cos + n[i] sin
//
// kernels/qk_norm_rope.py is the same operator. Attention reads the values in place, from the packed QKV.
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

void qk_norm_rope_call(const TensorView& qkv, const TensorView& cos, const TensorView& sin, const TensorView& q_weight,
                       const TensorView& k_weight, const TensorView& q, const TensorView& k, float eps, int threads) {
  const auto [batch, heads, tokens, dim] = q.shape<4>("q");
  const bool bf16 = q.is_bf16("q");
  const Dtype dtype = bf16 ? kBfloat16 : kFloat32;
  require(tokens >= 1 && heads >= 1 && dim >= 2 && dim % 2 == 0, "q: expected at least one token and an even head size");
  const QkNormRope a{qkv.data("qkv", dtype, {batch, tokens, 3 * heads * dim}),
                     q.data("q", dtype, {batch, heads, tokens, dim}),
                     k.data("k", dtype, {batch, heads, tokens, dim}),
                     cos.data<const float>("cos", {tokens, dim / 2}),
                     sin.data<const float>("sin", {tokens, dim / 2}),
                     q_weight.data<const float>("q_weight", {dim}),
                     k_weight.data<const float>("k_weight", {dim}),
                     tokens,
                     heads,
                     dim,
                     eps,
                     bf16};
  const auto variant = qk_norm_rope_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, batch * tokens, 8, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

const Registrar registrar([](py::module_& module) {
  module.def("qk_norm_rope", &qk_norm_rope_call, py::arg("qkv"), py::arg("cos"), py::arg("sin"), py::arg("q_weight"),
             py::arg("k_weight"), py::arg("q"), py::arg("k"), py::arg("eps"), py::arg("threads"),
             "qkv (B, T, 3 H D) -> q and k (B, H, T, D), RMS-normalized and rotated; all float32 or bfloat16.\n\n"
             "cos and sin (T, D / 2), weights (D,), all float32.");
});

}  // namespace
#endif

}  // namespace presto_rt
