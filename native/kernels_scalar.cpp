#include "simd_scalar.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kScalar[2] = {table<CacheF16>("scalar"), table<CacheF32>("scalar")};
}  // namespace squall
