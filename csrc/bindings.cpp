// The Python module presto_rt._C. Operators bind themselves: see registry.h.
#include "registry.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Presto-RT's operators for the CPU. Called through the Python modules that hold their torch references.";
#ifdef PRESTO_RT_SOURCES
  // Digest of the sources this was built from, for presto_rt/native.py.
  module.attr("sources") = PRESTO_RT_SOURCES;
#endif
  presto_rt::Registrar::bind_all(module);
}
