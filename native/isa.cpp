#include <algorithm>
#include <array>
#include <optional>

#include "kernels.h"
#include "platform.h"

namespace squall {
namespace {

struct Isa {
  const IntegerKernels* integers;
  const Kernels* rest;
  std::optional<Cpu> needs;
};

#if defined(__x86_64__) && !defined(SQUALL_SCALAR)

constexpr Isa kIsas[] = {
#ifndef SQUALL_SANITIZE  // which the checks' instrumentation would make too slow to build
    {&kAvx512, kAvx512Bw, Cpu::kAvx512Vnni},
    {&kAvxVnni, kAvx2, Cpu::kAvxVnni},
    {kAvx512Bw, kAvx512Bw, Cpu::kAvx512Bw},
#endif
    {kAvx2, kAvx2, Cpu::kAvx2},
    {kScalar, kScalar, {}}};

#elif defined(__aarch64__) && !defined(SQUALL_SCALAR)

constexpr Isa kIsas[] = {
    {&kDotprod, kNeon, Cpu::kDotprod}, {kNeon, kNeon, {}}, {kScalar, kScalar, {}}};

#else
constexpr Isa kIsas[] = {{kScalar, kScalar, {}}};
#endif

using Tables = std::array<Kernels, kCacheTypes>;

// Of the ISAs that this machine runs.
const std::vector<Tables>& tables() {
  static const std::vector<Tables> all = [] {
    std::vector<Tables> found;
    for (const Isa& isa : kIsas) {
      if (isa.needs && !cpu_has(*isa.needs)) continue;
      std::copy_n(isa.rest, kCacheTypes, found.emplace_back().begin());
      for (IntegerKernels& integers : found.back()) integers = *isa.integers;
    }
    return found;
  }();
  return all;
}

}  // namespace

std::vector<std::string_view> isas() {
  std::vector<std::string_view> found;
  for (const Tables& isa : tables()) found.push_back(isa.front().isa);
  return found;
}

const Kernels* find_kernels(std::string_view name, CacheType cache) {
  for (const Tables& isa : tables())
    if (isa.front().isa == name) return &isa[static_cast<size_t>(cache)];
  return nullptr;
}

}  // namespace squall
