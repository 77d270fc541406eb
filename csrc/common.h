// Shared by the operators: their arguments and registration, and compilation for several instruction sets.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "registry.h"
#include "tensor_view.h"

namespace presto_rt {

// Raises ValueError(message) in Python unless the condition holds. Sizes are checked before any pointer is used.
inline void require(bool condition, const char* message) {
  if (!condition) throw py::value_error(message);
}

}  // namespace presto_rt

// Compiles a function for the portable baseline, AVX2 and AVX-512; the loader picks one by the processor's features. No variant
// may fuse multiply-adds (-ffp-contract=off), so all of them give the same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define PRESTO_RT_MULTIVERSION __attribute__((target_clones("default", "avx2", "arch=skylake-avx512")))
#else
#define PRESTO_RT_MULTIVERSION
#endif

#define PRESTO_RT_INLINE inline __attribute__((always_inline))
