// AVX-512 and AVX-VNNI made of AVX2 by SIMDe, so that any processor with AVX2 tests their kernels.
// Included in front of those, which are then compiled for AVX2, and of the choice among them.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstring>

#define asm(...)  // that holds a value in a register that this processor lacks

#ifdef SQUALL_SIMDE_VNNI
#define __AVX512VNNI__
#define __AVXVNNI__
#define _mm256_dpbusd_avx_epi32(sum, a, b) simde_mm256_dpbusd_epi32(sum, a, b)
#endif

// SIMDe 0.7.4 gives this name to the masked form.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)

// What SIMDe 0.7.4 lacks, from the halves.
namespace simde_shim {

template <class Half, class Whole>
Half half(const Whole& x, int which) {
  Half found;
  std::memcpy(&found, reinterpret_cast<const char*>(&x) + sizeof(Half) * which, sizeof(Half));
  return found;
}
template <class Whole, class Half>
Whole whole(const Half& low, const Half& high) {
  Whole found;
  std::memcpy(&found, &low, sizeof(Half));
  std::memcpy(reinterpret_cast<char*>(&found) + sizeof(Half), &high, sizeof(Half));
  return found;
}
inline __m128i upper(__m128i x) { return _mm_srli_si128(x, 8); }

inline __m512 to_float(__m512i x) {
  return whole<__m512>(_mm256_cvtepi32_ps(half<__m256i>(x, 0)),
                       _mm256_cvtepi32_ps(half<__m256i>(x, 1)));
}
inline __m512i to_int(__m512 x) {
  return whole<__m512i>(_mm256_cvtps_epi32(half<__m256>(x, 0)),
                        _mm256_cvtps_epi32(half<__m256>(x, 1)));
}
inline __m512i widen_i8(__m128i x) {
  return whole<__m512i>(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(upper(x)));
}
inline __m512i widen_u8(__m128i x) {
  return whole<__m512i>(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(upper(x)));
}
inline __m512i widen_u16(__m256i x) {
  return whole<__m512i>(_mm256_cvtepu16_epi32(half<__m128i>(x, 0)),
                        _mm256_cvtepu16_epi32(half<__m128i>(x, 1)));
}
inline __m128i low_bytes(__m512i x) {
  int32_t from[16];
  int8_t to[16];
  std::memcpy(from, &x, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<int8_t>(from[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(to));
}
inline __m512 from_halves(__m256i x) {
  return whole<__m512>(_mm256_cvtph_ps(half<__m128i>(x, 0)), _mm256_cvtph_ps(half<__m128i>(x, 1)));
}
template <int kMode>
__m256i to_halves(__m512 x) {
  return whole<__m256i>(_mm256_cvtps_ph(half<__m256>(x, 0), kMode),
                        _mm256_cvtps_ph(half<__m256>(x, 1), kMode));
}
inline __m512 load_masked(__mmask16 mask, const float* p) {
  float lanes[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) lanes[i] = p[i];
  return whole<__m512>(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8));
}
inline void store_masked(float* p, __mmask16 mask, __m512 x) {
  float lanes[16];
  std::memcpy(lanes, &x, sizeof lanes);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) p[i] = lanes[i];
}
inline __m512 scale_exponent(__m512 x, __m512 n) {
  float from[16], by[16];
  std::memcpy(from, &x, sizeof from);
  std::memcpy(by, &n, sizeof by);
  for (int i = 0; i < 16; ++i) from[i] = std::scalbn(from[i], static_cast<int>(std::floor(by[i])));
  return load_masked(0xFFFF, from);
}
inline float greatest(__m512 x) {
  const __m256 h = _mm256_max_ps(half<__m256>(x, 0), half<__m256>(x, 1));
  const __m128 q = _mm_max_ps(half<__m128>(h, 0), half<__m128>(h, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

}  // namespace simde_shim

#define _mm512_cvtepi32_ps simde_shim::to_float
#define _mm512_cvtps_epi32 simde_shim::to_int
#define _mm512_cvtepi8_epi32 simde_shim::widen_i8
#define _mm512_cvtepu8_epi32 simde_shim::widen_u8
#define _mm512_cvtepu16_epi32 simde_shim::widen_u16
#define _mm512_cvtepi32_epi8 simde_shim::low_bytes
#define _mm512_cvtph_ps simde_shim::from_halves
#define _mm512_cvtps_ph(x, mode) simde_shim::to_halves<mode>(x)
#define _mm512_extractf32x8_ps simde_shim::half<__m256>
#define _mm512_maskz_loadu_ps simde_shim::load_masked
#define _mm512_mask_storeu_ps simde_shim::store_masked
#undef _mm512_scalef_ps
#define _mm512_scalef_ps simde_shim::scale_exponent
#define _mm512_reduce_max_ps simde_shim::greatest
