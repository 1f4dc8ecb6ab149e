// What adapters add to the product of a weight, row by row.
#pragma once
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kernels.h"
#include "tile.h"

namespace squall {

using TilePtr = std::shared_ptr<const Tile>;

// weight * scale * b(a(x)), and a bias. a: [rank, cols], of a table [cols, rank]. Without `a`, b is
// as wide as x; without b, `a` is a table as wide as the weight's.
struct LowRankTerm {
  TilePtr a, b;
  float scale;
  std::vector<float> bias;  // empty, or of whole tiles
};

// The terms of an adapter, by the number of the weight that they add to. layout: of the weights,
// which says for which executors it is.
class Adapter {
 public:
  explicit Adapter(int64_t layout = 0) : layout_(layout) {}
  // Throws std::invalid_argument for what is no float or does not fit together.
  void add(size_t site, LowRankTerm term);
  const LowRankTerm* at(size_t site) const {
    return site < terms_.size() && terms_[site] ? &*terms_[site] : nullptr;
  }
  size_t nbytes() const;
  int64_t layout() const { return layout_; }

 private:
  int64_t layout_;
  std::vector<std::optional<LowRankTerm>> terms_;
};

using Mixture = std::vector<std::pair<std::shared_ptr<const Adapter>, float>>;

constexpr size_t kNone = SIZE_MAX;

// As squall.program.Adapters; indices and values by number.
struct AdaptersOp {
  size_t x = kNone;               // a value, or for a table an index
  size_t mixture = kNone;         // an index; kNone: no adapters
  size_t scalings = kNone;        // a value, kNone: none
  std::vector<int> columns = {};  // of each weight of the op; negative: nothing is added
  size_t site = 0;                // the number of the first

  bool any() const { return mixture != kNone; }
};

struct Buffer;
struct Routing;
struct Step;

// The adapters of one weight, or of the same weight of all experts, whose rows are then pairs.
class LowRank {
 public:
  // first: of the op's weights. x: null for a table.
  LowRank(const Kernels& kernels, const AdaptersOp& op, size_t first, size_t experts,
          const Buffer& rows, const Buffer* x, const Buffer* scalings, const Routing* routing)
      : k_(kernels),
        op_(op),
        first_(first),
        experts_(experts),
        rows_(rows),
        x_(x),
        scalings_(scalings),
        routing_(routing) {}

  // Before a run.
  void prepare(const Step& step);
  bool active() const { return active_; }
  const Buffer& rows() const { return rows_; }
  // a(x) of rows `begin` to `end` - 1
  void down(const Step& step, size_t begin, size_t end);
  // acc[tiles][rows][16] += ..., tiles of the weight from `tile` on
  void add(const Step& step, size_t tile, size_t tiles, size_t row, size_t rows, float* acc) const;

 private:
  static constexpr size_t kRows = 64;  // at once

  void add_rows(const Step& step, size_t tile, size_t tiles, size_t row, size_t rows,
                std::pair<size_t, size_t> of_them, float* acc) const;
  template <class Fn>
  void each_run(const Step& step, size_t begin, size_t end, Fn fn) const;
  template <class Fn>
  void each_term(const Mixture& mixture, size_t expert, Fn fn) const;
  size_t width(const LowRankTerm& term) const;
  void project(const Tile& a, size_t row, size_t end, size_t column);
  void up(const LowRankTerm& term, size_t tile, size_t tiles, size_t row, size_t rows,
          size_t column, float* part) const;
  size_t token(size_t row) const;
  size_t expert(size_t row) const;
  float* sums(size_t row) const { return reinterpret_cast<float*>(sums_->data()) + row * stride_; }

  const Kernels& k_;
  AdaptersOp op_;
  size_t first_, experts_;
  const Buffer& rows_;
  const Buffer *x_, *scalings_;
  const Routing* routing_;
  bool active_ = false;
  size_t stride_ = 0;             // floats of a row's a(x), of all its adapters
  std::unique_ptr<Memory> sums_;  // [rows][stride], floats
};

}  // namespace squall
