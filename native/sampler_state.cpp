#include <algorithm>
#include <cfloat>
#include <cmath>
#include <stdexcept>

#include "sampler.h"

namespace squall {
namespace {

constexpr size_t kMostExcess = 50;  // beyond it a repeat costs no more

void expect(bool right, const char* what) {
  if (!right) throw std::invalid_argument(what);
}

void check(const SamplingOptions& o) {  // no comparison holds for NaN
  const auto within = [](double x, double low, double high) { return x >= low && x <= high; };
  expect(within(o.temperature, 0, DBL_MAX), "temperature must be at least 0, and finite");
  expect(o.top_p > 0 && o.top_p <= 1, "top_p must be above 0 and at most 1");
  expect(within(o.min_p, 0, 1), "min_p must be between 0 and 1");
  expect(within(o.frequency, -FLT_MAX, FLT_MAX) && within(o.presence, -FLT_MAX, FLT_MAX),
         "frequency and presence penalties must be finite");
  expect(o.repetition > 0 && o.repetition <= DBL_MAX,
         "the repetition penalty must be above 0, and finite");
  expect(within(o.dry_multiplier, 0, DBL_MAX), "dry_multiplier must be at least 0, and finite");
  expect(within(o.dry_base, 1, DBL_MAX), "dry_base must be at least 1, and finite");
  expect(o.dry_allowed_length >= 1 && o.dry_range >= 1,
         "dry_allowed_length and dry_range must be at least 1");
  for (const auto& [token, bias] : o.bias)
    expect(bias < INFINITY, "a bias must be a number, or -inf to forbid its token");
}

bool possible(float x) { return x > -INFINITY; }  // not NaN either

float finite(double x) {
  return static_cast<float>(std::clamp(x, -double{FLT_MAX}, double{FLT_MAX}));
}

// Adds to a logit, if there is one and it is possible.
void shift(std::span<float> logits, int32_t token, double by) {
  const auto i = static_cast<size_t>(token);
  if (i < logits.size() && possible(logits[i])) logits[i] = finite(double{logits[i]} + by);
}

void ban(std::span<float> logits, int32_t token) {
  const auto i = static_cast<size_t>(token);
  if (i < logits.size()) logits[i] = -INFINITY;
}

// [j]: how many tokens up to the one j before the last equal as many up to the last. This is the
// Z-algorithm, backwards: linear, whatever repeats.
std::vector<size_t> repeat_lengths(std::span<const int32_t> tokens) {
  const size_t n = tokens.size();
  const auto back = [&](size_t i) { return tokens[n - 1 - i]; };
  std::vector<size_t> lengths(n);
  for (size_t j = 1, begin = 0, end = 0; j < n; ++j) {  // [begin, end) matched and ends last
    size_t length = j < end ? std::min(end - j, lengths[j - begin]) : 0;
    while (j + length < n && back(length) == back(j + length)) ++length;
    if (j + length > end) begin = j, end = j + length;
    lengths[j] = length;
  }
  return lengths;
}

}  // namespace

SamplerState::SamplerState(SamplingOptions options, size_t prompt)
    : options_(std::move(options)), prompt_(prompt) {
  check(options_);
}

void SamplerState::extend(std::span<const int32_t> tokens, std::span<const uint8_t> breaks) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (counts()) counts_[tokens[i]] += tokens_.size() >= prompt_;
    if (options_.dry_multiplier > 0) {
      const bool ended = !breaks.empty() && breaks[i] != 0;
      runs_.push_back(ended ? 0 : runs_.empty() ? 1 : runs_.back() + 1);
    }
    tokens_.push_back(tokens[i]);
  }
}

void SamplerState::adjust(std::span<float> logits, std::span<const int32_t> banned) const {
  for (const auto& [token, bias] : options_.bias) {
    if (bias == -INFINITY)
      ban(logits, token);
    else
      shift(logits, token, bias);
  }
  for (const int32_t token : banned) ban(logits, token);
  if (!runs_.empty()) penalize_repeats(logits);
  penalize_counted(logits);
}

void SamplerState::penalize_repeats(std::span<float> logits) const {
  const size_t n = std::min(options_.dry_range, tokens_.size()), last = n - 1;
  const size_t allowed = options_.dry_allowed_length;
  const auto runs = std::span(runs_).last(n);
  if (runs[last] < allowed) return;
  const auto tokens = std::span(tokens_).last(n);
  const std::vector<size_t> lengths = repeat_lengths(tokens);
  std::unordered_map<int32_t, size_t> longest;  // by the token that came next
  for (size_t j = 1; j < n; ++j) {
    const size_t length = std::min({lengths[j], runs[last - j], runs[last]});
    if (length < allowed || runs[last - j + 1] == 0) continue;
    size_t& most = longest[tokens[last - j + 1]];
    most = std::max(most, length);
  }
  for (const auto& [token, length] : longest) {
    double penalty = options_.dry_multiplier;
    for (size_t i = std::min(length - allowed, kMostExcess); i > 0; --i)
      penalty *= options_.dry_base;
    shift(logits, token, -penalty);
  }
}

void SamplerState::penalize_counted(std::span<float> logits) const {
  const double repetition = options_.repetition;
  for (const auto& [token, count] : counts_) {
    if (count > 0) shift(logits, token, -(count * options_.frequency + options_.presence));
    const auto i = static_cast<size_t>(token);
    if (repetition == 1 || i >= logits.size() || !possible(logits[i])) continue;
    const double x = logits[i];
    logits[i] = finite(x > 0 ? x / repetition : x * repetition);
  }
}

}  // namespace squall
