// What the ops do, as phases. Rows and tiles are dealt out as tasks.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "executor.h"

namespace squall {

constexpr size_t kRowsAtOnce = 64;  // rows that one tile is multiplied with before the next tile

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
inline const float* or_null(const Vector& v) { return v.empty() ? nullptr : v.data(); }
inline const float* at(const Vector& v, size_t i) { return v.empty() ? nullptr : v.data() + i; }

// Work that is done row by row.
class RowPhase : public Phase {
 public:
  RowPhase(const Buffer& rows, size_t threads) : rows_(rows), threads_(threads) {}
  size_t tasks(const Step& step) const override {
    const size_t rows = step.rows_of(rows_);
    return ceil_div(rows, rows_a_task(rows));
  }
  void run(const Step& step, size_t task) override {
    const size_t rows = step.rows_of(rows_), many = rows_a_task(rows);
    for (size_t r = task * many; r < std::min(rows, (task + 1) * many); ++r) row(step, r);
  }
  Work work(const Step& step) const override { return row_work.times(step.rows_of(rows_)); }
  Work row_work;

 protected:
  virtual void row(const Step& step, size_t r) = 0;

 private:
  size_t rows_a_task(size_t rows) const { return std::max(size_t{1}, rows / (threads_ * 8)); }
  const Buffer& rows_;
  size_t threads_;
};

template <class Fn>
class RowsOf final : public RowPhase {
 public:
  RowsOf(const Buffer& rows, size_t threads, Fn fn) : RowPhase(rows, threads), fn_(std::move(fn)) {}

 private:
  void row(const Step& step, size_t r) override { fn_(step, r); }
  Fn fn_;
};

template <class Fn>
std::unique_ptr<RowPhase> row_phase(const Buffer& rows, size_t threads, Fn fn) {
  return std::make_unique<RowsOf<Fn>>(rows, threads, std::move(fn));
}

struct TileRange {
  size_t begin, end;
  size_t count() const { return end - begin; }
};
constexpr size_t kTilesAtOnce = 8;

// acc[tiles][rows][16] = x . tiles, x read as their format wants it
inline void matmul(const Kernels& k, const Tile& w, const TileRange& tiles, const Buffer& x,
                   size_t row, size_t rows, float* acc) {
  const size_t format = static_cast<size_t>(w.format());
  const uint8_t* first = w.tile(tiles.begin);
  if (w.is_integer())
    k.matmul_quantized[format](first, tiles.count(), w.tile_bytes(), w.cols(), x.quant_row(row),
                               x.quant_stride(), rows, acc);
  else
    k.matmul_float[format](first, tiles.count(), w.tile_bytes(), w.cols(), x.row(row), x.width,
                           rows, acc);
}

// Of `rows` rows times a weight that is read once.
inline Work linear_work(const Tile& w, size_t rows) {
  if (rows == 0) return {};
  const uint64_t products = uint64_t{rows} * w.rows() * w.cols();
  return {w.nbytes(), w.is_integer() ? products : 0, w.is_integer() ? 0 : products};
}

// Work that is done tile by tile of a weight. With many rows each thread has a part of them, and
// all tiles; with few, all rows, and a part of the tiles.
class TilePhase : public Phase {
 public:
  TilePhase(size_t tiles, size_t threads)
      : tiles_(tiles),
        threads_(threads),
        tiles_a_task_(std::clamp(tiles / (threads * 6) / 2 * 2, size_t{2}, kTilesAtOnce)) {}

 protected:
  size_t tasks_for(size_t rows) const { return parts(rows) * chunks(); }

  // fn(tiles, row, rows) over blocks of a task's rows; its tiles begin at an even one
  template <class Fn>
  void blocks(size_t task, size_t rows, Fn fn) const {
    const size_t part = task / chunks(), chunk = task % chunks(), many = parts(rows);
    const size_t end = rows * (part + 1) / many;
    for (size_t row = rows * part / many; row < end; row += kRowsAtOnce)
      fn(range(chunk), row, std::min(kRowsAtOnce, end - row));
  }

  TileRange range(size_t chunk) const {
    return {chunk * tiles_a_task_, std::min(tiles_, (chunk + 1) * tiles_a_task_)};
  }

 private:
  size_t parts(size_t rows) const { return rows >= threads_ * kRowsAtOnce ? threads_ : 1; }
  size_t chunks() const { return ceil_div(tiles_, tiles_a_task_); }

