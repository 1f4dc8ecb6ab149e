#include "simd_neon.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kNeon[kCacheTypes] = SQUALL_TABLES("neon");
}  // namespace squall
