#include "simd_avx512.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kAvx512[2] = {table<CacheF16>("avx512"), table<CacheF32>("avx512")};
}  // namespace squall
