#include "simd_avx512.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kAvx512[kCacheTypes] = SQUALL_TABLES("avx512");
}  // namespace squall
