// What stands before and after a matrix product in 8-bit integers, a row (a token) at a time:
//
//   quantize   scale = max |x| / 127        q = round(x / scale) + 128
//   rescale    out = activation(scale y + bias), y: the product of q - 128, times each column's own scale
//
// The 128 makes them unsigned, which is what VNNI multiplies; oneDNN takes signed ones to a reference loop there.
//
// A NaN or an infinity in a row makes its scale one, and so its whole result.
#include "activation.h"
#include "operator.h"

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
  int kind;  // 0 gelu_tanh, 1 silu, 3 none
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

template <class T, int kKind>
void rescale_rows(const Rescale& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t row = first; row < last; ++row) {
    const T* y = static_cast<const T*>(a.y) + row * a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
    const Vec scale = all(a.scale[row]);
    for (std::int64_t i = 0; i < a.width; i += kWidth) {
      const std::int64_t n = a.width - i;
      const Vec x = fma(load(y + i, n), scale, a.bias ? load(a.bias + i, n) : Vec{});
      store(out + i, kKind == 0 ? gelu_tanh(x) : kKind == 1 ? silu(x) : x, n);
    }
  }
}

template <class T>
void rescale_kind(const Rescale& a, std::int64_t first, std::int64_t last) {
  if (a.kind == 0) return rescale_rows<T, 0>(a, first, last);
  if (a.kind == 1) return rescale_rows<T, 1>(a, first, last);
  rescale_rows<T, 3>(a, first, last);
}

}  // namespace

void quantize(const Quantize& a, std::int64_t first, std::int64_t last) {
  a.bf16 ? quantize_rows<Bf16>(a, first, last) : quantize_rows<float>(a, first, last);
}

void rescale(const Rescale& a, std::int64_t first, std::int64_t last) {
  a.bf16 ? rescale_kind<Bf16>(a, first, last) : rescale_kind<float>(a, first, last);
}

}  // namespace PRESTO_RT_ISA
#else

PRESTO_RT_VARIANTS(quantize, const Quantize&, std::int64_t, std::int64_t)
PRESTO_RT_VARIANTS(rescale, const Rescale&, std::int64_t, std::int64_t)

namespace {

void quantize_call(std::uintptr_t x, std::uintptr_t out, std::uintptr_t scale, bool bf16, std::int64_t rows, std::int64_t width,
                   int threads) {
  require(x && out && scale && rows >= 0 && width >= 1, "quantize: needs x, out, scale and a size");
  const Quantize a{pointer<void>(x), pointer<std::uint8_t>(out), pointer<float>(scale), width, bf16};
  const auto variant = quantize_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, rows, 8, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

void rescale_call(std::uintptr_t y, std::uintptr_t scale, std::uintptr_t bias, std::uintptr_t out, bool bf16, std::int64_t rows,
                  std::int64_t width, int kind, int threads) {
  require(y && out && scale && rows >= 0 && width >= 1 && (kind == 0 || kind == 1 || kind == 3),
          "rescale: needs y, out, scale, a size and a kind 0, 1 or 3");
  const Rescale a{pointer<void>(y), pointer<float>(scale), pointer<float>(bias), pointer<void>(out), width, kind, bf16};
  const auto variant = rescale_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, rows, 8, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

}  // namespace
#endif

}  // namespace presto_rt

#ifndef PRESTO_RT_ISA
void bind_quantize(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("quantize", &presto_rt::quantize_call, py::arg("x"), py::arg("out"), py::arg("scale"), py::arg("bf16"),
             py::arg("rows"), py::arg("width"), py::arg("threads"),
             "x (rows, width) -> uint8 around 128 and a scale a row. Addresses.");
  module.def("rescale", &presto_rt::rescale_call, py::arg("y"), py::arg("scale"), py::arg("bias"), py::arg("out"),
             py::arg("bf16"), py::arg("rows"), py::arg("width"), py::arg("kind"), py::arg("threads"),
             "activation(scale y + bias) into out; kind 0 gelu_tanh, 1 silu, 3 none. Addresses; 0 for no bias.");
}
#endif
