#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>

#include "weigh.h"

namespace squall {
namespace {

constexpr size_t kBlock = 64, kLane = 16;

// SplitMix64's finalizer.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

double uniform(uint64_t seed, uint64_t position) {  // [0, 1)
  return static_cast<double>(mix(mix(seed) ^ position) >> 11) * 0x1p-53;
}

double logarithm(double x) {  // of a positive, finite number
  int exponent = 0;
  double m = std::frexp(x, &exponent);  // [0.5, 1)
  if (m < 0.70710678118654752) m *= 2, --exponent;
  const double s = (m - 1) / (m + 1), square = s * s;
  double series = 0;
  for (int k = 21; k >= 1; k -= 2) series = series * square + 1.0 / k;
  return exponent * 0.69314718055994531 + 2 * s * series;
}

// exp((x - top) / temperature)
class Weight {
 public:
  Weight(float top, double temperature)
      : scale(static_cast<float>(std::clamp(1 / temperature, double{FLT_MIN}, double{FLT_MAX}))),
        top_(top) {}
  void operator()(std::span<const float> x, float* out) const {
    weigh(x.data(), x.size(), top_, scale, out);
  }
  const float scale;

 private:
  const float top_;
};

// Its value as it is.
void plain(std::span<const float> x, float* out) {
  std::transform(x.begin(), x.end(), out, capped);
}

struct Candidate {
  float value;  // a logit or a weight
  int32_t id;
};
using Candidates = std::vector<Candidate>;

// Memory of one thread that lasts: fresh pages would cost more than what is done on them.
struct Scratch {
  std::vector<float> adjusted;
  Candidates kept, near;
};

// Which ids may be chosen, a block at a time.
class Allowed {
 public:
  explicit Allowed(std::span<const uint32_t> words) : words_(words) {}

  uint64_t block(size_t b) const {
    if (words_.empty()) return ~uint64_t{0};
    const uint64_t high = 2 * b + 1 < words_.size() ? words_[2 * b + 1] : 0;
    return high << 32 | words_[2 * b];
  }

  // The logits of those; -infinity for the others.
  void copy(std::span<const float> x, std::vector<float>& out) const {
    out.resize(x.size());
    for (size_t i = 0; i < x.size(); i += kBlock) {
      const uint64_t bits = block(i / kBlock);
      const size_t n = std::min(kBlock, x.size() - i);
      if (bits == 0)
        std::fill_n(&out[i], n, -INFINITY);
      else if (bits == ~uint64_t{0})
        std::copy_n(&x[i], n, &out[i]);
      else
        for (size_t j = 0; j < n; ++j) out[i + j] = bits >> j & 1 ? x[i + j] : -INFINITY;
    }
  }

 private:
  const std::span<const uint32_t> words_;
};

// A row and the largest logit of each of its blocks, by which most blocks are passed over.
class Row {
 public:
  explicit Row(std::span<const float> x, const Allowed& allowed = Allowed({}))
      : x_(x), peaks_((x.size() + kBlock - 1) / kBlock, -INFINITY) {
    for (size_t b = 0; b < peaks_.size(); ++b)
      if (allowed.block(b) != 0) peaks_[b] = peak(block(b));
    for (const float p : peaks_) top_ = std::max(top_, capped(p));
  }

  float top() const { return top_; }  // -infinity: nothing is possible
  float at(int32_t id) const { return capped(x_[static_cast<size_t>(id)]); }
  size_t size() const { return x_.size(); }
  std::span<const float> block(size_t b) const {
    return x_.subspan(b * kBlock, std::min(kBlock, x_.size() - b * kBlock));
  }

  int32_t first_of_top() const {
    size_t i = 0;
    while (peaks_[i / kBlock] < top_) i += kBlock;
    while (!(x_[i] >= top_)) ++i;
    return static_cast<int32_t>(i);
  }

  // What is at least `cut`, by id, with the value that `of` gives it.
  template <class Of>
  void at_least(float cut, Of of, Candidates& found) const {
    size_t count = 0;
    for (size_t b = 0; b < peaks_.size(); ++b) {
      if (peaks_[b] < cut) continue;
      const auto x = block(b);
      float value[kBlock];
      of(x, value);
      found.resize(count + x.size());
      for (size_t i = 0; i < x.size(); ++i) {  // without branches that nobody could predict
        found[count] = {value[i], static_cast<int32_t>(b * kBlock + i)};
        count += x[i] >= cut;
      }
    }
    found.resize(count);
  }

