// A sampler step after the network: preconditioning, guidance, update, fresh noise and the next input, in one pass.
//
//   x'       = a x + b F_c + c F_u + h H + s n        n: presto_rt.diffusion.noise to the bit
//   H'       = p x + q F_c + r F_u                    history of a multi-step sampler
//   input'   = c_in' x'                               twice where the next step is guided
//
// presto_rt/diffusion/trajectory.py derives the nine coefficients. Products and sums are unfused and in the order written, so
// the result is the same to the bit with every instruction set.
#include "operator.h"

namespace presto_rt {

struct SamplerStep {
  float *x, *history;                       // (batch, count), in place
  const void *conditional, *unconditional;  // (batch, count), fp32 or bf16; unconditional may be null
  const float* noise;                       // (batch, count) or null
  void* input;                              // (copies, batch, count), as conditional
  const float* coefficients;                // a b c h s p q r c_in'
  std::int64_t total;                       // batch * count
  int copies;
  bool bf16;
};

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {
namespace {

template <class T>
void span(const SamplerStep& e, std::int64_t first, std::int64_t last) {
  const float* k = e.coefficients;
  const T *fc = static_cast<const T*>(e.conditional), *fu = static_cast<const T*>(e.unconditional);
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

void sampler_step_call(const TensorView& x, const TensorView& history, const TensorView& conditional,
                       const TensorView& unconditional, const TensorView& noise, const TensorView& coefficients, int copies,
                       const TensorView& input, int threads) {
  const auto [batch, tokens, channels] = x.shape<3>("x");
  const bool bf16 = conditional.is_bf16("conditional");
  const Dtype dtype = bf16 ? kBfloat16 : kFloat32;
  const std::int64_t clips = input.shape<3>("network_input")[0];
  if (copies < 0 || copies > 2 || copies * batch > clips)
    throw py::value_error("network_input: " + std::to_string(copies) + " copies of " + std::to_string(batch) +
                          " clips do not fit an input of " + std::to_string(clips));
  const SamplerStep e{x.data<float>("x", {batch, tokens, channels}),
                      history.data<float>("history", {batch, tokens, channels}),
                      conditional.data("conditional", dtype, {batch, tokens, channels}),
                      unconditional.data_or_null("unconditional", dtype, {batch, tokens, channels}),
                      noise.data_or_null<const float>("noise", {batch, tokens, channels}),
                      input.data("network_input", dtype, {clips, tokens, channels}),
                      coefficients.data<const float>("coefficients", {9}),
                      batch * tokens * channels,
                      copies,
                      bf16};
  const auto variant = sampler_step_variant();
  py::gil_scoped_release release;
  parallel_ranges(threads, e.total, 4096, [&](std::int64_t first, std::int64_t last) { variant(e, first, last); });
}

const Registrar registrar([](py::module_& module) {
  module.def(
      "sampler_step", &sampler_step_call, py::arg("x"), py::arg("history"), py::arg("conditional"), py::arg("unconditional"),
      py::arg("noise"), py::arg("coefficients"), py::arg("copies"), py::arg("network_input"), py::arg("threads"),
      "One sampler step in place on x and history (B, T, C) float32, and `copies` (0 to 2) of the next network input.\n\n"
      "conditional, unconditional (B, T, C) and network_input (at least copies * B, T, C) float32 or bfloat16; noise\n"
      "(B, T, C), coefficients (9,) float32. None for unconditional or noise: left out.");
});

}  // namespace
#endif

}  // namespace presto_rt
