#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace squall {
namespace {

struct Candidate {
  double p;
  int32_t id;
};

bool less_likely(const Candidate& a, const Candidate& b) {
  return a.p < b.p || (a.p == b.p && a.id > b.id);
}

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

double total(const std::vector<Candidate>& all) {
  double sum = 0;
  for (const Candidate& c : all) sum += c.p;
  return sum;
}

// Keeps the likeliest, in descending order, until `enough` says so; `all` is used up.
template <class Enough>
std::vector<Candidate> likeliest(std::vector<Candidate>& all, Enough enough) {
  std::vector<Candidate> kept;
  std::make_heap(all.begin(), all.end(), less_likely);
  for (auto end = all.end(); end != all.begin() && !enough(kept); --end) {
    std::pop_heap(all.begin(), end, less_likely);
    kept.push_back(*(end - 1));
  }
  return kept;
}

}  // namespace

int32_t sample(std::span<const float> logits, const Sampling& o, uint64_t position) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (o.temperature <= 0) return static_cast<int32_t>(best - logits.begin());
  const double floor = std::max(o.min_p, 1e-30);
  std::vector<Candidate> all;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double p =
        std::exp((static_cast<double>(logits[i]) - static_cast<double>(*best)) / o.temperature);
    if (p >= floor || o.top_k > 0 || o.top_p < 1) all.push_back({p, static_cast<int32_t>(i)});
  }
  if (o.top_k > 0 && o.top_k < all.size())
    all = likeliest(all, [&](const auto& kept) { return kept.size() == o.top_k; });
  if (o.top_p < 1) {
    const double goal = o.top_p * total(all);
    double sum = 0;
    all = likeliest(all, [&](const auto& kept) {
      if (!kept.empty()) sum += kept.back().p;
      return !kept.empty() && sum >= goal;
    });
  }
  std::erase_if(all, [&](const Candidate& c) { return c.p < floor; });
  double left = uniform(o.seed, position) * total(all);
  for (const Candidate& c : all)
    if ((left -= c.p) < 0) return c.id;
  return all.empty() ? static_cast<int32_t>(best - logits.begin()) : all.back().id;
}

}  // namespace squall
