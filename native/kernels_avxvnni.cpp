#include "simd_avx2.h"
//
#include "kernels_impl.h"

namespace squall {
constinit const IntegerKernels kAvxVnni = integers("avxvnni");
}  // namespace squall
