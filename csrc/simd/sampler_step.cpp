// A sampler step behind the network: preconditioning, guidance, the update, fresh noise and the next input, in one pass.
//
//   x'       = a x + b F_c + c F_u + h H + s n        n: presto_rt.diffusion.noise to the bit
//   H'       = p x + q F_c + r F_u                    what the next step of a multi-step sampler needs, if anything
//   input'   = c_in' x'                               twice where the next step is guided
//
// engine/plan.py makes the nine numbers; kernels/edm_step.py is the same without history. Products and sums are unfused and in
// the order written, so the result is the same to the bit with every instruction set.
#include "operator.h"

namespace presto_rt {

struct SamplerStep {
  float *x, *history;               // (batch, count), in place
  const void *conditional, *other;  // (batch, count), fp32 or bf16; other may be null
  const float* noise;               // (batch, count) or null
  void* input;                      // (copies, batch, count), as conditional
  const float* coefficients;        // a b c h s p q r c_in'
  std::int64_t total;               // batch * count
  int copies;
  bool bf16;
};

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {
namespace {

template <class T>
void span(const SamplerStep& e, std::int64_t first, std::int64_t last) {
  const float* k = e.coefficients;
  const T *fc = static_cast<const T*>(e.conditional), *fu = static_cast<const T*>(e.other);
  T* input = static_cast<T*>(e.input);
  for (std::int64_t i = first; i < last; i += kWidth) {
    const std::int64_t n = last - i;
    const Vec x = load(e.x + i, n), c = load(fc + i, n);
    Vec next = x * k[0] + c * k[1], kept = x * k[5] + c * k[6];
    if (fu) {
      const Vec u = load(fu + i, n);
      next += u * k[2];
      kept += u * k[7];
    }
    if (k[3] != 0.0f) next += load(e.history + i, n) * k[3];
    if (e.noise) next += load(e.noise + i, n) * k[4];
    store(e.x + i, next, n);
    store(e.history + i, kept, n);
    for (int copy = 0; copy < e.copies; ++copy) store(input + copy * e.total + i, next * k[8], n);
  }
}

}  // namespace

void sampler_step(const SamplerStep& e, std::int64_t first, std::int64_t last) {
  e.bf16 ? span<Bf16>(e, first, last) : span<float>(e, first, last);
}

}  // namespace PRESTO_RT_ISA
#else

PRESTO_RT_VARIANTS(sampler_step, const SamplerStep&, std::int64_t, std::int64_t)

namespace {

void sampler_step_call(std::uintptr_t x, std::uintptr_t history, std::uintptr_t conditional, std::uintptr_t other,
                       std::uintptr_t noise, std::uintptr_t input, std::uintptr_t coefficients, bool bf16, std::int64_t total,
                       int copies, int threads) {
  require(x && history && conditional && coefficients && total >= 0 && copies >= 0 && copies <= 2 && (input || !copies),
          "sampler_step: an address is missing or copies is not 0, 1 or 2");
  const SamplerStep e{pointer<float>(x),
                      pointer<float>(history),
                      pointer<void>(conditional),
                      pointer<void>(other),
                      pointer<const float>(noise),
                      pointer<void>(input),
                      pointer<const float>(coefficients),
                      total,
                      copies,
                      bf16};
  const auto variant = sampler_step_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, total, 4096, [&](std::int64_t first, std::int64_t last) { variant(e, first, last); });
}

}  // namespace
#endif

}  // namespace presto_rt

#ifndef PRESTO_RT_ISA
void bind_sampler_step(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("sampler_step", &presto_rt::sampler_step_call, py::arg("x"), py::arg("history"), py::arg("conditional"),
             py::arg("other"), py::arg("noise"), py::arg("input"), py::arg("coefficients"), py::arg("bf16"), py::arg("total"),
             py::arg("copies"), py::arg("threads"),
             "One sampler step in place on x and history (fp32), and the next network input. Addresses.");
}
#endif
