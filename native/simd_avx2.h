// Sixteen lanes as two halves on AVX2 with FMA and F16C, and with __AVXVNNI__ where the including
// file is compiled for it.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace {

constexpr size_t kRowBlock = 4;       // rows an integer matmul keeps in registers
constexpr size_t kFloatRowBlock = 6;  // rows a float matmul keeps there
constexpr int kTileBlock = 1;         // tiles they do at once
// Few rows fetch every line of the weights ahead: 1.3 to 1.6x on Zen 3, where a part is worse than
// none.
constexpr bool kFetchAll = true;
constexpr size_t kRowsToExpand = 8;  // from so many rows on, unpacking once for all of them pays
constexpr int kQueryBlock = 4;       // queries attention keeps there
constexpr size_t kVectorBlock = 1;   // times so many vectors of keys or values
#ifdef __AVXVNNI__
constexpr bool kDotAddsPairs = false;  // dot() adds to 32 bits at once
#else
constexpr bool kDotAddsPairs = true;
#endif
constexpr bool kSignedDot8 = kDotAddsPairs;  // maddubs saturates on two products of 8-bit codes

struct F32x16 {
  __m256 a, b;
};
struct I32x16 {
  __m256i a, b;
};
struct U8x64 {
  __m256i a, b;
};
struct Mask {
  __m256 a, b;
};

