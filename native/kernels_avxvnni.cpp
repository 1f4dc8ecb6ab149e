#include "simd_avx2.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kAvxVnni[2] = {table<CacheF16>("avxvnni"), table<CacheF32>("avxvnni")};
}  // namespace squall
