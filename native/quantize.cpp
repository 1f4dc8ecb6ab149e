#include "quantize.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "bits.h"
#include "half.h"
#include "hqq.h"

namespace squall {
namespace {

constexpr float kNothing = 1e-30f;  // no float16 scale is so small

float rounded_to_half(float value) { return half_to_float(float_to_half(value)); }

float inverse_of(float scale) { return std::abs(scale) < FLT_MIN ? 0.0f : 1.0f / scale; }

// ---- 32 columns: ggml's reference, operation by operation ----

// The fifth bits, bit i that of column i, then the rest.
template <int kBits>
void put_codes(const uint8_t* codes, uint8_t* to) {
  if constexpr (kBits == 5) {
    uint32_t bits = 0;
    for (uint32_t i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(codes[i] >> 4) << i;
    memcpy(to, &bits, 4);
    to += 4;
  }
  put_bits<4>(codes, 32, 0, 16, to);
}

uint8_t code_of(float steps, int largest) {
  return static_cast<uint8_t>(std::clamp(static_cast<int>(steps), 0, largest));
}

// The value farthest from zero becomes the lowest code.
template <int kBits>
void quantize_around(const float* x, uint8_t* to) {
  constexpr float kMiddle = 1 << (kBits - 1);
  const auto [low, high] = extremes(x, 32);
  float peak = -low > high ? low : high;
  if (-low == high)
    peak = *std::find_if(x, x + 32, [top = high](float v) { return std::abs(v) == top; });
  const float scale = peak / -kMiddle, inverse = inverse_of(scale);
  uint8_t codes[32];
  for (size_t i = 0; i < 32; ++i)
    codes[i] = code_of(x[i] * inverse + (kMiddle + 0.5f), (1 << kBits) - 1);
  put_half(to, scale);
  put_codes<kBits>(codes, to + 2);
}

template <int kBits>
void quantize_above(const float* x, uint8_t* to) {
  constexpr int kLargest = (1 << kBits) - 1;
  const auto [low, high] = extremes(x, 32);
  const float scale = (high - low) / kLargest, inverse = inverse_of(scale);
  uint8_t codes[32];
  for (size_t i = 0; i < 32; ++i) codes[i] = code_of((x[i] - low) * inverse + 0.5f, kLargest);
  put_half(to, scale);
  put_half(to + 2, low);
  put_codes<kBits>(codes, to + 4);
}

// q8_0, and q8_1 with the sum between
template <bool kSum>
void quantize_bytes(const float* x, uint8_t* to) {
  const float scale = peak_of(x, 32) / 127.0f, inverse = inverse_of(scale);
  int sum = 0;
  for (size_t i = 0; i < 32; ++i) {
    const float steps = std::abs(x[i] * inverse);
    const int whole = static_cast<int>(steps);
    const int size = whole + (steps - static_cast<float>(whole) >= 0.5f);
    const int code = x[i] < 0.0f ? -size : size;
    sum += code;
    to[(kSum ? 4 : 2) + i] = static_cast<uint8_t>(code);
  }
  put_half(to, scale);
  if (kSum) put_half(to + 2, scale * static_cast<float>(sum));
}

// ---- 256 columns: a search over all groups at once, a lane each ----

// Floats at a lane each, added, compared and chosen without a branch, so that the compiler makes
// vectors of them.
template <size_t kGroups>
struct Lanes {
  float v[kGroups];
};

template <size_t kGroups>
struct Block {
  static constexpr size_t kSize = kSuper / kGroups;
  using L = Lanes<kGroups>;
  L x[kSize], weight[kSize];

  Block(const float* from, const float* importance) {
    for (size_t g = 0; g < kGroups; ++g)
      for (size_t i = 0; i < kSize; ++i) {
        x[i].v[g] = from[g * kSize + i];
        weight[i].v[g] = importance == nullptr ? 1.0f : importance[g * kSize + i];
      }
  }
};

// The best float scale of each group's codes in [-middle, middle - 1]: for given codes q it is
// sum(w x q) / sum(w q q), which takes sum(w x q)^2 / sum(w q q) off the squared error.
template <size_t kGroups>
Lanes<kGroups> fit_scales(const Block<kGroups>& b, float middle, int tries, float step) {
  using L = Lanes<kGroups>;
  L peak = {}, best = {}, gain = {};
  for (const L& x : b.x)
    for (size_t g = 0; g < kGroups; ++g)
      peak.v[g] = std::abs(x.v[g]) > std::abs(peak.v[g]) ? x.v[g] : peak.v[g];
  for (int t = -tries; t <= tries + 1; ++t) {
    L inverse, xq = {}, qq = {};
    for (size_t g = 0; g < kGroups; ++g) {
      const float range =
          t > tries ? 1.0f / best.v[g] : -(middle + step * static_cast<float>(t)) / peak.v[g];
      inverse.v[g] = std::abs(peak.v[g]) < kNothing ? 0.0f : range;
    }
    for (size_t i = 0; i < b.kSize; ++i)
      for (size_t g = 0; g < kGroups; ++g) {
        const float q = nearest(b.x[i].v[g] * inverse.v[g], -middle, middle - 1.0f);
        const float wq = b.weight[i].v[g] * q;
        xq.v[g] += wq * b.x[i].v[g];
        qq.v[g] += wq * q;
      }
    for (size_t g = 0; g < kGroups; ++g) {
      const float scale = qq.v[g] > 0.0f ? xq.v[g] / qq.v[g] : 0.0f, found = scale * xq.v[g];
      best.v[g] = found > gain.v[g] ? scale : best.v[g];
      gain.v[g] = found > gain.v[g] ? found : gain.v[g];
    }
  }
  return best;
}

template <size_t kGroups>
struct Affine {
  Lanes<kGroups> scale = {}, minimum = {};  // value = scale * code - minimum, neither negative
};

template <size_t kGroups>
Affine<kGroups> range_of(const Block<kGroups>& b, float largest) {
  Affine<kGroups> range;
  for (const Lanes<kGroups>& x : b.x)
    for (size_t g = 0; g < kGroups; ++g) {
      range.scale.v[g] = std::max(range.scale.v[g], x.v[g]);
      range.minimum.v[g] = std::max(range.minimum.v[g], -x.v[g]);
    }
  for (size_t g = 0; g < kGroups; ++g)
    range.scale.v[g] = (range.scale.v[g] + range.minimum.v[g]) / largest;
  return range;
}

// Sums over a group, its codes being q.
template <size_t kGroups>
struct Moments {
  Lanes<kGroups> q = {}, qq = {}, xq = {};

  Moments(const Block<kGroups>& b, const Lanes<kGroups>& inverse, const Lanes<kGroups>& minimum,
          float largest) {
    for (size_t i = 0; i < b.kSize; ++i)
      for (size_t g = 0; g < kGroups; ++g) {
        const float x = b.x[i].v[g];
        const float code = nearest((x + minimum.v[g]) * inverse.v[g], 0.0f, largest);
        const float wq = b.weight[i].v[g] * code;
        q.v[g] += wq;
        qq.v[g] += wq * code;
        xq.v[g] += wq * x;
      }
  }
};

template <size_t kGroups>
struct Totals {
  Lanes<kGroups> w = {}, x = {};

  explicit Totals(const Block<kGroups>& b) {
    for (size_t i = 0; i < b.kSize; ++i)
      for (size_t g = 0; g < kGroups; ++g) {
        w.v[g] += b.weight[i].v[g];
        x.v[g] += b.weight[i].v[g] * b.x[i].v[g];
      }
  }
};

// The best float scale and minimum of each group, by the normal equations of given codes.
template <size_t kGroups>
Affine<kGroups> fit_affine(const Block<kGroups>& b, float largest, int tries, float step) {
  const Affine<kGroups> range = range_of(b, largest);
  const Totals<kGroups> all(b);
  Affine<kGroups> best;
  Lanes<kGroups> gain = {};
  for (size_t g = 0; g < kGroups; ++g) gain.v[g] = -FLT_MAX;
  constexpr int kRefine = 2;
  for (int t = -tries; t <= tries + kRefine; ++t) {
    Lanes<kGroups> inverse, minimum;
    for (size_t g = 0; g < kGroups; ++g) {
      const float stretched = (largest + step * static_cast<float>(t)) / largest;
      const float scale = t > tries ? best.scale.v[g] : range.scale.v[g];
      inverse.v[g] = scale < kNothing ? 0.0f : (t > tries ? 1.0f : stretched) / scale;
      minimum.v[g] = t > tries ? best.minimum.v[g] : range.minimum.v[g];
    }
    const Moments<kGroups> m(b, inverse, minimum, largest);
    for (size_t g = 0; g < kGroups; ++g) {
      const float w = all.w.v[g], x = all.x.v[g], q = m.q.v[g], qq = m.qq.v[g], xq = m.xq.v[g];
      const float determinant = w * qq - q * q;
      const bool level = determinant <= 1e-6f * w * qq;
      float scale = level ? 0.0f : (w * xq - x * q) / determinant;
      float offset = level ? (w > 0.0f ? x / w : 0.0f) : (qq * x - q * xq) / determinant;
      const bool above = offset > 0.0f;
      scale = above ? (qq > 0.0f ? xq / qq : 0.0f) : scale;
      offset = above ? 0.0f : offset;
      const float found = scale * xq + offset * x;
      const bool better = found > gain.v[g] && scale >= 0.0f;
      gain.v[g] = better ? found : gain.v[g];
      best.scale.v[g] = better ? scale : best.scale.v[g];
      best.minimum.v[g] = better ? -offset : best.minimum.v[g];
    }
  }
  return best;
}

// What a block stores: code - middle times d times the group's scale, less dmin times its minimum.
template <size_t kGroups>
struct Coded {
  float d = 0.0f, dmin = 0.0f;
  Affine<kGroups> groups;  // small integers
  Lanes<kGroups> codes[kSuper / kGroups];

  // The nearest codes to the scales there are.
  void encode(const Block<kGroups>& b, float lowest, float largest) {
    const auto [step, inverse, minimum] = steps(groups);
    for (size_t i = 0; i < b.kSize; ++i)
      for (size_t g = 0; g < kGroups; ++g)
        codes[i].v[g] = nearest((b.x[i].v[g] + minimum.v[g]) * inverse.v[g], lowest, largest);
  }

  // The squared error of each group's nearest codes with other scales.
  Lanes<kGroups> error(const Block<kGroups>& b, const Affine<kGroups>& other, float lowest,
                       float largest) const {
    const auto [step, inverse, minimum] = steps(other);
    Lanes<kGroups> sum = {};
    for (size_t i = 0; i < b.kSize; ++i)
      for (size_t g = 0; g < kGroups; ++g) {
        const float up = b.x[i].v[g] + minimum.v[g];
        const float off = up - step.v[g] * nearest(up * inverse.v[g], lowest, largest);
        sum.v[g] += b.weight[i].v[g] * off * off;
      }
    return sum;
  }

  // Tries neighbours of the groups' integers, each moved by at most 1, and keeps the best.
  void improve(const Block<kGroups>& b, float lowest, float largest, float low, float high) {
    const Affine<kGroups> from = groups;
    Lanes<kGroups> least = error(b, groups, lowest, largest);
    const float minimum_moves = dmin == 0.0f ? 0.0f : 1.0f;
    for (float down = -minimum_moves; down <= minimum_moves; ++down)
      for (float move = -1.0f; move <= 1.0f; ++move) {
        if (down == 0.0f && move == 0.0f) continue;
        Affine<kGroups> other = from;
        for (size_t g = 0; g < kGroups; ++g) {
          other.scale.v[g] = std::clamp(from.scale.v[g] + move, low, high);
          other.minimum.v[g] = std::clamp(from.minimum.v[g] + down, 0.0f, high);
        }
        const Lanes<kGroups> found = error(b, other, lowest, largest);
        for (size_t g = 0; g < kGroups; ++g) {
          const bool better = found.v[g] < least.v[g];
          least.v[g] = better ? found.v[g] : least.v[g];
          groups.scale.v[g] = better ? other.scale.v[g] : groups.scale.v[g];
          groups.minimum.v[g] = better ? other.minimum.v[g] : groups.minimum.v[g];
        }
      }
  }

  // The best d and dmin of the codes there are: least squares over the block.
  void refit(const Block<kGroups>& b) {
    Lanes<kGroups> aa = {}, ab = {}, bb = {}, xa = {}, xb = {};
    for (size_t i = 0; i < b.kSize; ++i)
      for (size_t g = 0; g < kGroups; ++g) {
        const float w = b.weight[i].v[g], x = b.x[i].v[g], m = groups.minimum.v[g];
        const float a = groups.scale.v[g] * codes[i].v[g], wa = w * a;
        aa.v[g] += wa * a;
        ab.v[g] += wa * m;
        bb.v[g] += w * m * m;
        xa.v[g] += wa * x;
        xb.v[g] += w * m * x;
      }
    const float sum_aa = sum(aa), sum_ab = sum(ab), sum_bb = sum(bb), sum_xa = sum(xa);
    const float determinant = sum_aa * sum_bb - sum_ab * sum_ab;
    if (sum_aa <= 0.0f) return;
    if (dmin == 0.0f || determinant <= 1e-5f * sum_aa * sum_bb) {
      d = rounded_to_half((sum_xa + dmin * sum_ab) / sum_aa);
      return;
    }
    const float best = (sum_xa * sum_bb - sum(xb) * sum_ab) / determinant;
    const float lift = (sum_xa * sum_ab - sum(xb) * sum_aa) / determinant;
    if (lift < 0.0f || best < 0.0f) return;
    d = rounded_to_half(best);
    dmin = rounded_to_half(lift);
  }

 private:
  struct Steps {
    Lanes<kGroups> step, inverse, minimum;
  };

  Steps steps(const Affine<kGroups>& of) const {
    Steps s;
    for (size_t g = 0; g < kGroups; ++g) {
      s.step.v[g] = d * of.scale.v[g];
      const bool none = std::abs(s.step.v[g]) < kNothing;
      s.inverse.v[g] = none ? 0.0f : 1.0f / (none ? 1.0f : s.step.v[g]);
      s.minimum.v[g] = dmin * of.minimum.v[g];
    }
    return s;
  }

  static float sum(const Lanes<kGroups>& lanes) {
    float total = 0.0f;
    for (const float v : lanes.v) total += v;
    return total;
  }
};

// Codes around `middle`, group scales in [-limit, limit).
Coded<16> search_symmetric(const float* x, const float* importance, float middle, float limit,
                           int tries, float step) {
  const Block<16> b(x, importance);
  const Lanes<16> scales = fit_scales(b, middle, tries, step);
  float peak = 0.0f;
  for (const float scale : scales.v) peak = std::abs(scale) > std::abs(peak) ? scale : peak;
  Coded<16> c;
  c.d = rounded_to_half(peak / -limit);
  const float inverse = inverse_of(c.d);
  for (size_t g = 0; g < 16; ++g)
    c.groups.scale.v[g] = nearest(scales.v[g] * inverse, -limit, limit - 1.0f);
  c.improve(b, -middle, middle - 1.0f, -limit, limit - 1.0f);
  c.encode(b, -middle, middle - 1.0f);
  c.refit(b);
  c.encode(b, -middle, middle - 1.0f);
  return c;
}

// Codes up to `largest`, group scales and minimums up to `limit`.
template <size_t kGroups>
Coded<kGroups> search_affine(const float* x, const float* importance, float largest, float limit,
                             int tries, float step) {
  const Block<kGroups> b(x, importance);
  const Affine<kGroups> fit = fit_affine(b, largest, tries, step);
  Coded<kGroups> c;
  c.d = rounded_to_half(*std::max_element(fit.scale.v, fit.scale.v + kGroups) / limit);
  c.dmin = rounded_to_half(*std::max_element(fit.minimum.v, fit.minimum.v + kGroups) / limit);
  const float per_scale = inverse_of(c.d), per_minimum = inverse_of(c.dmin);
  for (size_t g = 0; g < kGroups; ++g) {
    c.groups.scale.v[g] = nearest(fit.scale.v[g] * per_scale, 0.0f, limit);
    c.groups.minimum.v[g] = nearest(fit.minimum.v[g] * per_minimum, 0.0f, limit);
  }
  c.improve(b, 0.0f, largest, 0.0f, limit);
  c.encode(b, 0.0f, largest);
  c.refit(b);
  c.encode(b, 0.0f, largest);
  return c;
}

// ---- blocks ----

// Codes plus `middle`, in the order of the columns.
template <size_t kGroups>
void put_in_order(const Coded<kGroups>& c, int middle, uint8_t* codes) {
  constexpr size_t kSize = kSuper / kGroups;
  for (size_t g = 0; g < kGroups; ++g)
    for (size_t i = 0; i < kSize; ++i)
      codes[g * kSize + i] = static_cast<uint8_t>(static_cast<int>(c.codes[i].v[g]) + middle);
}

void quantize_q2k(const float* x, const float* importance, uint8_t* to) {
  const auto c = search_affine<16>(x, importance, 3.0f, 15.0f, 10, 0.1f);
  uint8_t codes[kSuper];
  put_in_order(c, 0, codes);
  for (size_t g = 0; g < 16; ++g)
    to[g] = static_cast<uint8_t>(static_cast<int>(c.groups.scale.v[g]) |
                                 static_cast<int>(c.groups.minimum.v[g]) << 4);
  put_bits<2>(codes, kSuper, 0, 32, to + 16);
  put_half(to + 80, c.d);
  put_half(to + 82, c.dmin);
}

void quantize_q3k(const float* x, const float* importance, uint8_t* to) {
  const auto c = search_symmetric(x, importance, 4.0f, 32.0f, 4, 0.2f);
  uint8_t codes[kSuper], scales[16];
  put_in_order(c, 4, codes);
  for (size_t g = 0; g < 16; ++g) scales[g] = static_cast<uint8_t>(c.groups.scale.v[g] + 32.0f);
  put_bits<1>(codes, kSuper, 2, 32, to);
  put_bits<2>(codes, kSuper, 0, 32, to + 32);
  put_bits<4>(scales, 16, 0, 8, to + 96);
  put_bits<2>(scales, 16, 4, 4, to + 104);
  put_half(to + 108, c.d);
}

// d, dmin, and 12 bytes of six-bit scales and minimums
void put_scales(const Coded<8>& c, uint8_t* to) {
  put_half(to, c.d);
  put_half(to + 2, c.dmin);
  for (size_t i = 0; i < 4; ++i) {
    const auto at = [&](const Lanes<8>& lanes, size_t g) { return static_cast<int>(lanes.v[g]); };
    const int scale = at(c.groups.scale, i + 4), minimum = at(c.groups.minimum, i + 4);
    to[4 + i] = static_cast<uint8_t>(at(c.groups.scale, i) | scale >> 4 << 6);
    to[8 + i] = static_cast<uint8_t>(at(c.groups.minimum, i) | minimum >> 4 << 6);
    to[12 + i] = static_cast<uint8_t>((scale & 15) | (minimum & 15) << 4);
  }
}

void quantize_q4k(const float* x, const float* importance, uint8_t* to) {
  const auto c = search_affine<8>(x, importance, 15.0f, 63.0f, 10, 0.15f);
  uint8_t codes[kSuper];
  put_in_order(c, 0, codes);
  put_scales(c, to);
  put_bits<4>(codes, kSuper, 0, 32, to + 16);
}

void quantize_q5k(const float* x, const float* importance, uint8_t* to) {
  const auto c = search_affine<8>(x, importance, 31.0f, 63.0f, 10, 0.15f);
  uint8_t codes[kSuper];
  put_in_order(c, 0, codes);
  put_scales(c, to);
  put_bits<1>(codes, kSuper, 4, 32, to + 16);
  put_bits<4>(codes, kSuper, 0, 32, to + 48);
}

void quantize_q6k(const float* x, const float* importance, uint8_t* to) {
  const auto c = search_symmetric(x, importance, 32.0f, 128.0f, 7, 0.15f);
  uint8_t codes[kSuper];
  put_in_order(c, 32, codes);
  for (size_t half = 0; half < 2; ++half)
    put_bits<4>(codes + 128 * half, 128, 0, 64, to + 64 * half);
  put_bits<2>(codes, kSuper, 4, 32, to + 128);
  for (size_t g = 0; g < 16; ++g)
    to[192 + g] = static_cast<uint8_t>(static_cast<int>(c.groups.scale.v[g]));
  put_half(to + 208, c.d);
}

void quantize_q8k(const float* x, const float* /*importance*/, uint8_t* to) {
  const float scale = peak_of(x, kSuper) / 127.0f, inverse = inverse_of(scale);
  memcpy(to, &scale, 4);
  int16_t sums[16] = {};
  for (size_t i = 0; i < kSuper; ++i) {
    const int code = static_cast<int>(nearest(x[i] * inverse, -127.0f, 127.0f));
    to[4 + i] = static_cast<uint8_t>(code);
    sums[i / 16] = static_cast<int16_t>(sums[i / 16] + code);
  }
  memcpy(to + 260, sums, sizeof sums);
}

// Returns what the codes are to be multiplied with.
float quantize_f8(const float* x, size_t cols, uint8_t* to) {
  constexpr float kLargest = 448.0f;
  float peak = 0.0f;
  for (size_t i = 0; i < cols; ++i) peak = std::max(peak, std::abs(x[i]));
  const float scale = peak / kLargest, inverse = inverse_of(scale);
  for (size_t i = 0; i < cols; ++i) to[i] = float_to_f8(x[i] * inverse);
  return scale;
}

template <class T>
void put_all(const float* x, size_t cols, uint8_t* to, T (*convert)(float)) {
  for (size_t i = 0; i < cols; ++i) {
    const T value = convert(x[i]);
    memcpy(to + sizeof(T) * i, &value, sizeof(T));
  }
}

using QuantizeBlock = void (*)(const float* x, const float* importance, uint8_t* to);

template <void (*kQuantize)(const float* x, uint8_t* to)>
void plainly(const float* x, const float* /*importance*/, uint8_t* to) {
  kQuantize(x, to);
}

QuantizeBlock quantizer(Format format) {
  switch (format) {
    case Format::kQ4_0:
      return plainly<quantize_around<4>>;
    case Format::kQ4_1:
      return plainly<quantize_above<4>>;
    case Format::kQ5_0:
      return plainly<quantize_around<5>>;
    case Format::kQ5_1:
      return plainly<quantize_above<5>>;
    case Format::kQ8_0:
      return plainly<quantize_bytes<false>>;
    case Format::kQ8_1:
      return plainly<quantize_bytes<true>>;
    case Format::kQ2K:
      return quantize_q2k;
    case Format::kQ3K:
      return quantize_q3k;
    case Format::kQ4K:
      return quantize_q4k;
    case Format::kQ5K:
      return quantize_q5k;
    case Format::kQ6K:
      return quantize_q6k;
    case Format::kQ8K:
      return quantize_q8k;
    default:
      return nullptr;
  }
}

template <class T>
void get_all(const uint8_t* from, size_t n, float* out, float (*convert)(T)) {
  for (size_t i = 0; i < n; ++i) {
    T value;
    memcpy(&value, from + sizeof(T) * i, sizeof(T));
    out[i] = convert(value);
  }
}

}  // namespace

void read_floats(Format format, const uint8_t* from, size_t n, float* out) {
  if (format == Format::kF16)
    get_all(from, n, out, half_to_float);
  else if (format == Format::kBF16)
    get_all(from, n, out, bf16_to_float);
  else
    memcpy(out, from, n * sizeof(float));
}

Quantizer::Quantizer(Format format, const RowReader& from, const float* importance,
                     ThreadPool& pool)
    : format_(format), cols_(from.cols), importance_(importance) {
  if (has_zero_code(format))
    throw std::invalid_argument("nothing is quantized to " + std::string(info(format).name));
  if (is_hqq(format)) zeros_ = fit_hqq_zeros(info(format).bits, from, pool);
}

bool Quantizer::row(size_t row, const float* x, uint8_t* blocks, float* factor) const {
  switch (format_) {
    case Format::kF32:
      put_all<float>(x, cols_, blocks, [](float v) { return v; });
      return true;
    case Format::kF16:
      put_all(x, cols_, blocks, float_to_half);
      return true;
    case Format::kBF16:
      put_all(x, cols_, blocks, float_to_bf16);
      return true;
    default:
      break;
  }
  bool fits = true;
  for (size_t i = 0; i < cols_; ++i) fits &= std::abs(x[i]) <= kLargestWeight;
  if (!fits) return false;
  if (format_ == Format::kF8) {
    *factor = quantize_f8(x, cols_, blocks);
  } else if (is_hqq(format_)) {
    quantize_hqq(info(format_).bits, x, &zeros_[row * (cols_ / kHqqGroup)], cols_, blocks);
  } else {
    const FormatInfo& f = info(format_);
    const QuantizeBlock quantize = quantizer(format_);
    for (size_t c = 0; c < cols_; c += f.block, blocks += f.block_bytes)
      quantize(x + c, importance_ == nullptr ? nullptr : importance_ + c, blocks);
  }
  return true;
}

}  // namespace squall
