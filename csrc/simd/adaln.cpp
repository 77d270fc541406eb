// Adaptive layer norm with the residual folded in, the step between two matrix products of a diffusion transformer:
//
//   residual = source + gate * branch                 fp32; gate = null: 1; branch = null: 0; residual may be the source
//   out = (r - mean r) / sqrt(var r + eps) * (1 + scale) + shift          r = residual; scale = shift = null: the plain norm
//
// gate, scale and shift are rows of the plan's modulation table, one for each clip. kernels/adaln.py is the same operator.
#include "operator.h"

namespace presto_rt {

struct Adaln {
  const float* source;  // (batch, tokens, width)
  float* residual;      // the same size
  const void* branch;   // as out; may be null
  void* out;            // (batch, tokens, width), fp32 or bf16
  const float *gate, *shift, *scale;
  std::int64_t tokens, width, table_stride;  // table_stride: from a clip's row to the next clip's
  float eps;
  bool bf16;
};

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {
namespace {

template <class T>
void rows(const Adaln& a, std::int64_t first, std::int64_t last) {
  const std::int64_t width = a.width, whole = width / kWidth * kWidth;
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t at = row / a.tokens * a.table_stride;
    const float* source = a.source + row * width;
    float* r = a.residual + row * width;
    const T* branch = static_cast<const T*>(a.branch) + row * width;
    T* y = static_cast<T*>(a.out) + row * width;

    Vec total{};
    for (std::int64_t i = 0; i < width; i += kWidth) {
      const std::int64_t n = width - i;
      Vec x = load(source + i, n);
      if (a.branch) {
        const Vec b = load(branch + i, n);
        x += a.gate ? b * load(a.gate + at + i, n) : b;
      }
      store(r + i, x, n);
      total += x;
    }
    const float mean = sum(total) / static_cast<float>(width);
    Vec squares{};
    for (std::int64_t i = 0; i < whole; i += kWidth) {
      const Vec x = load(r + i) - mean;
      squares = fma(x, x, squares);
    }
    float square = sum(squares);
    for (std::int64_t i = whole; i < width; ++i) square += (r[i] - mean) * (r[i] - mean);
    const float factor = 1.0f / __builtin_sqrtf(square / static_cast<float>(width) + a.eps);
    for (std::int64_t i = 0; i < width; i += kWidth) {
      const std::int64_t n = width - i;
      Vec x = (load(r + i, n) - mean) * factor;
      if (a.scale) x = fma(x, load(a.scale + at + i, n) + 1.0f, load(a.shift + at + i, n));
      store(y + i, x, n);
    }
  }
}

}  // namespace

void adaln(const Adaln& a, std::int64_t first, std::int64_t last) {
  a.bf16 ? rows<Bf16>(a, first, last) : rows<float>(a, first, last);
}

}  // namespace PRESTO_RT_ISA
#else

PRESTO_RT_VARIANTS(adaln, const Adaln&, std::int64_t, std::int64_t)

namespace {

void adaln_call(std::uintptr_t source, std::uintptr_t residual, std::uintptr_t branch, std::uintptr_t out, bool bf16,
                std::int64_t batch, std::int64_t tokens, std::int64_t width, std::uintptr_t gate, std::uintptr_t shift,
                std::uintptr_t scale, std::int64_t table_stride, float eps, int threads) {
  require(source && residual && out && batch >= 0 && tokens >= 1 && width >= 1,
          "adaln: needs source, residual, out and a size");
  require((shift != 0) == (scale != 0), "adaln: shift and scale go together");
  const Adaln a{pointer<const float>(source),
                pointer<float>(residual),
                pointer<void>(branch),
                pointer<void>(out),
                pointer<const float>(gate),
                pointer<const float>(shift),
                pointer<const float>(scale),
                tokens,
                width,
                table_stride,
                eps,
                bf16};
  const auto variant = adaln_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, batch * tokens, 8, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

}  // namespace
#endif

}  // namespace presto_rt

#ifndef PRESTO_RT_ISA
void bind_adaln(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("adaln", &presto_rt::adaln_call, py::arg("source"), py::arg("residual"), py::arg("branch"), py::arg("out"),
             py::arg("bf16"), py::arg("batch"), py::arg("tokens"), py::arg("width"), py::arg("gate"), py::arg("shift"),
             py::arg("scale"), py::arg("table_stride"), py::arg("eps"), py::arg("threads"),
             "residual = source + gate * branch in fp32; out = norm(residual) * (1 + scale) + shift. Addresses; 0 for what is "
             "left out.");
}
#endif