  size_t tiles_, threads_, tiles_a_task_;
};

class LinearPhase final : public TilePhase {
 public:
  LinearPhase(const Kernels& k, size_t threads, LinearOp op, const Buffer& x, const Buffer& out,
              const Buffer* residual)
      : TilePhase(op.weight->tiles(), threads),
        k_(k),
        op_(std::move(op)),
        x_(x),
        out_(out),
        residual_(residual) {}

  size_t tasks(const Step& step) const override { return tasks_for(step.rows_of(out_)); }
  void run(const Step& step, size_t task) override {
    blocks(task, step.rows_of(out_),
           [&](const TileRange& tiles, size_t row, size_t rows) { block(tiles, row, rows); });
  }
  Work work(const Step& step) const override {
    return linear_work(*op_.weight, step.rows_of(out_));
  }

 private:
  void block(const TileRange& tiles, size_t row, size_t rows) const {
    alignas(64) float acc[kTilesAtOnce * kRowsAtOnce * kLanes];
    matmul(k_, *op_.weight, tiles, x_, row, rows, acc);
    for (size_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const size_t column = tile * kLanes, n = std::min(kLanes, out_.width - column);
      k_.finish(acc + (tile - tiles.begin) * rows * kLanes, rows, at(op_.bias, column),
                op_.activation, op_.scale,
                residual_ != nullptr ? residual_->row(row) + column : nullptr,
                out_.row(row) + column, out_.width, n);
    }
  }

  const Kernels& k_;
  LinearOp op_;
  const Buffer &x_, &out_;
  const Buffer* residual_;
};

// All gate tiles, then all up tiles: each is read as one stream.
inline void gated_block(const Kernels& k, const GatedLinearOp& op, const Buffer& x,
                        const Buffer& out, const TileRange& tiles, size_t row, size_t rows) {
  alignas(64) float gate[kTilesAtOnce * kRowsAtOnce * kLanes];
  alignas(64) float up[kTilesAtOnce * kRowsAtOnce * kLanes];
  alignas(64) float pair[kRowsAtOnce * kGroup];  // two tiles' columns: a group
  matmul(k, *op.gate, tiles, x, row, rows, gate);
  matmul(k, *op.up, tiles, x, row, rows, up);
  for (size_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const size_t column = tile * kLanes, n = std::min(kLanes, out.width - column);
    const size_t acc = (tile - tiles.begin) * rows * kLanes;
    float* const to = pair + tile % 2 * kLanes;  // tasks begin at an even tile
    k.finish_gated(gate + acc, up + acc, rows, at(op.gate_bias, column), at(op.up_bias, column),
                   op.activation, to, kGroup, n);
    for (size_t r = 0; r < rows; ++r) {
      if (out.wants_float) std::copy_n(to + r * kGroup, n, out.row(row + r) + column);
      if (out.quant != nullptr && tile % 2 == 1)
        out.quantize(k, row + r, column - kLanes, kGroup, pair + r * kGroup);
    }
  }
}

class GatedLinearPhase final : public TilePhase {
 public:
  GatedLinearPhase(const Kernels& k, size_t threads, GatedLinearOp op, const Buffer& x,
                   const Buffer& out)
      : TilePhase(op.gate->tiles(), threads), k_(k), op_(std::move(op)), x_(x), out_(out) {}

  size_t tasks(const Step& step) const override { return tasks_for(step.rows_of(out_)); }
  void run(const Step& step, size_t task) override {
    blocks(task, step.rows_of(out_), [&](const TileRange& tiles, size_t row, size_t rows) {
      gated_block(k_, op_, x_, out_, tiles, row, rows);
    });
  }
  Work work(const Step& step) const override {
    Work both = linear_work(*op_.gate, step.rows_of(out_));
    return both += linear_work(*op_.up, step.rows_of(out_));
  }

 private:
  const Kernels& k_;
  GatedLinearOp op_;
  const Buffer &x_, &out_;
};

// ---- attention ----

// Where a head's keys and values lie. Heads are apart, so that a head's blocks follow each other in
// memory.
struct HeadCache {
  uint8_t *keys, *values;
  HeadCache(const CacheLayer& cache, size_t head, size_t slots, size_t element)
      : keys(cache.keys->data() + head * slots * cache.head_dim * element),
        values(cache.values->data() + head * slots * padded(cache.head_dim) * element) {}
};

class StorePhase final : public Phase {
 public:
  StorePhase(const Kernels& k, const Limits& limits, const CacheLayer& cache, const Buffer& key,
             const Buffer& value)
      : k_(k), limits_(limits), cache_(cache), key_(key), value_(value) {}
  size_t tasks(const Step& step) const override { return ceil_div(step.batch.rows(), kRows); }
  void run(const Step& step, size_t task) override {
    const size_t dim = cache_.head_dim, element = limits_.element();
    for (size_t r = task * kRows; r < std::min(step.batch.rows(), (task + 1) * kRows); ++r) {
      const size_t slot = static_cast<size_t>(step.batch.slots[r]);
      const size_t offset = slot % limits_.block_size;
      for (size_t h = 0; h < cache_.kv_heads; ++h) {
        const HeadCache head(cache_, h, limits_.slots(), element);
        k_.store_key(key_.row(r) + h * dim, dim, limits_.block_size, offset,
                     head.keys + (slot - offset) * dim * element);
        k_.store_value(value_.row(r) + h * dim, dim, head.values + slot * padded(dim) * element);
      }
    }
  }

