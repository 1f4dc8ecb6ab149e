#include "weigh.h"

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace squall {
namespace {

#define SQUALL_INLINE inline __attribute__((always_inline))

SQUALL_INLINE float exponential(float y) {
  const float x = y > -85.0f ? y : -85.0f;
  const float n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;  // rounds
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const int32_t bits = (static_cast<int32_t>(n) + 127) * (1 << 23);
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return y > -85.0f ? p * power : 0.0f;
}

SQUALL_INLINE void weigh_all(const float* x, size_t n, float top, float scale, float* out) {
  for (size_t i = 0; i < n; ++i)
    out[i] = exponential(((x[i] > FLT_MAX ? FLT_MAX : x[i]) - top) * scale);
}

void weigh_plain(const float* x, size_t n, float top, float scale, float* out) {
  weigh_all(x, n, top, scale, out);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void weigh_avx2(const float* x, size_t n, float top, float scale,
                                                float* out) {
  weigh_all(x, n, top, scale, out);
}
const bool kAvx2 = cpu_has(Cpu::kAvx2);
constexpr Weigh kVariants[] = {weigh_plain, weigh_avx2};
#else
constexpr bool kAvx2 = false;
constexpr Weigh kVariants[] = {weigh_plain};
#endif

}  // namespace

std::span<const Weigh> weigh_variants() { return {kVariants, kAvx2 ? 2u : 1u}; }
const Weigh weigh = weigh_variants().back();

}  // namespace squall
