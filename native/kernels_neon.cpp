#include "simd_neon.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kNeon[2] = {table<CacheF16>("neon"), table<CacheF32>("neon")};
}  // namespace squall
