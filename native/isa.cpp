#include "kernels.h"

namespace squall {

const Kernels* find_kernels(std::string_view isa, bool f32_cache) {
  if (isa == "scalar") return &kScalar[f32_cache];
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == "avx2" && avx2) return &kAvx2[f32_cache];
  if (isa == "avx512" && avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    return &kAvx512[f32_cache];
#endif
  return nullptr;
}

}  // namespace squall