 private:
  static constexpr size_t kRows = 16;
  const Kernels& k_;
  const Limits& limits_;
  const CacheLayer& cache_;
  const Buffer &key_, &value_;
};

class AttendPhase final : public Phase {
 public:
  AttendPhase(const Kernels& k, size_t threads, const Limits& limits, const AttendOp& op,
              const CacheLayer& cache, const Buffer& q, const Buffer& out)
      : k_(k), threads_(threads), limits_(limits), op_(op), cache_(cache), q_(q), out_(out) {}
  size_t tasks(const Step& step) const override {
    return step.runs.size() * op_.kv_heads * parts(step);
  }

  void run(const Step& step, size_t task) override {
    const size_t group = op_.heads / op_.kv_heads, split = parts(step);
    const size_t part = task % split, kv_head = task / split % op_.kv_heads;
    const RowRun& run = step.runs[task / split / op_.kv_heads];
    const int32_t* table = step.batch.block_tables.data() + run.sequence * step.batch.table_width;
    const size_t heads = group / split, first = kv_head * group + part * heads;
    const size_t total = (run.end - run.begin) * heads;
    const HeadCache head(cache_, kv_head, limits_.slots(), limits_.element());
    Query queries[kMaxQueries];
    for (size_t done = 0; done < total;) {
      const size_t count = std::min(kMaxQueries, total - done);
      for (size_t i = 0; i < count; ++i, ++done)
        queries[i] = query(step, run.begin + done / heads, first + done % heads);
      k_.attend({queries, count, head.keys, head.values, table, limits_.block_size, op_.head_dim,
                 op_.scale, op_.softcap});
    }
    if (out_.quant == nullptr || !quantizes) return;
    for (size_t r = run.begin; r < run.end; ++r)
      for (size_t h = first; h < first + heads; ++h)
        out_.quantize(k_, r, h * op_.head_dim, op_.head_dim, out_.row(r) + h * op_.head_dim);
  }

  Work work(const Step& step) const override {
    size_t read = 0, seen = 0;
    for (size_t s = 0; s < step.batch.sequences(); ++s) {
      const size_t first = static_cast<size_t>(step.batch.bounds[s]);
      const size_t last = static_cast<size_t>(step.batch.bounds[s + 1]);
      if (first == last) continue;
      read += static_cast<size_t>(query(step, last - 1, 0).end - query(step, first, 0).begin);
      for (size_t row = first; row < last; ++row) {
        const Query q = query(step, row, 0);
        seen += static_cast<size_t>(q.end - q.begin);
      }
    }
    const size_t position = cache_.kv_heads * (op_.head_dim + padded(op_.head_dim));
    return {read * position * limits_.element(), 0, seen * op_.heads * op_.head_dim * 2};
  }

 private:
  // A group's heads share keys and values, so they stay together unless threads would idle.
  size_t parts(const Step& step) const {
    return step.runs.size() * op_.kv_heads < threads_ ? op_.heads / op_.kv_heads : 1;
  }
  Query query(const Step& step, size_t row, size_t head) const {
    const int32_t end = step.batch.positions[row] + 1;
    const int32_t window = static_cast<int32_t>(op_.window);
    const size_t column = head * op_.head_dim;
    return {q_.row(row) + column, out_.row(row) + column,
            window != 0 && end > window ? end - window : 0, end};
  }

  const Kernels& k_;
  size_t threads_;
  const Limits& limits_;
  AttendOp op_;
  const CacheLayer& cache_;
  const Buffer &q_, &out_;
};

// ---- mixture of experts ----
//
// A pair is a row and one of its top_k experts. Pairs are sorted by expert (then row), so that an
// expert's rows lie together; pair_of finds them again for the sum, which runs in order of score.

struct Routing {
  size_t experts, top_k;
  std::vector<int32_t> chosen;  // [rows * top_k] expert, best first
  std::vector<float> weight;    // [rows * top_k]
  std::vector<size_t> begin;    // [experts + 1] first pair of each expert
  std::vector<size_t> pair_of;  // [rows * top_k]
  std::vector<size_t> row_of;   // [pairs]

