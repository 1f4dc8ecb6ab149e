#include "simd_avx2.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kAvxVnni[kCacheTypes] = SQUALL_TABLES("avxvnni");
}  // namespace squall
