#include "simd_neon.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kDotprod[kCacheTypes] = SQUALL_TABLES("dotprod");
}  // namespace squall
