// The activations of the operators that apply one.
#pragma once

#include "operator.h"

#ifndef PRESTO_RT_ISA
#include <string>
#endif

namespace presto_rt {

enum class Activation { none, gelu_tanh, silu };

#ifdef PRESTO_RT_ISA

namespace PRESTO_RT_ISA {
namespace {

// gelu_tanh(x) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh u) / 2 without cancellation.
// silu(x) = x / (1 + exp(-x)). Both give NaN for x = -inf, where the limit is 0, as torch does.
template <Activation kActivation>
PRESTO_RT_INLINE Vec activate(Vec x) {
  if constexpr (kActivation == Activation::gelu_tanh) {
    const Vec u = x * fma(x * x, all(-2.0f * 0.7978845608f * 0.044715f), all(-2.0f * 0.7978845608f));
    return x / (exp(u) + 1.0f);
  } else if constexpr (kActivation == Activation::silu) {
    return x / (exp(-x) + 1.0f);
  } else {
    return x;
  }
}

}  // namespace
}  // namespace PRESTO_RT_ISA

#else

struct NamedActivation {
  const char* name;
  Activation activation;
};

// The names by which Python calls them.
constexpr NamedActivation kActivations[] = {
    {"none", Activation::none}, {"gelu_tanh", Activation::gelu_tanh}, {"silu", Activation::silu}};

inline Activation activation_of(const std::string& name) {
  for (const NamedActivation& named : kActivations)
    if (name == named.name) return named.activation;
  throw py::value_error("activation: expected none, gelu_tanh or silu; got '" + name + "'");
}

#endif

}  // namespace presto_rt
