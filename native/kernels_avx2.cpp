#include "simd_avx2.h"
//
#include "kernels_impl.h"

namespace squall {
const Kernels kAvx2[2] = {table<CacheF16>("avx2"), table<CacheF32>("avx2")};
}  // namespace squall
