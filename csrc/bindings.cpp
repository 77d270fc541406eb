// The Python module presto_rt._C: one `bind_...` per operator, each defined in the operator's own file.
#include "common.h"

namespace presto_rt {

void bind_noise(py::module_& module);
void bind_overlap_add(py::module_& module);
void bind_pcm(py::module_& module);
#if __has_include("spsi.cpp")
#define PRESTO_RT_HAS_SPSI
void bind_spsi(py::module_& module);
#endif

}  // namespace presto_rt

PYBIND11_MODULE(_C, module) {
  module.doc() = "Presto-RT's operators for the CPU. Called through the Python modules that hold their torch twins.";
  // Raised with every change of a signature here; presto_rt/native.py refuses a module of another number.
  module.attr("interface") = 1;
  presto_rt::bind_noise(module);
  presto_rt::bind_overlap_add(module);
  presto_rt::bind_pcm(module);
#ifdef PRESTO_RT_HAS_SPSI
  presto_rt::bind_spsi(module);
#endif
}
