// The two operators around a matrix product in 8-bit integers, a row (a token) at a time:
//
//   quantize   scale = max |x| / 127        q = round(x / scale) + 128
//   rescale    out = activation(scale y + bias), y: the product of q - 128, times each column's own scale
//
// The offset of 128 makes them unsigned, as VNNI requires; oneDNN runs a reference loop for signed ones.
//
// A NaN or an infinity in a row makes the row's scale NaN or infinite, and so its whole result.
#include "activation.h"

namespace presto_rt {

struct Quantize {
  const void* x;      // (rows, width), fp32 or bf16
  std::uint8_t* out;  // (rows, width)
  float* scale;       // (rows,)
  std::int64_t width;
  bool bf16;
};

struct Rescale {
  const void* y;       // (rows, width), fp32 or bf16
  const float* scale;  // (rows,)
  const float* bias;   // (width,) or null
  void* out;           // as y, and may be y
  std::int64_t width;
  Activation activation;
  bool bf16;
};

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {
namespace {

typedef std::uint8_t Bytes __attribute__((vector_size(kWidth)));

template <class T>
void quantize_rows(const Quantize& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    std::uint8_t* out = a.out + row * a.width;
    Vec top{}, sum_of_products{};
    for (std::int64_t i = 0; i < a.width; i += kWidth) {
      const Vec v = load(x + i, a.width - i);
      top = larger(v, larger(-v, top));
      sum_of_products += v * 0.0f;  // 0, or NaN where the row has a NaN or an infinity
    }
    float most = 0.0f;
    for (int i = 0; i < kWidth; ++i) most = top[i] > most ? top[i] : most;
    const float factor = most > 0.0f ? 127.0f / most : 0.0f;
    a.scale[row] = most / 127.0f + sum(sum_of_products);
    for (std::int64_t i = 0; i < a.width; i += kWidth) {
      const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
      const Vec n = load(x + i, a.width - i) * factor + magic - magic;
      const Vec limited = smaller(all(127.0f), larger(all(-127.0f), n));
      const Ints whole = __builtin_convertvector(limited == limited ? limited : Vec{}, Ints) + 128;
      const Bytes q = __builtin_convertvector(whole, Bytes);
      if (a.width - i >= kWidth) {
        __builtin_memcpy(out + i, &q, sizeof q);
      } else {
        for (std::int64_t j = 0; i + j < a.width; ++j) out[i + j] = q[j];
      }
    }
  }
}

template <class T, Activation kActivation>
void rescale_rows(const Rescale& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t row = first; row < last; ++row) {
    const T* y = static_cast<const T*>(a.y) + row * a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
    const Vec scale = all(a.scale[row]);
    for (std::int64_t i = 0; i < a.width; i += kWidth) {
      const std::int64_t n = a.width - i;
      const Vec x = fma(load(y + i, n), scale, a.bias ? load(a.bias + i, n) : Vec{});
      store(out + i, activate<kActivation>(x), n);
    }
  }
}

template <class T>
void rescale_activation(const Rescale& a, std::int64_t first, std::int64_t last) {
  switch (a.activation) {
    case Activation::none:
      return rescale_rows<T, Activation::none>(a, first, last);
    case Activation::gelu_tanh:
      return rescale_rows<T, Activation::gelu_tanh>(a, first, last);
    case Activation::silu:
      return rescale_rows<T, Activation::silu>(a, first, last);
  }
}

}  // namespace

void quantize(const Quantize& a, std::int64_t first, std::int64_t last) {
  a.bf16 ? quantize_rows<Bf16>(a, first, last) : quantize_rows<float>(a, first, last);
}

void rescale(const Rescale& a, std::int64_t first, std::int64_t last) {
  a.bf16 ? rescale_activation<Bf16>(a, first, last) : rescale_activation<float>(a, first, last);
}

}  // namespace PRESTO_RT_ISA
#else

PRESTO_RT_VARIANTS(quantize, const Quantize&, std::int64_t, std::int64_t)
PRESTO_RT_VARIANTS(rescale, const Rescale&, std::int64_t, std::int64_t)

namespace {

void quantize_call(const TensorView& x, const TensorView& out, const TensorView& scale, int threads) {
  const auto [rows, width] = out.shape<2>("out");
  const bool bf16 = x.is_bf16("x");
  require(width >= 1, "out: expected rows of at least one number");
  const Quantize a{x.data("x", bf16 ? kBfloat16 : kFloat32, {rows, width}), out.data<std::uint8_t>("out", {rows, width}),
                   scale.data<float>("scale", {rows}), width, bf16};
  const auto variant = quantize_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, rows, 8, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

void rescale_call(const TensorView& y, const TensorView& scale, const TensorView& bias, const TensorView& out,
                  const std::string& activation, int threads) {
  const auto [rows, width] = y.shape<2>("y");
  const bool bf16 = y.is_bf16("y");
  const Dtype dtype = bf16 ? kBfloat16 : kFloat32;
  require(width >= 1, "y: expected rows of at least one number");
  const Rescale a{y.data("y", dtype, {rows, width}),
                  scale.data<const float>("scale", {rows}),
                  bias.data_or_null<const float>("bias", {width}),
                  out.data("out", dtype, {rows, width}),
                  width,
                  activation_of(activation),
                  bf16};
  const auto variant = rescale_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, rows, 8, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

const Registrar registrar([](py::module_& module) {
  module.def("quantize", &quantize_call, py::arg("x"), py::arg("out"), py::arg("scale"), py::arg("threads"),
             "x (rows, width) float32 or bfloat16 -> out (rows, width) uint8 around 128, and scale (rows,) float32.");
  module.def("rescale", &rescale_call, py::arg("y"), py::arg("scale"), py::arg("bias"), py::arg("out"), py::arg("activation"),
             py::arg("threads"),
             "out = activation(scale y + bias); out may be y.\n\n"
             "y, out (rows, width) float32 or bfloat16; scale (rows,), bias (width,) or None, float32; activation: one of\n"
             "`activations`.");
  py::list activations;
  for (const NamedActivation& named : kActivations) activations.append(named.name);
  module.attr("activations") = py::tuple(activations);
});

}  // namespace
#endif

}  // namespace presto_rt
