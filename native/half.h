// Half-precision conversions without hardware help; exact, round to nearest even.
#pragma once
#include <bit>
#include <cstdint>

namespace squall {

// Without a branch, so that loops over it become vectors.
static inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  const float tiny = std::bit_cast<float>(rest + (113u << 23)) - 0x1p-14f;  // subnormal or zero
  uint32_t bits = rest + (112u << 23);
  bits = rest >= 31u << 23 ? rest | 0x7f800000u : bits;
  bits = rest < 1u << 23 ? std::bit_cast<uint32_t>(tiny) : bits;
  return std::bit_cast<float>(sign | bits);
}

static inline uint16_t float_to_half(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (rest < 0x38800000) {  // below 2^-14: let the float adder round to a multiple of 2^-24
    const float shifted = std::bit_cast<float>(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000));
  }
  const uint32_t odd = rest >> 13 & 1;
  return static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xfff + odd) >> 13));
}

static inline float bf16_to_float(uint16_t b) {
  return std::bit_cast<float>(static_cast<uint32_t>(b) << 16);
}

static inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The eight bits of E4M3 (no infinities; 0x7f is NaN) are those of a half 2^8 times smaller.
constexpr float kF8Unit = 256.0f;

static inline uint16_t f8_to_half(uint8_t f) {
  const auto wide = static_cast<uint16_t>(static_cast<int8_t>(f));  // the sign in bits 7 to 15
  return static_cast<uint16_t>(wide << 7 & 0xbfff);
}

// Rounds to nearest even; what is too large becomes the largest, 448.
static inline uint8_t float_to_f8(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f), rest = bits & 0x7fffffff;
  const uint32_t sign = bits >> 24 & 0x80;
  if (rest < 0x3c800000) {  // below 2^-6: a multiple of 2^-9
    const float shifted = std::bit_cast<float>(rest) + 0x1p14f;
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x46800000));
  }
  const uint32_t code = (rest - 0x3c000000 + 0x7ffff + (rest >> 20 & 1)) >> 20;
  return static_cast<uint8_t>(sign | (code < 0x7e ? code : 0x7e));
}

}  // namespace squall
