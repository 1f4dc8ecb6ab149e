// Choosing a token from logits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

namespace squall {

struct Sampling {
  double temperature;  // 0: the largest logit, lowest id on a tie
  size_t top_k;        // 0: off
  double top_p;        // 1: off
  double min_p;        // 0: off
  uint64_t seed;
};

// Order: temperature, softmax, top-k, top-p (of what top-k left), min-p (of the likeliest), draw.
// The draw is a pure function of (seed, position), so it does not depend on what else is computed.
int32_t sample(std::span<const float> logits, const Sampling& options, uint64_t position);

}  // namespace squall
