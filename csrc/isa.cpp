// Choice of the instruction set that the operators in simd/ run with, and of the threads that they use.
#include <cstring>
#include <string>

#if defined(PRESTO_RT_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "simd/dispatch.h"

namespace presto_rt {

std::atomic<Team> team{nullptr};

namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512", "amx"};
constexpr Isa kAll[] = {Isa::base, Isa::avx2, Isa::avx512, Isa::amx};

// True if the processor has tiles with bf16 products and the operating system lets this process use them. It must be asked,
// because their registers make every saved thread larger by 8 KB.
bool tiles() {
#if defined(PRESTO_RT_AMX) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  constexpr long kAskForState = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

bool has(Isa which) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (which == Isa::avx2) return avx2;
  if (which == Isa::amx) {
    static const bool granted = tiles();
    return granted && has(Isa::avx512);
  }
  if (which == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16");
#endif
  return which == Isa::base;
}

Isa best() {
  Isa found = Isa::base;
  for (const Isa which : kAll)
    if (has(which)) found = which;
  return found;
}

std::atomic<Isa> chosen{best()};

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Isa which : kAll)
    if (has(which)) names.emplace_back(kNames[static_cast<int>(which)]);
  return names;
}

void use_isa(const std::string& name) {
  for (const Isa which : kAll) {
    if (name != kNames[static_cast<int>(which)]) continue;
    require(has(which), "name: this processor does not have that instruction set; choose one of isas()");
    chosen.store(which);
    return;
  }
  throw py::value_error("name: expected base, avx2, avx512 or amx; got '" + name + "'");
}

}  // namespace

Isa isa() {
  return chosen.load(std::memory_order_relaxed);
}

namespace {

const Registrar registrar([](py::module_& module) {
  module.def("isa", [] { return kNames[static_cast<int>(isa())]; }, "Name of the instruction set in use.");
  module.def("isas", &available, "Names of the instruction sets of this processor, the plainest first.");
  module.def("use_isa", &use_isa, py::arg("name"), "Use one of `isas`, in the whole process.");
  module.def(
      "use_openmp", [](std::uintptr_t address) { team = reinterpret_cast<Team>(address); }, py::arg("address"),
      "Take threads from the GOMP_parallel at this address; 0: start threads for each call.");
});

}  // namespace
}  // namespace presto_rt
