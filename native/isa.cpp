#include <algorithm>
#include <array>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace squall {
namespace {

struct Isa {
  const IntegerKernels* integers;
  const Kernels* rest;
  bool (*runs)();  // here
};

bool always() { return true; }

#if defined(__x86_64__)

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx512bw() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx512bw() && __builtin_cpu_supports("avx512vnni");
}
constexpr Isa kIsas[] = {
#ifndef SQUALL_SANITIZE  // which the checks' instrumentation would make too slow to build
    {&kAvx512, kAvx512Bw, has_avx512},
    {&kAvxVnni, kAvx2, has_avxvnni},
    {kAvx512Bw, kAvx512Bw, has_avx512bw},
#endif
    {kAvx2, kAvx2, has_avx2},
    {kScalar, kScalar, always}};

#elif defined(__aarch64__)

#if defined(__linux__)
bool has_dotprod() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#elif defined(__APPLE__)
bool has_dotprod() {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value != 0;
}
#else
bool has_dotprod() { return false; }
#endif
constexpr Isa kIsas[] = {
    {&kDotprod, kNeon, has_dotprod}, {kNeon, kNeon, always}, {kScalar, kScalar, always}};

#else
constexpr Isa kIsas[] = {{kScalar, kScalar, always}};
#endif

using Tables = std::array<Kernels, kCacheTypes>;

// Of the ISAs that this machine runs.
const std::vector<Tables>& tables() {
  static const std::vector<Tables> all = [] {
    std::vector<Tables> found;
    for (const Isa& isa : kIsas) {
      if (!isa.runs()) continue;
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