  // At or below the k-th largest logit: there are k blocks with one as large.
  float floor_of_largest(size_t k) const {
    if (k > peaks_.size()) return -FLT_MAX;
    std::vector<float> peaks = peaks_;
    const auto kth = peaks.begin() + static_cast<ptrdiff_t>(k) - 1;
    std::nth_element(peaks.begin(), kth, peaks.end(), std::greater<>());
    return std::max(capped(*kth), -FLT_MAX);
  }

  // The sum of each block's weights, in an order that is the same for all.
  std::vector<double> block_sums(const Weight& weight) const {
    std::vector<double> sums(peaks_.size());
    for (size_t b = 0; b < sums.size(); ++b) {
      if (peaks_[b] == -INFINITY) continue;
      float w[kBlock] = {};
      weight(block(b), w);
      for (size_t half = kBlock / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; ++i) w[i] += w[i + half];
      sums[b] = w[0];
    }
    return sums;
  }

 private:
  static float peak(std::span<const float> x) {
    float lane[kLane];
    std::fill_n(lane, kLane, -INFINITY);
    size_t i = 0;
    for (; i + kLane <= x.size(); i += kLane)
      for (size_t j = 0; j < kLane; ++j) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (; i < x.size(); ++i) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
    return *std::max_element(lane, lane + kLane);
  }

