// Registration of operators: each file binds its own when the module is loaded, so no list of them is kept anywhere.
#pragma once

#include <pybind11/pybind11.h>

namespace presto_rt {

// Defined once in each operator's file, as a static object; bindings.cpp calls all of them.
class Registrar {
 public:
  using Bind = void (*)(pybind11::module_& module);

  explicit Registrar(Bind bind) : bind_(bind), next_(first_) { first_ = this; }

  static void bind_all(pybind11::module_& module) {
    for (const Registrar* r = first_; r; r = r->next_) r->bind_(module);
  }

 private:
  Bind bind_;
  const Registrar* next_;
  static inline const Registrar* first_ = nullptr;
};

}  // namespace presto_rt
