#include "simd_avx512.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const IntegerKernels kAvx512 = integers("avx512");
}  // namespace squall
