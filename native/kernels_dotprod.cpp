#include "simd_neon.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kDotprod[2] = {table<CacheF16>("dotprod"), table<CacheF32>("dotprod")};
}  // namespace squall
