// Adaptive layer norm with the residual sum, between two matrix products of a diffusion transformer:
//
//   residual = source + gate * branch                 fp32; gate = null: 1; branch = null: 0; residual may be the source
//   out = (r - mean r) / sqrt(var r + eps) * (1 + scale) + shift          r = residual; scale = shift = null: the plain norm
//
// gate, scale and shift are rows of each clip's modulation table. kernels/adaln.py is the same operator.
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
    const T* branch = a.branch ? static_cast<const T*>(a.branch) + row * width : nullptr;
    T* y = static_cast<T*>(a.out) + row * width;

    Vec total{};
    for (std::int64_t i = 0; i < width; i += kWidth) {
      const std::int64_t n = width - i;
      Vec x = load(source + i, n);
      if (branch) {
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

// A row of the modulation table, or null where the argument names none.
const float* table_row(const char* name, const float* start, std::int64_t stride, std::int64_t rows,
                       const std::optional<std::int64_t>& row) {
  if (!row) return nullptr;
  if (*row < 0 || *row >= rows)
    throw py::value_error(std::string(name) + ": expected a row of the table, 0 to " + std::to_string(rows - 1) + "; got " +
                          std::to_string(*row));
  return start + *row * stride;
}

void adaln_call(const TensorView& source, const TensorView& branch, const TensorView& table, std::optional<std::int64_t> gate,
                std::optional<std::int64_t> shift, std::optional<std::int64_t> scale, const TensorView& residual,
                const TensorView& out, float eps, int threads) {
  const auto [batch, tokens, width] = residual.shape<3>("residual");
  const bool bf16 = out.is_bf16("out");
  const Dtype dtype = bf16 ? kBfloat16 : kFloat32;
  require(tokens >= 1 && width >= 1, "residual: expected at least one token and a width of at least 1");
  require(shift.has_value() == scale.has_value(), "shift: expected together with scale");
  Adaln a{};
  a.source = source.data<const float>("source", {batch, tokens, width});
  a.residual = residual.data<float>("residual", {batch, tokens, width});
  a.branch = branch.data_or_null("branch", dtype, {batch, tokens, width});
  a.out = out.data("out", dtype, {batch, tokens, width});
  if (table) {
    const std::int64_t rows = table.shape<3>("table")[1];
    const float* const start = static_cast<const float*>(table.rows("table", kFloat32, {batch, rows, width}));
    a.gate = table_row("gate", start, table.stride(1), rows, gate);
    a.shift = table_row("shift", start, table.stride(1), rows, shift);
    a.scale = table_row("scale", start, table.stride(1), rows, scale);
    a.table_stride = table.stride(0);
  } else {
    require(!gate && !scale, "table: expected a tensor where gate, shift or scale name a row; got None");
  }
  a.tokens = tokens;
  a.width = width;
  a.eps = eps;
  a.bf16 = bf16;
  const auto variant = adaln_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, batch * tokens, 8, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

const Registrar registrar([](py::module_& module) {
  module.def("adaln", &adaln_call, py::arg("source"), py::arg("branch"), py::arg("table"), py::arg("gate"), py::arg("shift"),
             py::arg("scale"), py::arg("residual"), py::arg("out"), py::arg("eps"), py::arg("threads"),
             "residual = source + table[gate] * branch; out = norm(residual) * (1 + table[scale]) + table[shift].\n\n"
             "source, residual (B, T, D) float32, may be the same; branch, out (B, T, D) float32 or bfloat16; table\n"
             "(B, rows, D) float32. None for branch: 0; for gate: 1; for shift and scale: the plain norm.");
});

}  // namespace
#endif

}  // namespace presto_rt