inline F32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32x16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline Mask first(size_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i end = _mm256_set1_epi32(static_cast<int>(n));
  return {
      _mm256_castsi256_ps(_mm256_cmpgt_epi32(end, lane)),
      _mm256_castsi256_ps(_mm256_cmpgt_epi32(end, _mm256_add_epi32(lane, _mm256_set1_epi32(8))))};
}
inline F32x16 load_first(const float* p, size_t n) {
  const Mask m = first(n);
  return {_mm256_maskload_ps(p, _mm256_castps_si256(m.a)),
          n > 8 ? _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.b)) : _mm256_setzero_ps()};
}
inline void store_first(float* p, F32x16 x, size_t n) {
  const Mask m = first(n);
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.a), x.a);
  if (n > 8) _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.b), x.b);
}
inline F32x16 add(F32x16 x, F32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32x16 sub(F32x16 x, F32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F32x16 mul(F32x16 x, F32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32x16 div(F32x16 x, F32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F32x16 fma(F32x16 x, F32x16 y, F32x16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline F32x16 max(F32x16 x, F32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F32x16 min(F32x16 x, F32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F32x16 abs(F32x16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F32x16 round_even(F32x16 x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
}
inline Mask less(F32x16 x, F32x16 y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)};
}
inline F32x16 select(Mask m, F32x16 yes, F32x16 no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
inline Mask lanes(size_t from, size_t to) {
  const Mask f = first(from), t = first(to);
  return {_mm256_andnot_ps(f.a, t.a), _mm256_andnot_ps(f.b, t.b)};
}
inline __m256 scale_exponent(__m256 x, __m256 n) {
  const __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23)));
}
inline F32x16 scale_exponent(F32x16 x, F32x16 n) {
  return {scale_exponent(x.a, n.a), scale_exponent(x.b, n.b)};
}

inline float sum(F32x16 x) {
  const __m256 h = _mm256_add_ps(x.a, x.b);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float max_of(F32x16 x) {
  const __m256 h = _mm256_max_ps(x.a, x.b);
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

inline F32x16 load(const uint16_t* half) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + 8)))};
}
inline __m256 load_bf16_half(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F32x16 load_bf16(const uint16_t* p) { return {load_bf16_half(p), load_bf16_half(p + 8)}; }
inline void store(uint16_t* half, F32x16 x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(half), _mm256_cvtps_ph(x.a, kMode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(half + 8), _mm256_cvtps_ph(x.b, kMode));
}
inline __m256i widen_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline F32x16 load_u8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(widen_u8(p)), _mm256_cvtepi32_ps(widen_u8(p + 8))};
}
inline __m256 load_i8_half(const uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F32x16 load_i8(const uint8_t* p) { return {load_i8_half(p), load_i8_half(p + 8)}; }
inline __m256 load_nibbles_half(const uint8_t* p, bool high) {
  const __m256i b = widen_u8(p);
  return _mm256_cvtepi32_ps(high ? _mm256_srli_epi32(b, 4)
                                 : _mm256_and_si256(b, _mm256_set1_epi32(15)));
}
inline F32x16 load_nibbles(const uint8_t* p, bool high) {
  return {load_nibbles_half(p, high), load_nibbles_half(p + 8, high)};
}

inline I32x16 izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
template <int kShift>
inline I32x16 splat_shifted(const int32_t* p) {
  const __m256i v = _mm256_slli_epi32(_mm256_set1_epi32(*p), kShift);
  return {v, v};
}
inline I32x16 add(I32x16 x, I32x16 y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
template <int kShift>
inline I32x16 shift_left(I32x16 x) {
  return {_mm256_slli_epi32(x.a, kShift), _mm256_slli_epi32(x.b, kShift)};
}
inline F32x16 to_float(I32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline void store_i8(int8_t* p, F32x16 x) {
  const __m256i words =
      _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // 0-3 8-11 4-7 12-15
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline U8x64 load_codes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline void store_codes(uint8_t* p, U8x64 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
}
template <int kRight, int kLeft>
inline __m256i bits_of(__m256i v, int mask) {
  if constexpr (kRight > 0) v = _mm256_srli_epi16(v, kRight);
  if constexpr (kLeft > 0) v = _mm256_slli_epi16(v, kLeft);
  return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(mask)));
}
template <int kRight, int kLeft>
inline U8x64 bits_of(U8x64 x, int mask) {
  return {bits_of<kRight, kLeft>(x.a, mask), bits_of<kRight, kLeft>(x.b, mask)};
}
inline U8x64 either(U8x64 x, U8x64 y) {
  return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
}

template <int j>
inline __m256i splat_four(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x + 4 * j, 4);
  return _mm256_set1_epi32(four);
}
struct I16x32 {
  __m256i a, b;
};
#ifdef __AVXVNNI__
inline I32x16 add_pairs(I32x16 acc, I16x32) { return acc; }
template <int kBits, int j>
inline I32x16 dot(I32x16 acc, U8x64 codes, const int8_t* x) {
  const __m256i four = splat_four<j>(x);
  return {_mm256_dpbusd_avx_epi32(acc.a, codes.a, four),
          _mm256_dpbusd_avx_epi32(acc.b, codes.b, four)};
}
#else
// GCC would keep all products of a run, on the stack, and add them up at its end.
template <class T>
inline T added(T sum) {
  asm("" : "+x"(sum.a), "+x"(sum.b));
  return sum;
}
inline I32x16 add_pairs(I32x16 acc, I16x32 pairs) {
  const __m256i one = _mm256_set1_epi16(1);
  return added(I32x16{_mm256_add_epi32(acc.a, _mm256_madd_epi16(pairs.a, one)),
                      _mm256_add_epi32(acc.b, _mm256_madd_epi16(pairs.b, one))});
}
template <int kBits>
inline __m256i pair_products(__m256i codes, __m256i x) {
  if constexpr (kBits < 8) return _mm256_maddubs_epi16(codes, x);
  const __m256i w = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
  return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
template <int kBits, int j>
inline I16x32 dot(I16x32 pairs, U8x64 codes, const int8_t* x) {
  const __m256i four = splat_four<j>(x);
  return added(I16x32{_mm256_add_epi16(pairs.a, pair_products<kBits>(codes.a, four)),
                      _mm256_add_epi16(pairs.b, pair_products<kBits>(codes.b, four))});
}
#endif

}  // namespace
