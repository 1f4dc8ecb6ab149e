// Sixteen lanes as four quarters on AArch64, for three ISAs: with __ARM_FEATURE_DOTPROD and
// __ARM_FEATURE_MATMUL_INT8 where the including file is compiled for them, or without.
#pragma once
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace {

constexpr size_t kRowBlock = 4;        // rows an integer matmul keeps in registers
constexpr size_t kFloatRowBlock = 4;   // rows a float matmul keeps there
constexpr int kTileBlock = 1;          // tiles they do at once
constexpr bool kFetchAll = false;      // few rows fetch a line of 32 columns ahead
constexpr size_t kRowsToExpand = 48;   // from so many rows on, unpacking once for all of them pays
constexpr int kQueryBlock = 4;         // queries attention keeps there
constexpr size_t kVectorBlock = 1;     // times so many vectors of keys or values
constexpr bool kSignedDot8 = true;     // there is no unsigned by signed product
constexpr bool kDotAddsPairs = false;  // dot() adds to 32 bits at once

struct F32x16 {
  float32x4_t v[4];
};
struct I32x16 {
  int32x4_t v[4];
};
struct U8x64 {
  uint8x16_t v[4];
};
struct Mask {
  uint32x4_t v[4];
};

template <class To, class Fn>
[[gnu::always_inline]] inline To quarters(Fn fn) {
  return {{fn(0), fn(1), fn(2), fn(3)}};
}

inline F32x16 set1(float x) {
  return quarters<F32x16>([=](int) { return vdupq_n_f32(x); });
}
inline F32x16 zero() { return set1(0.0f); }
inline F32x16 load(const float* p) {
  return quarters<F32x16>([=](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, F32x16 x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
inline F32x16 load_first(const float* p, size_t n) {
  if (n == 16) return load(p);
  float lane[16] = {};
  __builtin_memcpy(lane, p, n * sizeof(float));
  return load(lane);
}
inline void store_first(float* p, F32x16 x, size_t n) {
  if (n == 16) return store(p, x);
  float lane[16];
  store(lane, x);
  __builtin_memcpy(p, lane, n * sizeof(float));
}
inline F32x16 add(F32x16 x, F32x16 y) {
  return quarters<F32x16>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); });
}
inline F32x16 sub(F32x16 x, F32x16 y) {
  return quarters<F32x16>([&](int i) { return vsubq_f32(x.v[i], y.v[i]); });
}
inline F32x16 mul(F32x16 x, F32x16 y) {
  return quarters<F32x16>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
}
inline F32x16 div(F32x16 x, F32x16 y) {
  return quarters<F32x16>([&](int i) { return vdivq_f32(x.v[i], y.v[i]); });
}
inline F32x16 fma(F32x16 x, F32x16 y, F32x16 z) {
  return quarters<F32x16>([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
}
inline Mask less(F32x16 x, F32x16 y) {
  return quarters<Mask>([&](int i) { return vcltq_f32(x.v[i], y.v[i]); });
}
inline F32x16 select(Mask m, F32x16 yes, F32x16 no) {
  return quarters<F32x16>([&](int i) { return vbslq_f32(m.v[i], yes.v[i], no.v[i]); });
}
// Not vmaxq and vminq: they would hand on a NaN of either operand.
inline F32x16 max(F32x16 x, F32x16 y) { return select(less(y, x), x, y); }
inline F32x16 min(F32x16 x, F32x16 y) { return select(less(x, y), x, y); }
inline F32x16 abs(F32x16 x) {
  return quarters<F32x16>([&](int i) { return vabsq_f32(x.v[i]); });
}
inline F32x16 round_even(F32x16 x) {
  return quarters<F32x16>([&](int i) { return vrndnq_f32(x.v[i]); });
}
inline Mask lanes(size_t from, size_t to) {
  const uint32x4_t f = vdupq_n_u32(static_cast<uint32_t>(from));
  const uint32x4_t t = vdupq_n_u32(static_cast<uint32_t>(to));
  const uint32x4_t lane = {0, 1, 2, 3};
  return quarters<Mask>([&](int i) {
    const uint32x4_t at = vaddq_u32(lane, vdupq_n_u32(4 * static_cast<uint32_t>(i)));
    return vandq_u32(vcgeq_u32(at, f), vcltq_u32(at, t));
  });
}
inline F32x16 scale_exponent(F32x16 x, F32x16 n) {
  return quarters<F32x16>([&](int i) {
    const int32x4_t bits = vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127));
    return vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(bits, 23)));
  });
}

