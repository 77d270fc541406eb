// A file in this folder holds one operator and is compiled several times: with PRESTO_RT_ISA set, its loops for that
// instruction set; without, once, the choice among them and the Python binding.
#pragma once

#ifdef PRESTO_RT_ISA
#include "vector.h"
#else
#include "dispatch.h"
#endif