  Routing(size_t rows, size_t experts_, size_t top_k_)
      : experts(experts_),
        top_k(top_k_),
        chosen(rows * top_k_),
        weight(rows * top_k_),
        begin(experts_ + 1),
        pair_of(rows * top_k_),
        row_of(rows * top_k_) {}

  void choose(size_t row, const float* scores, bool normalize) {
    int32_t* best = chosen.data() + row * top_k;
    float* share = weight.data() + row * top_k;
    float total = 0.0f;
    for (size_t i = 0; i < top_k; ++i) {
      int32_t winner = -1;
      for (size_t e = 0; e < experts; ++e) {
        const int32_t expert = static_cast<int32_t>(e);
        if (std::find(best, best + i, expert) != best + i) continue;
        if (winner < 0 || scores[e] > scores[static_cast<size_t>(winner)]) winner = expert;
      }
      best[i] = winner;
      share[i] = scores[static_cast<size_t>(winner)];
      total += share[i];
    }
    for (size_t i = 0; normalize && i < top_k; ++i) share[i] /= total;
  }

  void sort(size_t rows) {
    std::fill(begin.begin(), begin.end(), size_t{0});
    for (size_t i = 0; i < rows * top_k; ++i) ++begin[static_cast<size_t>(chosen[i]) + 1];
    for (size_t e = 0; e < experts; ++e) begin[e + 1] += begin[e];
    std::vector<size_t> next(begin.begin(), begin.end() - 1);
    for (size_t i = 0; i < rows * top_k; ++i) {
      pair_of[i] = next[static_cast<size_t>(chosen[i])]++;
      row_of[pair_of[i]] = i / top_k;
    }
  }
};

// One task for all rows: the sort is short and needs every row's choice.
class RoutePhase final : public Phase {
 public:
  RoutePhase(const Kernels& k, Routing& routing, const Buffer& scores, bool normalize)
      : k_(k), routing_(routing), scores_(scores), normalize_(normalize) {}
  size_t tasks(const Step&) const override { return 1; }
  void run(const Step& step, size_t) override {
    for (size_t r = 0; r < step.batch.rows(); ++r) {
      k_.softmax(scores_.row(r), scores_.width);
      routing_.choose(r, scores_.row(r), normalize_);
    }
    routing_.sort(step.batch.rows());
  }

 private:
  const Kernels& k_;
  Routing& routing_;
  const Buffer& scores_;
  bool normalize_;
};

// Tile tasks for each expert in turn; fn(expert, tiles, first pair, pairs). weights: one or
// two of every expert, [weights][experts].
template <class Fn>
class ExpertPhase final : public TilePhase {
 public:
  ExpertPhase(const Routing& routing, std::vector<std::vector<TilePtr>> weights, size_t threads,
              Fn fn)
      : TilePhase(weights.at(0).at(0)->tiles(), threads),
        routing_(routing),
        weights_(std::move(weights)),
        fn_(std::move(fn)) {}
  size_t tasks(const Step&) const override { return routing_.experts * tasks_for(1); }
  void run(const Step&, size_t task) override {
    const size_t expert = task / tasks_for(1), first = routing_.begin[expert];
    const size_t pairs = routing_.begin[expert + 1] - first;
    const TileRange tiles = range(task % tasks_for(1));
    for (size_t done = 0; done < pairs; done += kRowsAtOnce)
      fn_(expert, tiles, first + done, std::min(kRowsAtOnce, pairs - done));
  }
  Work work(const Step&) const override {
    Work all;
    for (const auto& weight : weights_)
      for (size_t e = 0; e < routing_.experts; ++e)
        all += linear_work(*weight[e], routing_.begin[e + 1] - routing_.begin[e]);
    return all;
  }

 private:
  const Routing& routing_;
  std::vector<std::vector<TilePtr>> weights_;
  Fn fn_;
};

template <class Fn>
std::unique_ptr<Phase> expert_phase(const Routing& routing,
                                    std::vector<std::vector<TilePtr>> weights, size_t threads,
                                    Fn fn) {
  return std::make_unique<ExpertPhase<Fn>>(routing, std::move(weights), threads, std::move(fn));
}

}  // namespace squall
