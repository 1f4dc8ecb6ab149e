// Sixteen lanes in plain C++: every machine, and the reference the others are held against.
#pragma once
#include <cstddef>
#include <cstdint>

#include "half.h"

namespace {

constexpr size_t kRowBlock = 1;       // rows an integer matmul keeps in registers
constexpr size_t kFloatRowBlock = 1;  // rows a float matmul keeps there
constexpr int kTileBlock = 1;         // tiles they do at once
constexpr bool kFetchAll = false;     // few rows fetch a line of 32 columns ahead
constexpr size_t kRowsToExpand = 48;  // from so many rows on, unpacking once for all of them pays
constexpr int kQueryBlock = 1;        // queries attention keeps there
constexpr size_t kVectorBlock = 1;    // times so many vectors of keys or values
constexpr bool kSignedDot8 = false;
constexpr bool kDotAddsPairs = false;  // dot() adds to 32 bits at once

struct F32x16 {
  float v[16];
};
struct I32x16 {
  int32_t v[16];
};
struct U8x64 {
  uint8_t v[64];
};
struct Mask {
  bool v[16];
};

template <class Fn>
inline F32x16 each(Fn fn) {
  F32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = fn(i);
  return r;
}

inline F32x16 set1(float x) {
  return each([&](int) { return x; });
}
inline F32x16 zero() { return set1(0.0f); }
inline F32x16 load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline void store(float* p, F32x16 a) { __builtin_memcpy(p, a.v, sizeof a.v); }
inline F32x16 load_first(const float* p, size_t n) {
  return each([&](int i) { return static_cast<size_t>(i) < n ? p[i] : 0.0f; });
}
inline void store_first(float* p, F32x16 a, size_t n) { __builtin_memcpy(p, a.v, n * 4); }
inline F32x16 add(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 div(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline F32x16 max(F32x16 a, F32x16 b) {  // as x86: the second operand if either is NaN
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 abs(F32x16 a) {
  return each([&](int i) { return __builtin_fabsf(a.v[i]); });
}
inline F32x16 round_even(F32x16 a) {
  return each([&](int i) { return __builtin_rintf(a.v[i]); });
}
inline Mask less(F32x16 a, F32x16 b) {
  Mask m;
  for (int i = 0; i < 16; ++i) m.v[i] = a.v[i] < b.v[i];
  return m;
}
inline F32x16 select(Mask m, F32x16 yes, F32x16 no) {
  return each([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; });
}
inline Mask lanes(size_t from, size_t to) {
  Mask m;
  for (size_t i = 0; i < 16; ++i) m.v[i] = i >= from && i < to;
  return m;
}
inline F32x16 scale_exponent(F32x16 a, F32x16 n) {
  return each([&](int i) {  // elsewhere `a` is NaN already
    const int power = n.v[i] >= -127.0f && n.v[i] <= 127.0f ? static_cast<int>(n.v[i]) : 0;
    return a.v[i] * __builtin_ldexpf(1.0f, power);
  });
}

inline float sum(F32x16 a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}
inline float max_of(F32x16 a) {
  float best = a.v[0];
  for (float x : a.v) best = x > best ? x : best;
  return best;
}

inline F32x16 load(const uint16_t* half) {
  return each([&](int i) { return squall::half_to_float(half[i]); });
}
inline F32x16 load_bf16(const uint16_t* p) {
  return each([&](int i) { return squall::bf16_to_float(p[i]); });
}
inline void store(uint16_t* half, F32x16 a) {
  for (int i = 0; i < 16; ++i) half[i] = squall::float_to_half(a.v[i]);
}
inline F32x16 load_u8(const uint8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
inline F32x16 load_i8(const uint8_t* p) {
  return each([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
}
inline F32x16 load_nibbles(const uint8_t* p, bool high) {
  return each([&](int i) { return static_cast<float>(high ? p[i] >> 4 : p[i] & 15); });
}

inline I32x16 izero() { return {}; }
template <int kShift>
inline I32x16 splat_shifted(const int32_t* p) {
  I32x16 r;
  for (int32_t& x : r.v) x = *p * (1 << kShift);
  return r;
}
inline I32x16 add(I32x16 a, I32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
template <int kShift>
inline I32x16 shift_left(I32x16 a) {
  for (int32_t& x : a.v) x *= 1 << kShift;
  return a;
}
inline F32x16 to_float(I32x16 a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
inline void store_i8(int8_t* p, F32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

inline U8x64 load_codes(const uint8_t* p) {
  U8x64 r;
  __builtin_memcpy(r.v, p, 64);
  return r;
}
inline void store_codes(uint8_t* p, U8x64 a) { __builtin_memcpy(p, a.v, 64); }
template <int kRight, int kLeft>
inline U8x64 bits_of(U8x64 a, int mask) {
  for (uint8_t& x : a.v) x = static_cast<uint8_t>(((x >> kRight) << kLeft) & mask);
  return a;
}
inline U8x64 either(U8x64 a, U8x64 b) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] | b.v[i]);
  return a;
}
template <int kBits, int j>
inline I32x16 dot(I32x16 acc, U8x64 codes, const int8_t* x) {
  for (int i = 0; i < 16; ++i)
    for (int c = 0; c < 4; ++c) acc.v[i] += codes.v[4 * i + c] * x[4 * j + c];
  return acc;
}

using I16x32 = I32x16;
inline I32x16 add_pairs(I32x16 acc, I16x32) { return acc; }

}  // namespace
