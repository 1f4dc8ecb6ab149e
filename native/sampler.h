// Choosing tokens from logits. docs/sampling.md has the order and the formulas.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "thread_pool.h"

namespace squall {

// What each may be is checked where a SamplerState is made of them.
struct SamplingOptions {
  double temperature = 0;  // 0: the largest logit, lowest id on a tie
  size_t top_k = 0;        // 0: off
  double top_p = 1;        // 1: off
  double min_p = 0;        // 0: off
  uint64_t seed = 0;
  double frequency = 0, presence = 0, repetition = 1;
  double dry_multiplier = 0, dry_base = 1;              // multiplier 0: off
  size_t dry_allowed_length = 1, dry_range = SIZE_MAX;  // at least 1
  std::vector<std::pair<int32_t, double>> bias = {};
};

// What sampling remembers of one sequence. Ids outside the vocabulary are allowed and change
// nothing.
class SamplerState {
 public:
  // The first `prompt` tokens to come are not generated ones. Throws std::invalid_argument on
  // options outside of their range.
  SamplerState(SamplingOptions options, size_t prompt);

  // `breaks` is empty or tells of each token whether a DRY breaker ends in it.
  void extend(std::span<const int32_t> tokens, std::span<const uint8_t> breaks);
  std::span<const int32_t> tokens() const { return tokens_; }
  const SamplingOptions& options() const { return options_; }

  bool adjusts() const { return !options_.bias.empty() || counts() || options_.dry_multiplier > 0; }
  // Bias, bans, DRY, penalties. What is possible stays possible, unless it is banned.
  void adjust(std::span<float> logits, std::span<const int32_t> banned) const;

 private:
  bool counts() const {
    return options_.frequency != 0 || options_.presence != 0 || options_.repetition != 1;
  }
  void penalize_repeats(std::span<float> logits) const;
  void penalize_counted(std::span<float> logits) const;

  const SamplingOptions options_;
  const size_t prompt_;
  std::vector<int32_t> tokens_;
  std::vector<size_t> runs_;  // for DRY: tokens since the last breaker, with this one
  std::unordered_map<int32_t, uint32_t> counts_;  // tokens seen, and how often generated
};

struct SamplerRow {
  const SamplerState& state;
  std::span<const float> logits;     // as the model gave them
  std::span<const float> processed;  // adjusted already; or empty
  std::span<const int32_t> banned;
  std::span<const uint32_t> allowed;  // a bit an id, lowest first; or empty: every id is
  int top;  // how many of the likeliest to report; below 0: no log-probabilities at all
};

struct Choice {
  static constexpr int32_t kNothing = -1;  // every token is forbidden or has a logit of -infinity
  static constexpr int32_t kNan = -2;      // the model's logits are no numbers
  int32_t token = kNothing;
  double logprob = 0;
  std::vector<std::pair<int32_t, double>> top;  // likeliest first
};

// A row's choice is a pure function of the row; the draw of (seed, number of tokens so far).
Choice choose(const SamplerRow& row);
std::vector<Choice> choose(std::span<const SamplerRow> rows, ThreadPool* pool);

}  // namespace squall
