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
  const Kernels* tables;
  bool (*runs)();  // here
};

bool always() { return true; }

#if defined(__x86_64__)

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
constexpr Isa kIsas[] = {
    {kAvx512, has_avx512}, {kAvxVnni, has_avxvnni}, {kAvx2, has_avx2}, {kScalar, always}};

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
constexpr Isa kIsas[] = {{kDotprod, has_dotprod}, {kNeon, always}, {kScalar, always}};

#else
constexpr Isa kIsas[] = {{kScalar, always}};
#endif

}  // namespace

std::vector<std::string_view> isas() {
  std::vector<std::string_view> found;
  for (const Isa& isa : kIsas)
    if (isa.runs()) found.push_back(isa.tables->isa);
  return found;
}

const Kernels* find_kernels(std::string_view name, CacheType cache) {
  for (const Isa& isa : kIsas)
    if (isa.tables->isa == name && isa.runs()) return &isa.tables[static_cast<size_t>(cache)];
  return nullptr;
}

}  // namespace squall
