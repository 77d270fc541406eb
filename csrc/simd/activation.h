// The activations, for the operators that apply them.
#pragma once

#include "operator.h"

#ifdef PRESTO_RT_ISA
namespace presto_rt {
namespace PRESTO_RT_ISA {
namespace {

// y / (e^u + 1) is -inf / inf for x = -inf, where the limit is 0. torch gives NaN there for both; so do these.
PRESTO_RT_INLINE Vec gelu_tanh(Vec x) {
  const Vec u = x * fma(x * x, all(-2.0f * 0.7978845608f * 0.044715f), all(-2.0f * 0.7978845608f));
  return x / (exp(u) + 1.0f);
}

PRESTO_RT_INLINE Vec silu(Vec x) {
  return x / (exp(-x) + 1.0f);
}

}  // namespace
}  // namespace PRESTO_RT_ISA
}  // namespace presto_rt
#endif
