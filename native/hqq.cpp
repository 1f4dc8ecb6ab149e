#include "hqq.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bits.h"
#include "half.h"

namespace squall {
namespace {

constexpr float kPower = 0.7f, kBeta = 10.0f, kKappa = 1.01f, kLargestScale = 2e4f;

struct Group {
  float scale, zero;  // code = round(x * scale + zero)
};

Group first_guess(const float* x, float largest) {
  const auto [low, high] = extremes(x, kHqqGroup);
  const float range = high - low;
  const float scale = range > 0.0f ? std::min(largest / range, kLargestScale) : kLargestScale;
  return {scale, -low * scale};
}

// sign(x) * max(|x| - |x|^(p - 1) / beta, 0): nothing is left below the root of |x|^(2 - p) = 1 /
// beta, and that is nearly always so.
float shrink(float x, float beta, float root) {
  const float size = std::abs(x);
  if (size <= root) return 0.0f;
  return std::copysign(std::max(size - std::pow(size, kPower - 1.0f) / beta, 0.0f), x);
}

// A step of the zero point, and the sum of |x - what its code stands for|.
float improve(const float* x, const Group& g, float largest, float beta, float root, float* zero) {
  constexpr size_t kWide = 8;
  float error[kWide] = {}, sum[kWide] = {}, peak[kWide] = {}, rest[kHqqGroup];
  for (size_t i = 0; i < kHqqGroup; i += kWide)
    for (size_t l = 0; l < kWide; ++l) {
      const float code = nearest(x[i + l] * g.scale + g.zero, 0.0f, largest);
      const float off = x[i + l] - (code - g.zero) / g.scale, size = std::abs(off);
      rest[i + l] = off;
      error[l] += size;
      peak[l] = size > peak[l] ? size : peak[l];
      sum[l] += code - x[i + l] * g.scale;
    }
  float all = 0.0f, total = 0.0f, most = 0.0f;
  for (size_t l = 0; l < kWide; ++l) {
    all += error[l];
    total += sum[l];
    most = std::max(most, peak[l]);
  }
  if (most > root)
    for (const float off : rest) total += shrink(off, beta, root) * g.scale;
  *zero = total / kHqqGroup;
  return all;
}

}  // namespace

std::vector<float> fit_hqq_zeros(size_t bits, const RowReader& from, ThreadPool& pool) {
  const DefaultFloats floats;
  const float largest = static_cast<float>((1 << bits) - 1);
  const size_t groups = from.cols / kHqqGroup;
  std::vector<float> zeros(from.rows * groups);
  std::vector<double> errors(from.rows);
  double best = 1e4 * static_cast<double>(from.rows * from.cols);
  float beta = kBeta;
  for (int step = 0; step < kHqqSteps; ++step, beta *= kKappa) {
    const float root = std::pow(1.0f / beta, 1.0f / (2.0f - kPower));
    pool.run({&from.rows, 1}, [&](size_t, size_t row) {
      std::vector<float> x(from.cols);
      from.read(row, x.data());
      errors[row] = 0.0;
      for (size_t i = 0; i < groups; ++i) {
        float* const zero = &zeros[row * groups + i];
        Group g = first_guess(&x[i * kHqqGroup], largest);
        if (step > 0) g.zero = *zero;
        errors[row] += improve(&x[i * kHqqGroup], g, largest, beta, root, zero);
      }
    });
    double error = 0.0;
    for (const double part : errors) error += part;
    if (!(error < best)) break;
    best = error;
  }
  return zeros;
}

void quantize_hqq(size_t bits, const float* x, const float* zeros, size_t cols, uint8_t* blocks) {
  const float largest = static_cast<float>((1 << bits) - 1);
  const int middle = bits == 8 ? 128 : 0;  // whole bytes are signed
  for (size_t c = 0; c < cols; c += kHqqGroup) {
    const Group g = {first_guess(x + c, largest).scale, zeros[c / kHqqGroup]};
    uint8_t codes[kHqqGroup];
    for (size_t i = 0; i < kHqqGroup; ++i)
      codes[i] = static_cast<uint8_t>(
          static_cast<int>(nearest(x[c + i] * g.scale + g.zero, 0.0f, largest)) - middle);
    put_half(blocks, 1.0f / g.scale);
    put_half(blocks + 2, (static_cast<float>(middle) - g.zero) / g.scale);
    blocks += 4;
    const size_t low = bits == 3 ? 2 : bits;
    if (low == 8) memcpy(blocks, codes, sizeof codes);
    if (low == 4) put_bits<4>(codes, kHqqGroup, 0, 32, blocks);
    if (low == 2) put_bits<2>(codes, kHqqGroup, 0, 16, blocks);
    if (bits == 3) put_bits<1>(codes, kHqqGroup, 2, 8, blocks + 16);
    if (low == 1) put_bits<1>(codes, kHqqGroup, 0, 8, blocks);
    blocks += kHqqGroup * bits / 8;
  }
}

}  // namespace squall
