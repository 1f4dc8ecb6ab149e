#include "simd_avx2.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kAvx2[2] = {table<CacheF16>("avx2"), table<CacheF32>("avx2")};
}  // namespace squall
