// Choice among the compilations of an operator, and division of its work among threads. Included by the parts that are compiled
// once.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../common.h"

namespace presto_rt {

enum class Isa { base, avx2, avx512, amx };

// The instruction set in use: the best that this processor has, or what `use_isa` asked for. amx is avx512 with the kernels in
// ../amx in place of their vector versions.
Isa isa();

#if defined(__x86_64__)
#define PRESTO_RT_VARIANTS(name, ...)                      \
  namespace base {                                         \
  void name(__VA_ARGS__);                                  \
  }                                                        \
  namespace avx2 {                                         \
  void name(__VA_ARGS__);                                  \
  }                                                        \
  namespace avx512 {                                       \
  void name(__VA_ARGS__);                                  \
  }                                                        \
  inline void (*name##_variant())(__VA_ARGS__) {           \
    if (isa() >= Isa::avx512) return &avx512::name;        \
    return isa() == Isa::avx2 ? &avx2::name : &base::name; \
  }
#else
#define PRESTO_RT_VARIANTS(name, ...)            \
  namespace base {                               \
  void name(__VA_ARGS__);                        \
  }                                              \
  inline void (*name##_variant())(__VA_ARGS__) { \
    return &base::name;                          \
  }
#endif

// GOMP_parallel of the OpenMP library that torch has loaded, or null. Its threads are those that torch's own products run on:
// a pool of our own would wait for a processor while they spin after each product.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern std::atomic<Team> team;

// Calls body(part) for part = 0 ... parts - 1 on at most `threads` threads, and returns when all are done.
template <class Body>
void parallel(int threads, std::int64_t parts, const Body& body) {
  struct Shared {
    const Body& body;
    std::atomic<std::int64_t> next;
    std::int64_t parts;
  } shared{body, {0}, parts};
  const auto work = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    for (std::int64_t part = s.next++; part < s.parts; part = s.next++) s.body(part);
  };
  if (threads > parts) threads = static_cast<int>(parts);
  if (threads <= 1) return work(&shared);
  if (const Team run = team.load()) return run(work, &shared, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, &shared);
  work(&shared);
  for (std::thread& other : others) other.join();
}

// Calls body(first, last) for contiguous shares of 0 ... count, one for each thread, each a multiple of `grain` but the last.
template <class Body>
void parallel_ranges(int threads, std::int64_t count, std::int64_t grain, const Body& body) {
  const std::int64_t grains = (count + grain - 1) / grain;
  const std::int64_t parts = threads < 1 ? 1 : threads < grains ? threads : grains;
  parallel(threads, parts, [&](std::int64_t part) {
    const std::int64_t first = grains * part / parts * grain, last = grains * (part + 1) / parts * grain;
    body(first, last < count ? last : count);
  });
}

}  // namespace presto_rt
