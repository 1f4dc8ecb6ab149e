// Small numbers into the bytes of blocks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace squall {

inline void put_half(uint8_t* to, float value) {
  const uint16_t half = float_to_half(value);
  memcpy(to, &half, 2);
}

// Bits [shift, shift + kBits) of the codes: the 8 / kBits runs of `run` columns that follow each
// other share `run` bytes, the first in the lowest bits.
template <int kBits>
void put_bits(const uint8_t* codes, size_t columns, int shift, size_t run, uint8_t* to) {
  constexpr size_t kRuns = 8 / kBits;
  for (; columns > 0; columns -= kRuns * run, codes += kRuns * run, to += run)
    for (size_t i = 0; i < run; ++i) {
      int byte = 0;
      for (size_t r = 0; r < kRuns; ++r)
        byte |= (codes[r * run + i] >> shift & ((1 << kBits) - 1)) << r * kBits;
      to[i] = static_cast<uint8_t>(byte);
    }
}

// The integer nearest to `steps`, half to even, in [low, high]. Without a call or a branch, so that
// loops over it become vectors.
inline float nearest(float steps, float low, float high) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it drops the fraction
  steps = steps < low ? low : steps;
  steps = steps > high ? high : steps;
  return (steps + kRound) - kRound;
}

// The least and the largest of n values, a multiple of 8; eight at a time.
struct Extremes {
  float low, high;
};

inline Extremes extremes(const float* x, size_t n) {
  float low[8], high[8];
  memcpy(low, x, sizeof low);
  memcpy(high, x, sizeof high);
  for (size_t i = 8; i < n; i += 8)
    for (size_t l = 0; l < 8; ++l) {
      low[l] = x[i + l] < low[l] ? x[i + l] : low[l];
      high[l] = x[i + l] > high[l] ? x[i + l] : high[l];
    }
  Extremes all = {low[0], high[0]};
  for (size_t l = 1; l < 8; ++l) {
    all.low = low[l] < all.low ? low[l] : all.low;
    all.high = high[l] > all.high ? high[l] : all.high;
  }
  return all;
}

// The largest magnitude.
inline float peak_of(const float* x, size_t n) {
  const auto [low, high] = extremes(x, n);
  return __builtin_fabsf(-low > high ? low : high);
}

}  // namespace squall
