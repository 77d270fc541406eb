// The Python module presto_rt._C: one `bind_...` per operator, each defined in the operator's own file.
#include <pybind11/pybind11.h>

void bind_activation(pybind11::module_& module);
void bind_adaln(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_sampler_step(pybind11::module_& module);
void bind_features(pybind11::module_& module);
void bind_isa(pybind11::module_& module);
void bind_mix_norm(pybind11::module_& module);
void bind_noise(pybind11::module_& module);
void bind_overlap_add(pybind11::module_& module);
void bind_pcm(pybind11::module_& module);
void bind_qk_norm_rope(pybind11::module_& module);
void bind_quantize(pybind11::module_& module);
void bind_spectral(pybind11::module_& module);
void bind_spsi(pybind11::module_& module);

PYBIND11_MODULE(_C, module) {
  module.doc() = "Presto-RT's operators for the CPU. Called through the Python modules that hold their torch twins.";
  // Raised with every change of a signature here; presto_rt/native.py refuses a module of another number.
  module.attr("interface") = 3;
  bind_activation(module);
  bind_adaln(module);
  bind_attention(module);
  bind_sampler_step(module);
  bind_features(module);
  bind_isa(module);
  bind_mix_norm(module);
  bind_noise(module);
  bind_overlap_add(module);
  bind_pcm(module);
  bind_qk_norm_rope(module);
  bind_quantize(module);
  bind_spectral(module);
  bind_spsi(module);
}