  std::span<const float> x_;
  std::vector<float> peaks_;
  float top_ = -INFINITY;
};

bool has_nan(std::span<const float> x) {
  uint32_t found = 0;  // counts, so that the compiler makes vectors of it
  for (const float v : x) found |= v != v ? 1 : 0;
  return found != 0;
}

double total(std::span<const double> sums) {
  double all = 0;
  for (const double s : sums) all += s;
  return all;
}

double total(const Candidates& all) {
  double sum = 0;
  for (const Candidate& c : all) sum += c.value;
  return sum;
}

// In the order of the numbers.
uint32_t key(float x) {
  const auto bits = std::bit_cast<uint32_t>(x + 0.0f);  // -0 becomes 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Keeps the largest, of equals the lowest ids, until their measures reach the goal. A radix
// selection: linear, and its sums run by id, so that nothing depends on how something was sorted.
template <class Measure>
void keep_largest(Scratch& scratch, double goal, Measure measure) {
  auto& [adjusted, all, near] = scratch;
  uint32_t cut = 0;  // the key at which the goal is crossed, from its highest bits on
  double above = 0;  // the measures of larger keys
  near = all;
  for (const int shift : {21, 10, 0}) {
    const uint32_t buckets = shift == 0 ? 1024 : 2048;
    const auto bucket_of = [&](const Candidate& c) {
      return key(c.value) >> shift & (buckets - 1);
    };
    double sums[2048] = {};
    for (const Candidate& c : near) sums[bucket_of(c)] += measure(c);
    uint32_t bucket = buckets - 1;
    for (; bucket > 0 && above + sums[bucket] < goal; --bucket) above += sums[bucket];
    std::erase_if(near, [&](const Candidate& c) { return bucket_of(c) != bucket; });
    cut |= bucket << shift;
  }
  std::erase_if(all, [&](const Candidate& c) {
    if (key(c.value) != cut) return key(c.value) < cut;
    const bool over = above >= goal;
    above += measure(c);
    return over;
  });
}

void keep_largest(Scratch& scratch, const Row& row, size_t k) {
  row.at_least(row.floor_of_largest(k), plain, scratch.kept);
  if (k < scratch.kept.size())
    keep_largest(scratch, static_cast<double>(k), [](const Candidate&) { return 1; });
}

// The index at which `left` is used up; what is left there stays in `left`.
template <class WeightAt>
size_t walk(size_t n, double& left, WeightAt weight_at) {
  size_t last = 0;
  for (size_t i = 0; i < n; ++i) {
    const double w = weight_at(i);
    if (left < w) return i;
    if (w > 0) last = i;
    left -= w;
  }
  return last;  // rounding
}

int32_t draw_any(const Row& row, const Weight& weight, double u) {
  const std::vector<double> sums = row.block_sums(weight);
  double left = u * total(sums);
  const size_t b = walk(sums.size(), left, [&](size_t i) { return sums[i]; });
  const auto x = row.block(b);
  float w[kBlock];
  weight(x, w);
  const size_t i = walk(x.size(), left, [&](size_t j) { return w[j]; });
  return static_cast<int32_t>(b * kBlock + i);
}

// The tokens whose weight is at least min_p, those that top_p may need (what lies below the floor
// sums to less than 1 - top_p of all), and a few more, for rounding.
void keep_likely(Scratch& scratch, const Row& row, const Weight& weight, const SamplingOptions& o,
                 double all) {
  const double tail = o.top_p < 1 ? all * (1 - o.top_p) / static_cast<double>(row.size()) : 0;
  const double floor = std::max({o.min_p, tail, 1e-36}) / 2;
  const double cut = row.top() + logarithm(floor) / weight.scale;
  row.at_least(static_cast<float>(std::max(cut, -double{FLT_MAX})), weight, scratch.kept);
}

int32_t draw(Scratch& scratch, const Row& row, const SamplingOptions& o, double u) {
  const Weight weight(row.top(), o.temperature);
  const bool some = o.top_k > 0 && o.top_k < row.size();
  if (!some && o.top_p >= 1 && o.min_p <= 0) return draw_any(row, weight, u);
  Candidates& kept = scratch.kept;
  double all = 0;
  if (some) {
    keep_largest(scratch, row, o.top_k);
    for (Candidate& c : kept) weight({&c.value, 1}, &c.value);
    all = total(kept);
  } else {
    if (o.top_p < 1) all = total(row.block_sums(weight));
    keep_likely(scratch, row, weight, o, all);
  }
  if (o.top_p < 1) keep_largest(scratch, o.top_p * all, [](const Candidate& c) { return c.value; });
  std::erase_if(kept, [&](const Candidate& c) { return c.value < o.min_p; });
  double left = u * total(kept);
  return kept[walk(kept.size(), left, [&](size_t i) { return kept[i].value; })].id;
}

void add_logprobs(Scratch& scratch, const Row& row, int top, Choice& choice) {
  choice.logprob = -INFINITY;
  if (row.top() == -INFINITY) return;
  const double log_sum = logarithm(total(row.block_sums(Weight(row.top(), 1))));
  const auto logprob = [&](float x) {
    return x >= -FLT_MAX ? (double{x} - row.top()) - log_sum : -INFINITY;
  };
  choice.logprob = logprob(row.at(choice.token));
  if (top == 0) return;
  keep_largest(scratch, row, static_cast<size_t>(top));
  Candidates& best = scratch.kept;
  std::stable_sort(best.begin(), best.end(),
                   [](const Candidate& a, const Candidate& b) { return a.value > b.value; });
  for (const Candidate& c : best) choice.top.emplace_back(c.id, logprob(c.value));
}

}  // namespace

Choice choose(const SamplerRow& row) {
  const DefaultFloats floats;
  thread_local Scratch scratch;
  Choice choice;
  if (has_nan(row.logits)) {
    choice.token = Choice::kNan;
    return choice;
  }
  std::span<const float> logits = row.processed.empty() ? row.logits : row.processed;
  const Allowed allowed(row.allowed);
  const bool adjusts = row.processed.empty() && (row.state.adjusts() || !row.banned.empty());
  if (adjusts || !row.allowed.empty()) {
    allowed.copy(logits, scratch.adjusted);
    if (adjusts) row.state.adjust(scratch.adjusted, row.banned);
    logits = scratch.adjusted;
  }
  const Row final(logits, allowed);
  if (final.top() == -INFINITY) return choice;
  const SamplingOptions& o = row.state.options();
  const uint64_t position = row.state.tokens().size();
  choice.token = o.temperature <= 0 ? final.first_of_top()
                                    : draw(scratch, final, o, uniform(o.seed, position));
  if (row.top >= 0) add_logprobs(scratch, Row(row.logits), row.top, choice);
  return choice;
}

std::vector<Choice> choose(std::span<const SamplerRow> rows, ThreadPool* pool) {
  std::vector<Choice> choices(rows.size());
  const auto one = [&](size_t, size_t i) { choices[i] = choose(rows[i]); };
  const size_t count = rows.size();
  if (pool == nullptr || count < 2)
    for (size_t i = 0; i < count; ++i) one(0, i);
  else
    pool->run({&count, 1}, one);
  return choices;
}

}  // namespace squall
