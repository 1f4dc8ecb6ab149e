// Sixteen lanes on AVX-512 (F, BW, VL, DQ), and with __AVX512VNNI__ where the including file is
// compiled for it.
#pragma once
// GCC 12 sees its own _mm512_undefined_*() as uninitialized (bug 105593).
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstddef>
#include <cstdint>

namespace {

constexpr size_t kRowBlock = 4;        // rows an integer matmul keeps in registers
constexpr size_t kFloatRowBlock = 12;  // rows a float matmul keeps there
constexpr int kTileBlock = 2;          // tiles they do at once
// Few rows fetch a line of 32 columns ahead: all lines are a fifth slower on Zen 4.
constexpr bool kFetchAll = false;
constexpr size_t kRowsToExpand = 48;  // from so many rows on, unpacking once for all of them pays
constexpr int kQueryBlock = 6;        // queries attention keeps there
constexpr size_t kVectorBlock = 4;    // times so many vectors of keys or values
#ifdef __AVX512VNNI__
constexpr bool kDotAddsPairs = false;  // dot() adds to 32 bits at once
#else
constexpr bool kDotAddsPairs = true;
#endif
constexpr bool kSignedDot8 = kDotAddsPairs;  // maddubs saturates on two products of 8-bit codes

struct F32x16 {
  __m512 v;
};
struct I32x16 {
  __m512i v;
};
struct U8x64 {
  __m512i v;
};
using Mask = __mmask16;

inline F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 zero() { return {_mm512_setzero_ps()}; }
inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline Mask first(size_t n) { return static_cast<Mask>((1u << n) - 1); }  // n <= 16
inline F32x16 load_first(const float* p, size_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store_first(float* p, F32x16 a, size_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 abs(F32x16 a) { return {_mm512_abs_ps(a.v)}; }
inline F32x16 round_even(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Mask less(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline F32x16 select(Mask m, F32x16 yes, F32x16 no) {
  return {_mm512_mask_blend_ps(m, no.v, yes.v)};
}
// lanes [from, to) set, others clear
inline Mask lanes(size_t from, size_t to) { return static_cast<Mask>(first(to) & ~first(from)); }
// a * 2^n for integral n held as floats
inline F32x16 scale_exponent(F32x16 a, F32x16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// The same order of additions on every ISA: lane i with i+8, +4, +2, +1.
inline float sum(F32x16 a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float max_of(F32x16 a) { return _mm512_reduce_max_ps(a.v); }

inline F32x16 load(const uint16_t* half) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)))};
}
inline F32x16 load_bf16(const uint16_t* p) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void store(uint16_t* half, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(half),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F32x16 load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline F32x16 load_i8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline F32x16 load_nibbles(const uint8_t* p, bool high) {
  const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_cvtepi32_ps(high ? _mm512_srli_epi32(b, 4)
                                  : _mm512_and_si512(b, _mm512_set1_epi32(15)))};
}

inline I32x16 izero() { return {_mm512_setzero_si512()}; }
template <int kShift>
inline I32x16 splat_shifted(const int32_t* p) {
  return {_mm512_slli_epi32(_mm512_set1_epi32(*p), kShift)};
}
inline I32x16 add(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int kShift>
inline I32x16 shift_left(I32x16 a) {
  return {_mm512_slli_epi32(a.v, kShift)};
}
inline F32x16 to_float(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline void store_i8(int8_t* p, F32x16 a) {  // a holds integers in [-127, 127]
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

inline U8x64 load_codes(const uint8_t* p) {
  return {_mm512_loadu_si512(reinterpret_cast<const void*>(p))};
}
inline void store_codes(uint8_t* p, U8x64 a) { _mm512_storeu_si512(static_cast<void*>(p), a.v); }
// ((v >> kRight) << kLeft) & mask, byte by byte; at most one of the shifts is not zero
template <int kRight, int kLeft>
inline U8x64 bits_of(U8x64 a, int mask) {
  __m512i v = a.v;
  if constexpr (kRight > 0) v = _mm512_srli_epi16(v, kRight);
  if constexpr (kLeft > 0) v = _mm512_slli_epi16(v, kLeft);
  return {_mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)))};
}
inline U8x64 either(U8x64 a, U8x64 b) { return {_mm512_or_si512(a.v, b.v)}; }

template <int j>
inline __m512i splat_four(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x + 4 * j, 4);
  return _mm512_set1_epi32(four);
}
struct I16x32 {
  __m512i v;
};
// acc[lane] += dot of the lane's four codes with the j-th four of the 32 int8 at x; kBits tells the
// codes' range
#ifdef __AVX512VNNI__
inline I32x16 add_pairs(I32x16 acc, I16x32) { return acc; }
template <int kBits, int j>
inline I32x16 dot(I32x16 acc, U8x64 codes, const int8_t* x) {
  return {_mm512_dpbusd_epi32(acc.v, codes.v, splat_four<j>(x))};
}
#else
// GCC would keep all products of a run, on the stack, and add them up at its end.
template <class T>
inline T added(T sum) {
  asm("" : "+v"(sum.v));
  return sum;
}
inline I32x16 add_pairs(I32x16 acc, I16x32 pairs) {
  const __m512i fours = _mm512_madd_epi16(pairs.v, _mm512_set1_epi16(1));
  return added(I32x16{_mm512_add_epi32(acc.v, fours)});
}
template <int kBits, int j>
inline I16x32 dot(I16x32 pairs, U8x64 codes, const int8_t* x) {
  __m512i w = codes.v, four = splat_four<j>(x);
  if constexpr (kBits == 8) {
    w = _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80)));
    four = _mm512_mask_sub_epi8(four, _mm512_movepi8_mask(w), _mm512_setzero_si512(), four);
    w = _mm512_abs_epi8(w);
  }
  return added(I16x32{_mm512_add_epi16(pairs.v, _mm512_maddubs_epi16(w, four))});
}
#endif

}  // namespace