inline float sum(F32x16 x) {
  const float32x4_t q = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
inline float max_of(F32x16 x) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(x.v[0], x.v[2]), vmaxnmq_f32(x.v[1], x.v[3])));
}

inline F32x16 load(const uint16_t* half) {
  return quarters<F32x16>(
      [=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + 4 * i))); });
}
inline F32x16 load_bf16(const uint16_t* p) {
  return quarters<F32x16>(
      [=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline void store(uint16_t* half, F32x16 x) {
  for (int i = 0; i < 4; ++i) vst1_u16(half + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
inline F32x16 widen(uint8x16_t x) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_high_u8(x);
  return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
           vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))}};
}
inline F32x16 load_u8(const uint8_t* p) { return widen(vld1q_u8(p)); }
inline F32x16 load_i8(const uint8_t* p) {
  const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(p));
  const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}
inline F32x16 load_nibbles(const uint8_t* p, bool high) {
  const uint8x16_t x = vld1q_u8(p);
  return widen(high ? vshrq_n_u8(x, 4) : vandq_u8(x, vdupq_n_u8(15)));
}

inline I32x16 izero() {
  return quarters<I32x16>([](int) { return vdupq_n_s32(0); });
}
template <int kShift>
inline I32x16 splat_shifted(const int32_t* p) {
  const int32x4_t x = vshlq_n_s32(vdupq_n_s32(*p), kShift);
  return {{x, x, x, x}};
}
inline I32x16 add(I32x16 x, I32x16 y) {
  return quarters<I32x16>([&](int i) { return vaddq_s32(x.v[i], y.v[i]); });
}
template <int kShift>
inline I32x16 shift_left(I32x16 x) {
  return quarters<I32x16>([&](int i) { return vshlq_n_s32(x.v[i], kShift); });
}
inline F32x16 to_float(I32x16 x) {
  return quarters<F32x16>([&](int i) { return vcvtq_f32_s32(x.v[i]); });
}
inline int16x8_t to_words(float32x4_t low, float32x4_t high) {
  return vcombine_s16(vmovn_s32(vcvtq_s32_f32(low)), vmovn_s32(vcvtq_s32_f32(high)));
}
inline void store_i8(int8_t* p, F32x16 x) {
  const int16x8_t low = to_words(x.v[0], x.v[1]), high = to_words(x.v[2], x.v[3]);
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

inline U8x64 load_codes(const uint8_t* p) {
  return quarters<U8x64>([=](int i) { return vld1q_u8(p + 16 * i); });
}
inline void store_codes(uint8_t* p, U8x64 x) {
  for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, x.v[i]);
}
template <int kRight, int kLeft>
inline U8x64 bits_of(U8x64 x, int mask) {
  return quarters<U8x64>([&](int i) {
    uint8x16_t v = x.v[i];
    if constexpr (kRight > 0) v = vshrq_n_u8(v, kRight);
    if constexpr (kLeft > 0) v = vshlq_n_u8(v, kLeft);
    return vandq_u8(v, vdupq_n_u8(static_cast<uint8_t>(mask)));
  });
}
inline U8x64 either(U8x64 x, U8x64 y) {
  return quarters<U8x64>([&](int i) { return vorrq_u8(x.v[i], y.v[i]); });
}

template <int kBits>
inline int8x16_t signed_codes(uint8x16_t codes) {
  if constexpr (kBits == 8) codes = veorq_u8(codes, vdupq_n_u8(0x80));
  return vreinterpretq_s8_u8(codes);
}
template <int kFour>  // of x
inline int32x4_t dot(int32x4_t acc, int8x16_t w, int8x16_t x) {
#ifdef __ARM_FEATURE_DOTPROD
  return vdotq_laneq_s32(acc, w, x, kFour);
#else  // two products of at most 128 * 127 fit a word
  x = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), kFour));
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
  return vpadalq_s16(acc, vpaddq_s16(low, high));
#endif
}
template <int kBits, int j>
inline I32x16 dot(I32x16 acc, U8x64 codes, const int8_t* x) {
  const int8x16_t run = vld1q_s8(x + j / 4 * 16);
  return quarters<I32x16>(
      [&](int i) { return dot<j % 4>(acc.v[i], signed_codes<kBits>(codes.v[i]), run); });
}

using I16x32 = I32x16;
inline I32x16 add_pairs(I32x16 acc, I16x32) { return acc; }

}  // namespace
