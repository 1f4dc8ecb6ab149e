#include "simd_avx512.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kAvx512Bw[kCacheTypes] = SQUALL_TABLES("avx512bw");
}  // namespace squall
