// Activations between two matrix products, in place or from one buffer to another:
//
//   gelu_tanh   x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh u) / 2 without cancellation
//   silu        x / (1 + exp(-x))
//   swiglu      value * silu(gate), from rows of values followed by as many gates
#include "activation.h"

namespace presto_rt {

struct Activation {
  const void* x;  // (rows, columns), for swiglu (rows, 2 * columns); fp32 or bf16
  void* out;      // (rows, columns)
  std::int64_t columns;
  int kind;  // 0 gelu_tanh, 1 silu, 2 swiglu
  bool bf16;
};

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {
namespace {

template <class T, int kKind>
void span(const T* x, const T* gate, T* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kWidth) {
    const Vec v = load(x + i, count - i);
    Vec y;
    if (kKind == 0) {
      y = gelu_tanh(v);
    } else if (kKind == 1) {
      y = silu(v);
    } else {
      y = v * silu(load(gate + i, count - i));
    }
    store(out + i, y, count - i);
  }
}

template <class T>
void rows(const Activation& a, std::int64_t first, std::int64_t last) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  const std::int64_t n = a.columns;
  if (a.kind == 0) return span<T, 0>(x + first * n, nullptr, out + first * n, (last - first) * n);
  if (a.kind == 1) return span<T, 1>(x + first * n, nullptr, out + first * n, (last - first) * n);
  for (std::int64_t row = first; row < last; ++row) span<T, 2>(x + row * 2 * n, x + row * 2 * n + n, out + row * n, n);
}

}  // namespace

void activation(const Activation& a, std::int64_t first, std::int64_t last) {
  a.bf16 ? rows<Bf16>(a, first, last) : rows<float>(a, first, last);
}

}  // namespace PRESTO_RT_ISA
#else

PRESTO_RT_VARIANTS(activation, const Activation&, std::int64_t, std::int64_t)

namespace {

void activation_call(std::uintptr_t x, std::uintptr_t out, bool bf16, std::int64_t rows, std::int64_t columns, int kind,
                     int threads) {
  require(x && out && rows >= 0 && columns >= 1 && kind >= 0 && kind <= 2,
          "activation: needs x, out, a size and a kind 0 to 2");
  const Activation a{pointer<void>(x), pointer<void>(out), columns, kind, bf16};
  const auto variant = activation_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, rows, 1, [&](std::int64_t first, std::int64_t last) { variant(a, first, last); });
}

}  // namespace
#endif

}  // namespace presto_rt

#ifndef PRESTO_RT_ISA
void bind_activation(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("activation", &presto_rt::activation_call, py::arg("x"), py::arg("out"), py::arg("bf16"), py::arg("rows"),
             py::arg("columns"), py::arg("kind"), py::arg("threads"),
             "out (rows, columns) = gelu_tanh (0), silu (1) or swiglu (2, from twice as many columns) of x. Addresses.");
}
#endif
