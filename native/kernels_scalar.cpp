#include "simd_scalar.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const Kernels kScalar[kCacheTypes] = SQUALL_TABLES("scalar");
}  // namespace squall
