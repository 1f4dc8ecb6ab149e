#include "simd_neon.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const IntegerKernels kDotprod = integers("dotprod");
}  // namespace squall
