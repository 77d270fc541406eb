// What every operator shares: array types that accept no copy and no conversion, and compilation for several instruction sets.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace presto_rt {

namespace py = pybind11;

// Arguments of these types are bound with `.noconvert()`: another dtype or a strided array is a TypeError, never a silent
// copy, so what an operator writes to `out` lands in the caller's memory.
template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Raises ValueError(message) in Python unless the condition holds. Sizes are checked before any pointer is used.
inline void require(bool condition, const char* message) {
  if (!condition) throw py::value_error(message);
}

}  // namespace presto_rt

// Compiles a function for the portable baseline, AVX2 and AVX-512; the loader picks one by what the processor has.
// No variant may fuse multiply-adds (-ffp-contract=off), so all of them give the same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define PRESTO_RT_MULTIVERSION __attribute__((target_clones("default", "avx2", "arch=skylake-avx512")))
#else
#define PRESTO_RT_MULTIVERSION
#endif

#define PRESTO_RT_INLINE inline __attribute__((always_inline))
