#include "simd_avx2.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kAvx2[kCacheTypes] = SQUALL_TABLES("avx2");
}  // namespace squall
