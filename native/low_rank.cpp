#include "low_rank.h"

#include <algorithm>
#include <stdexcept>

#include "phases.h"

namespace squall {
namespace {

constexpr size_t kKept = size_t{1} << 18;  // bytes of a(x), from step to step

size_t whole_tiles(size_t n) { return ceil_div(n, kLanes) * kLanes; }

void multiply(const Kernels& k, const Tile& w, size_t tile, size_t tiles, const float* x,
              size_t stride, size_t rows, float* out) {
  k.matmul_float[static_cast<size_t>(w.format())](w.tile(tile), tiles, w.tile_bytes(), w.cols(),
                                                  {x, stride}, rows, out);
}

}  // namespace

void Adapter::add(size_t site, LowRankTerm term) {
  constexpr size_t kMostSites = size_t{1} << 24;
  const bool fits = (term.a || term.b) && site < kMostSites && (!term.a || !term.a->is_integer()) &&
                    (!term.b || !term.b->is_integer());
  if (!fits) throw std::invalid_argument("an adapter's weights must be floats");
  term.bias.resize(whole_tiles(term.bias.size()));
  if (terms_.size() <= site) terms_.resize(site + 1);
  terms_[site] = std::move(term);
}

size_t Adapter::nbytes() const {
  size_t bytes = 0;
  for (const auto& term : terms_)
    if (term)
      bytes += (term->a ? term->a->nbytes() : 0) + (term->b ? term->b->nbytes() : 0) +
               term->bias.size() * sizeof(float);
  return bytes;
}

size_t LowRank::token(size_t row) const {
  return routing_ == nullptr ? row : routing_->row_of[row];
}

size_t LowRank::expert(size_t row) const {
  if (routing_ == nullptr) return 0;
  const auto& begin = routing_->begin;
  return static_cast<size_t>(std::upper_bound(begin.begin(), begin.end(), row) - begin.begin()) - 1;
}

// fn(mixture, expert, row, end) for runs of rows that have the same
template <class Fn>
void LowRank::each_run(const Step& step, size_t begin, size_t end, Fn fn) const {
  const auto mixtures = step.inputs.indices[op_.mixture];
  for (size_t row = begin, stop; row < end; row = stop) {
    const int32_t mixture = mixtures[token(row)];
    const size_t of = expert(row);
    for (stop = row + 1; stop < end && mixtures[token(stop)] == mixture && expert(stop) == of;)
      ++stop;
    if (mixture >= 0) fn(step.inputs.mixtures[static_cast<size_t>(mixture)], of, row, stop);
  }
}

// fn(term, place in the mixture, place of its a(x) in a row's)
template <class Fn>
void LowRank::each_term(const Mixture& mixture, size_t expert, Fn fn) const {
  if (!op_.columns.empty() && op_.columns[first_ + expert] < 0) return;
  size_t column = 0;
  for (size_t i = 0; i < mixture.size(); ++i) {
    const LowRankTerm* term = mixture[i].first->at(op_.site + first_ + expert);
    if (term == nullptr) continue;
    fn(*term, i, column);
    column += width(*term);
  }
}

size_t LowRank::width(const LowRankTerm& term) const {
  if (!term.a) return 0;
  return whole_tiles(x_ == nullptr ? term.a->cols() : term.a->rows());
}

void LowRank::prepare(const Step& step) {
  active_ = false;
  stride_ = 0;
  for (const Mixture& mixture : step.inputs.mixtures)
    for (size_t e = 0; e < experts_; ++e)
      each_term(mixture, e, [&](const LowRankTerm& term, size_t, size_t column) {
        active_ = true;
        stride_ = std::max(stride_, column + width(term));
      });
  const size_t bytes = active_ ? step.rows_of(rows_) * stride_ * sizeof(float) : 0;
  const size_t held = sums_ ? sums_->bytes() : 0;
  // What a long prompt with large ranks took does not stay.
  if (held >= bytes && held <= std::max(bytes, kKept)) return;
  sums_.reset();
  if (bytes != 0) sums_ = std::make_unique<Memory>(bytes);
}

void LowRank::down(const Step& step, size_t begin, size_t end) {
  each_run(step, begin, end, [&](const Mixture& mixture, size_t of, size_t row, size_t stop) {
    each_term(mixture, of, [&](const LowRankTerm& term, size_t, size_t column) {
      if (!term.a) return;
      if (x_ != nullptr) return project(*term.a, row, stop, column);
      const auto ids = step.inputs.indices[op_.x];
      for (size_t r = row; r < stop; ++r)
        term.a->dequantize_row(static_cast<size_t>(ids[r]), sums(r) + column);
    });
  });
}

void LowRank::project(const Tile& a, size_t row, size_t end, size_t column) {
  alignas(64) float acc[kTilesAtOnce * kRows * kLanes];
  for (; row < end; row += kRows)
    for (size_t tile = 0; tile < a.tiles(); tile += kTilesAtOnce) {
      const size_t rows = std::min(kRows, end - row);
      const size_t tiles = std::min(kTilesAtOnce, a.tiles() - tile);
      multiply(k_, a, tile, tiles, x_->row(row), x_->width, rows, acc);
      for (size_t t = 0; t < tiles; ++t)
        for (size_t r = 0; r < rows; ++r)
          std::copy_n(acc + (t * rows + r) * kLanes, kLanes,
                      sums(row + r) + column + (tile + t) * kLanes);
    }
}

void LowRank::add(const Step& step, size_t tile, size_t tiles, size_t row, size_t rows,
                  float* acc) const {
  if (!active_) return;
  for (size_t done = 0; done < rows; done += kRows)
    add_rows(step, tile, tiles, row, rows, {row + done, row + std::min(rows, done + kRows)}, acc);
}

void LowRank::add_rows(const Step& step, size_t tile, size_t tiles, size_t row, size_t rows,
                       std::pair<size_t, size_t> of_them, float* acc) const {
  alignas(64) float part[kTilesAtOnce * kRows * kLanes];
  each_run(step, of_them.first, of_them.second,
           [&](const Mixture& mixture, size_t of, size_t first, size_t end) {
             const size_t n = end - first;
             each_term(mixture, of, [&](const LowRankTerm& term, size_t i, size_t column) {
               up(term, tile, tiles, first, n, column, part);
               const float weight = mixture[i].second;
               for (size_t t = 0; t < tiles; ++t) {
                 float* const to = acc + (t * rows + first - row) * kLanes;
                 const float* const from = part + t * n * kLanes;
                 if (scalings_ == nullptr)
                   k_.add_scaled(to, from, weight * term.scale, n * kLanes, to);
                 for (size_t r = 0; r < n; ++r) {
                   float* const out = to + r * kLanes;
                   if (scalings_ != nullptr) {
                     const size_t at = static_cast<size_t>(op_.columns[first_ + of]) + i;
                     const float own = scalings_->row(token(first + r))[at];
                     k_.add_scaled(out, from + r * kLanes, own * weight * term.scale, kLanes, out);
                   }
                   if (!term.bias.empty())
                     k_.add_scaled(out, term.bias.data() + (tile + t) * kLanes, weight, kLanes,
                                   out);
                 }
               }
             });
           });
}

// part[tiles][rows][16] = b(a(x))
void LowRank::up(const LowRankTerm& term, size_t tile, size_t tiles, size_t row, size_t rows,
                 size_t column, float* part) const {
  const float* const from = term.a ? sums(row) + column : x_->row(row);
  const size_t stride = term.a ? stride_ : x_->width;
  if (term.b) return multiply(k_, *term.b, tile, tiles, from, stride, rows, part);
  for (size_t t = 0; t < tiles; ++t)
    for (size_t r = 0; r < rows; ++r)
      std::copy_n(from + r * stride + (tile + t) * kLanes, kLanes, part + (t * rows + r) * kLanes);
}

}  // namespace squall
