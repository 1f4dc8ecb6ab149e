// What the ops do, as phases. Rows and tiles are dealt out as tasks.
#pragma once
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "executor.h"

namespace squall {

// What is multiplied at once: up to eight tiles with up to 64 rows, whose activations stay in the
// cache, or with up to 256 of floats, for which they become float32 once.
constexpr size_t kTilesAtOnce = 8, kMostRows = 256;
constexpr size_t kProductsAtOnce = kTilesAtOnce * kMostRows;
constexpr size_t kRowsAThread = 64;  // from so many on, threads share the rows

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
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

// `count` tasks of a step, whatever they are.
template <class Count, class Fn>
class TasksOf final : public Phase {
 public:
  TasksOf(Count count, Fn fn) : count_(std::move(count)), fn_(std::move(fn)) {}
  size_t tasks(const Step& step) const override { return count_(step); }
  void run(const Step& step, size_t task) override { fn_(step, task); }

 private:
  Count count_;
  Fn fn_;
};

template <class Count, class Fn>
std::unique_ptr<Phase> task_phase(Count count, Fn fn) {
  return std::make_unique<TasksOf<Count, Fn>>(std::move(count), std::move(fn));
}

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

// acc[tiles][rows][16] = x . tiles, x read as their format wants it
inline void matmul(const Kernels& k, const Tile& w, const TileRange& tiles, const Buffer& x,
                   size_t row, size_t rows, float* acc) {
  const size_t format = static_cast<size_t>(w.format());
  const uint8_t* first = w.tile(tiles.begin);
  if (w.is_integer())
    k.matmul_quantized[format](first, tiles.count(), w.tile_bytes(), w.cols(), x.quant_row(row),
                               x.quant_stride(), rows, acc);
  else
    k.matmul_float[format](first, tiles.count(), w.tile_bytes(), w.cols(), {x.row(row), x.width},
                           rows, acc);
}

// Of `rows` rows times a weight that is read once.
inline Work linear_work(const Tile& w, size_t rows) {
  if (rows == 0) return {};
  const uint64_t products = uint64_t{rows} * w.rows() * w.cols();
  return {w.nbytes(), w.is_integer() ? products : 0, w.is_integer() ? 0 : products};
}

// The first row of one of several parts: whole blocks of the kernels' rows, but for the last.
inline size_t first_row(size_t part, size_t parts, size_t rows) {
  constexpr size_t kRows = 24;
  return part == parts ? rows : rows / kRows * part / parts * kRows;
}

// Work that is done tile by tile of a weight. With many rows each thread has a part of them, and
// all tiles; with few, all rows, and a part of the tiles.
class TilePhase : public Phase {
 public:
  TilePhase(const Tile& weight, size_t threads)
      : tiles_(weight.tiles()),
        threads_(threads),
        tiles_a_task_(std::clamp(tiles_ / (threads * 6) / 2 * 2, size_t{2}, kTilesAtOnce)),
        rows_at_once_(weight.is_integer() ? 64 : kMostRows) {}

 protected:
  size_t tasks_for(size_t rows) const { return parts(rows) * chunks(); }

  // fn(tiles, row, rows) over blocks of a task's rows; their tiles begin at an even one
  template <class Fn>
  void blocks(size_t task, size_t rows, Fn fn) const {
    const size_t part = task / chunks();
    blocks(range(task % chunks()), first(part, rows), first(part + 1, rows), fn);
  }
  template <class Fn>
  void blocks(const TileRange& tiles, size_t row, size_t end, Fn fn) const {
    for (; row < end; row += rows_at_once_) {
      const size_t rows = std::min(rows_at_once_, end - row);
      for (size_t tile = tiles.begin; tile < tiles.end; tile += kTilesAtOnce)
        fn(TileRange{tile, std::min(tiles.end, tile + kTilesAtOnce)}, row, rows);
    }
  }

  TileRange range(size_t chunk) const {
    return {chunk * tiles_a_task_, std::min(tiles_, (chunk + 1) * tiles_a_task_)};
  }

 private:
  // As many for each thread, none so large that a patient run could not give way soon.
  size_t parts(size_t rows) const {
    return rows < threads_ * kRowsAThread ? 1 : ceil_div(rows, threads_ * kMostRows) * threads_;
  }
  size_t first(size_t part, size_t rows) const { return first_row(part, parts(rows), rows); }
  size_t chunks() const { return ceil_div(tiles_, tiles_a_task_); }

  size_t tiles_, threads_, tiles_a_task_, rows_at_once_;
};

inline void finish_tiles(const Kernels& k, const LinearOp& op, const float* acc, const Buffer& out,
                         const Buffer* residual, const TileRange& tiles, size_t row, size_t rows) {
  for (size_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const size_t column = tile * kLanes, n = std::min(kLanes, out.width - column);
    k.finish(acc + (tile - tiles.begin) * rows * kLanes, rows, at(op.bias, column), op.activation,
             op.scale, residual != nullptr ? residual->row(row) + column : nullptr,
             out.row(row) + column, out.width, n);
  }
}

inline void linear_block(const Kernels& k, const LinearOp& op, const Buffer& x, const Buffer& out,
                         const Buffer* residual, const Step& step, const LowRank* added,
                         const TileRange& tiles, size_t row, size_t rows) {
  auto* const acc = static_cast<float*>(thread_memory(kProductsAtOnce * kLanes * sizeof(float)));
  matmul(k, *op.weight, tiles, x, row, rows, acc);
  if (added != nullptr) added->add(step, tiles.begin, tiles.count(), row, rows, acc);
  finish_tiles(k, op, acc, out, residual, tiles, row, rows);
}

class LinearPhase final : public TilePhase {
 public:
  LinearPhase(const Kernels& k, size_t threads, LinearOp op, const Buffer& x, const Buffer& out,
              const Buffer* residual, const LowRank* added)
      : TilePhase(*op.weight, threads),
        k_(k),
        op_(std::move(op)),
        x_(x),
        out_(out),
        residual_(residual),
        added_(added) {}

  size_t tasks(const Step& step) const override { return tasks_for(step.rows_of(out_)); }
  void run(const Step& step, size_t task) override {
    blocks(task, step.rows_of(out_), [&](const TileRange& tiles, size_t row, size_t rows) {
      linear_block(k_, op_, x_, out_, residual_, step, added_, tiles, row, rows);
    });
  }
  Work work(const Step& step) const override {
    return linear_work(*op_.weight, step.rows_of(out_));
  }

 private:
  const Kernels& k_;
  LinearOp op_;
  const Buffer &x_, &out_;
  const Buffer* residual_;
  const LowRank* added_;
};

// A linear of rows that an index names, side by side. Each task has some rows, and with many of
// them all tiles, so that each is brought together once.
class ConvolutionPhase final : public Phase {
 public:
  ConvolutionPhase(const Kernels& k, size_t threads, LinearOp op, const Buffer& x,
                   const Buffer& out, const Buffer* residual)
      : k_(k),
        op_(std::move(op)),
        x_(x),
        out_(out),
        residual_(residual),
        threads_(threads),
        taps_(op_.weight->cols() / x.width),
        rows_at_once_(op_.weight->is_integer()
                          ? std::clamp(kPanelBytes / quant_row_bytes(), size_t{1}, size_t{64})
                          : kRowsAtOnce) {}

  size_t tasks(const Step& step) const override {
    const size_t rows = step.rows_of(out_);
    return parts(rows) * chunks(rows);
  }
  void run(const Step& step, size_t task) override {
    const size_t rows = step.rows_of(out_), part = task / chunks(rows), many = tiles_a_task(rows);
    const size_t first = task % chunks(rows) * many;
    const TileRange tiles{first, std::min(op_.weight->tiles(), first + many)};
    const size_t end = first_row(part + 1, parts(rows), rows);
    for (size_t row = first_row(part, parts(rows), rows); row < end; row += rows_at_once_)
      block(step, tiles, row, std::min(rows_at_once_, end - row));
  }
  Work work(const Step& step) const override {
    return linear_work(*op_.weight, step.rows_of(out_));
  }

 private:
  // What a thread works on stays in its second-level cache.
  static constexpr size_t kRowsAtOnce = 240, kTilesATask = 32, kPanelBytes = size_t{1} << 19;

  size_t parts(size_t rows) const { return ceil_div(rows, kRowsAtOnce); }
  size_t tiles_a_task(size_t rows) const {
    const size_t shared = op_.weight->tiles() * parts(rows) / (4 * threads_);
    return std::clamp(shared / 2 * 2, size_t{2}, kTilesATask);
  }
  size_t chunks(size_t rows) const { return ceil_div(op_.weight->tiles(), tiles_a_task(rows)); }
  size_t quant_groups() const { return taps_ * x_.groups(); }
  size_t quant_row_bytes() const { return (2 * quant_groups() + 1) * sizeof(QuantGroup); }

  void block(const Step& step, const TileRange& tiles, size_t row, size_t rows) const {
    const size_t sums = tiles.count() * rows * kLanes * sizeof(float);
    const bool integer = op_.weight->is_integer();
    auto* const memory = static_cast<uint8_t*>(
        thread_memory(sums + rows * (integer ? quant_row_bytes() : kPanelStride * sizeof(float))));
    auto* const acc = reinterpret_cast<float*>(memory);
    const Tile& w = *op_.weight;
    const size_t format = static_cast<size_t>(w.format()), all = step.rows_of(out_);
    const int32_t* const named = step.inputs.indices[op_.taps].data() + row;
    if (integer) {
      auto* const panel = reinterpret_cast<QuantGroup*>(memory + sums);
      for (size_t tap = 0; tap < taps_; ++tap)
        for (size_t r = 0; r < rows; ++r) gather(named[tap * all + r], tap, panel_row(panel, r));
      k_.matmul_quantized[format](w.tile(tiles.begin), tiles.count(), w.tile_bytes(), w.cols(),
                                  panel, 2 * quant_groups() + 1, rows, acc);
    } else {
      auto* const panel = reinterpret_cast<float*>(memory + sums);
      k_.matmul_float[format](w.tile(tiles.begin), tiles.count(), w.tile_bytes(), w.cols(),
                              {x_.data, x_.width, named, all, x_.width, panel}, rows, acc);
    }
    finish_tiles(k_, op_, acc, out_, residual_, tiles, row, rows);
  }
  QuantGroup* panel_row(QuantGroup* panel, size_t r) const {
    return panel + r * (2 * quant_groups() + 1);
  }
  void gather(int32_t from, size_t tap, QuantGroup* to) const {
    const size_t groups = x_.groups();
    to += tap * groups;
    if (from < 0) {
      std::fill_n(to, groups, QuantGroup{});
      return;
    }
    const QuantGroup* const row = x_.quant_row(static_cast<size_t>(from));
    std::copy_n(row, groups, to);
    std::copy_n(row + groups, groups, to + quant_groups());
  }

  const Kernels& k_;
  LinearOp op_;
  const Buffer &x_, &out_;
  const Buffer* residual_;
  size_t threads_, taps_, rows_at_once_;
};

// What adapters add to a gated linear; null: nothing.
struct GatedAdded {
  const LowRank *gate = nullptr, *up = nullptr;
};

// All gate tiles, then all up tiles: each is read as one stream.
inline void gated_block(const Kernels& k, const GatedLinearOp& op, const Buffer& x,
                        const Buffer& out, const Step& step, const GatedAdded& added,
                        const TileRange& tiles, size_t row, size_t rows) {
  constexpr size_t kSums = kProductsAtOnce * kLanes;
  auto* const gate =
      static_cast<float*>(thread_memory((2 * kSums + kMostRows * kGroup) * sizeof(float)));
  float *const up = gate + kSums, *const pair = up + kSums;  // two tiles' columns: a group
  matmul(k, *op.gate, tiles, x, row, rows, gate);
  matmul(k, *op.up, tiles, x, row, rows, up);
  if (added.gate != nullptr) {
    added.gate->add(step, tiles.begin, tiles.count(), row, rows, gate);
    added.up->add(step, tiles.begin, tiles.count(), row, rows, up);
  }
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
                   const Buffer& out, const GatedAdded& added)
      : TilePhase(*op.gate, threads), k_(k), op_(std::move(op)), x_(x), out_(out), added_(added) {}

  size_t tasks(const Step& step) const override { return tasks_for(step.rows_of(out_)); }
  void run(const Step& step, size_t task) override {
    blocks(task, step.rows_of(out_), [&](const TileRange& tiles, size_t row, size_t rows) {
      gated_block(k_, op_, x_, out_, step, added_, tiles, row, rows);
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
  GatedAdded added_;
};

// a(x) of a weight's adapters, where rows have some.
class DownPhase final : public Phase {
 public:
  DownPhase(LowRank& sums, size_t threads) : sums_(sums), threads_(threads) {}
  size_t tasks(const Step& step) const override {
    return sums_.active() ? ceil_div(step.rows_of(sums_.rows()), rows_a_task(step)) : 0;
  }
  void run(const Step& step, size_t task) override {
    const size_t rows = step.rows_of(sums_.rows()), many = rows_a_task(step);
    sums_.down(step, task * many, std::min(rows, (task + 1) * many));
  }

 private:
  size_t rows_a_task(const Step& step) const {
    return std::clamp(step.rows_of(sums_.rows()) / (threads_ * 4), size_t{1}, size_t{64});
  }
  LowRank& sums_;
  size_t threads_;
};

// Sums of segments that other tasks than the merging one made. One phase at a time has them.
struct SplitSums {
  std::unique_ptr<Memory> memory;
  size_t floats = 0;                      // wanted
  std::vector<std::atomic<size_t>> done;  // a step that failed may leave some

  void clear() {
    for (auto& count : done) count.store(0, std::memory_order_relaxed);
  }
};

// ---- norms over rows ----

// The moments of blocks of rows, each made by one task, are merged in order, whoever made them.
struct Moments {
  static constexpr size_t kRows = 64;  // of a block
  struct Sum {
    double mean, squares, count;
    // Chan, Golub and LeVeque's update.
    void add(double mean2, double squares2, double count2) {
      const double away = mean2 - mean, all = count + count2;
      mean += away * count2 / all;
      squares += squares2 + away * away * count * count2 / all;
      count = all;
    }
  };

  const GroupNormalizeOp op;
  const Buffer& x;
  SplitSums& memory;

  Moments(GroupNormalizeOp of, const Buffer& from, size_t most_rows, SplitSums& in)
      : op(std::move(of)), x(from), memory(in) {
    const size_t sums = product({ceil_div(most_rows, kRows), op.groups, sizeof(Sum) / 4});
    memory.floats = std::max(memory.floats, sums + 2 * x.width);
  }
  size_t group() const { return x.width / op.groups; }
  float* means() const { return reinterpret_cast<float*>(memory.memory->data()); }
  float* factors() const { return means() + x.width; }
  Sum* of_block(size_t block) const {
    return reinterpret_cast<Sum*>(means() + 2 * x.width) + block * op.groups;
  }

  void block(const Kernels& k, const Step& step, size_t index) const {
    const size_t row = index * kRows, rows = std::min(kRows, step.rows_of(x) - row);
    auto* const mean = static_cast<float*>(thread_memory(2 * x.width * sizeof(float)));
    float* const squares = mean + x.width;
    k.moments(x.row(row), x.width, rows, x.width, mean, squares);
    for (size_t g = 0; g < op.groups; ++g) {
      Sum sum{};
      for (size_t c = g * group(); c < (g + 1) * group(); ++c)
        sum.add(mean[c], squares[c], static_cast<double>(rows));
      of_block(index)[g] = sum;
    }
  }
  void merge(const Step& step, size_t g) const {
    Sum all = of_block(0)[g];
    for (size_t b = 1; b < ceil_div(step.rows_of(x), kRows); ++b) {
      const Sum& more = of_block(b)[g];
      all.add(more.mean, more.squares, more.count);
    }
    const double factor = 1.0 / std::sqrt(all.squares / all.count + static_cast<double>(op.eps));
    for (size_t c = g * group(); c < (g + 1) * group(); ++c) {
      means()[c] = static_cast<float>(all.mean);
      factors()[c] = static_cast<float>(factor) * op.weight[c];
    }
  }
};

// ---- attention ----

struct HeadCache {
  size_t value_bytes;
  Plane keys, values;
  HeadCache(const KvCache& cache, size_t layer, size_t head, const Limits& limits)
      : value_bytes(squall::value_bytes(limits.cache, cache.layers[layer].head_dim)),
        keys(plane(cache, cache.layers[layer].keys, head,
                   limits.block_size * key_bytes(limits.cache, cache.layers[layer].head_dim))),
        values(plane(cache, cache.layers[layer].values, head, limits.block_size * value_bytes)) {}
  // slot: block * block_size + offset
  void store(const Kernels& k, size_t slot, size_t block_size, size_t dim, const float* key,
             const float* value) const {
    const size_t block = slot / block_size, offset = slot % block_size;
    k.store_key(key, dim, block_size, keys.block(block), offset);
    k.store_value(value, dim, values.block(block) + offset * value_bytes);
  }

 private:
  static Plane plane(const KvCache& cache, size_t at, size_t head, size_t block) {
    return {cache.memory->data() + at + head * Plane::kRegion * block, block, cache.region_bytes};
  }
};

// Keys and values go to their positions in the blocks of their sequence, or, without a cache, to
// blocks of their own.
class StorePhase final : public Phase {
 public:
  StorePhase(const Kernels& k, const Limits& limits, const KvCache& cache, size_t layer,
             bool cached, const Buffer& key, const Buffer& value)
      : k_(k),
        limits_(limits),
        cache_(cache),
        layer_(layer),
        cached_(cached),
        key_(key),
        value_(value) {}
  size_t tasks(const Step& step) const override {
    return ceil_div(step.rows_of(key_), rows_a_task(step));
  }
  void run(const Step& step, size_t task) override {
    const CacheLayer& layer = cache_.layers[layer_];
    const size_t dim = layer.head_dim, size = limits_.block_size, many = rows_a_task(step);
    const size_t begin = task * many, end = std::min(step.rows_of(key_), begin + many);
    size_t slots[kMostRows];
    find_slots(step.inputs, begin, end, slots);
    for (size_t h = 0; h < layer.kv_heads; ++h) {
      const HeadCache head(cache_, layer_, h, limits_);
      for (size_t r = begin; r < end; ++r)
        head.store(k_, slots[r - begin], size, dim, key_.row(r) + h * dim, value_.row(r) + h * dim);
    }
  }

 private:
  static constexpr size_t kMostRows = 16;  // at most a block

  size_t rows_a_task(const Step& step) const {
    return std::clamp(step.rows_of(key_) / 8, size_t{1}, kMostRows);
  }
  // block * block_size + offset of each row
  void find_slots(const Inputs& in, size_t begin, size_t end, size_t* slots) const {
    size_t sequence = 0;
    for (size_t r = begin; r < end; ++r) {
      slots[r - begin] = r;
      if (!cached_) continue;
      while (static_cast<size_t>(in.bounds[sequence + 1]) <= r) ++sequence;
      const size_t position = static_cast<size_t>(in.positions[r]), size = limits_.block_size;
      const size_t entry = sequence * in.table_width + position / size;
      slots[r - begin] = static_cast<size_t>(in.block_tables[entry]) * size + position % size;
    }
  }

  const Kernels& k_;
  const Limits& limits_;
  const KvCache& cache_;
  size_t layer_;
  bool cached_;
  const Buffer &key_, &value_;
};

// A task is a run of rows and a KV head. When these are few, as in decode, it is one segment of
// the context, and the last of a run and head to finish merges.
class AttendPhase final : public Phase {
 public:
  AttendPhase(const Kernels& k, size_t threads, const Limits& limits, const AttendOp& op,
              size_t view, const KvCache& cache, const Buffer& q, const Buffer& out,
              SplitSums& split)
      : k_(k),
        limits_(limits),
        op_(op),
        view_(view),
        cache_(cache),
        q_(q),
        out_(out),
        split_(split),
        few_(few_tasks(threads)) {
    constexpr size_t kLongMemory = 16384;  // memories may be longer than the context
    const size_t rows = *std::max_element(limits.rows.begin(), limits.rows.end());
    most_segments_ = ceil_div(std::max({limits.context, rows, kLongMemory}), kSegment);
    split.floats =
        std::max(split.floats, product({few_, most_segments_, group(), part_floats(op_.head_dim)}));
  }

  static size_t few_tasks(size_t threads) { return 4 * threads; }

  size_t tasks(const Step& step) const override {
    const View& view = step.views[view_];
    return pairs(view) * segments(view);
  }

  void run(const Step& step, size_t task) override {
    const View& view = step.views[view_];
    const size_t many = segments(view), pair = task / many;
    const RowRun& rows = view.runs[pair / op_.kv_heads];
    const size_t head = pair % op_.kv_heads;
    if (many == 1) {
      in_blocks(view, rows, head, [&](const AttendArgs& args, size_t) { k_.attend(args); });
    } else {
      const size_t segment = task % many;
      in_blocks(view, rows, head, [&](const AttendArgs& args, size_t first) {
        k_.attend_segment(args, segment, part(pair, segment, many, first));
      });
      if (split_.done[pair].fetch_add(1, std::memory_order_acq_rel) + 1 < many) return;
      split_.done[pair].store(0, std::memory_order_relaxed);
      std::vector<const float*> parts(many);
      in_blocks(view, rows, head, [&](const AttendArgs& args, size_t first) {
        for (size_t s = 0; s < many; ++s) parts[s] = part(pair, s, many, first);
        k_.merge_segments(args, parts.data(), many);
      });
    }
    quantize(rows, head);
  }

  Work work(const Step& step) const override {
    const View& view = step.views[view_];
    size_t read = 0, seen = 0, sequence = SIZE_MAX;
    int32_t begin = 0, end = 0;  // of what the sequence's rows see together
    for (const RowRun& rows : view.runs)
      for (size_t row = rows.begin; row < rows.end; ++row) {
        const Query q = query(view, row, 0);
        const bool first = std::exchange(sequence, rows.sequence) != rows.sequence;
        if (first) read += static_cast<size_t>(end - begin);
        begin = first ? q.begin : std::min(begin, q.begin);
        end = first ? q.end : std::max(end, q.end);
        seen += static_cast<size_t>(std::max(0, q.end - q.begin));
      }
    read += static_cast<size_t>(end - begin);
    const size_t position =
        key_bytes(limits_.cache, op_.head_dim) + value_bytes(limits_.cache, op_.head_dim);
    return {read * op_.kv_heads * position, 0, seen * op_.heads * op_.head_dim * 2};
  }

 private:
  size_t group() const { return op_.heads / op_.kv_heads; }
  size_t pairs(const View& view) const { return view.runs.size() * op_.kv_heads; }
  // Tasks of a pair; when more than one, its run is a single row.
  size_t segments(const View& view) const {
    const size_t many = std::max(size_t{1}, ceil_div(view.context, kSegment));
    return view.rows_a_run == 1 && pairs(view) < few_ && many <= most_segments_ ? many : 1;
  }
  float* part(size_t pair, size_t segment, size_t many, size_t first) const {
    return reinterpret_cast<float*>(split_.memory->data()) +
           ((pair * many + segment) * group() + first) * part_floats(op_.head_dim);
  }

  // fn(args, first) for blocks of the queries that share a KV head
  template <class Fn>
  void in_blocks(const View& view, const RowRun& rows, size_t kv_head, Fn fn) const {
    const KvCache& cache = view.caches.empty() ? cache_ : *view.caches[rows.sequence];
    const HeadCache head(cache, op_.cache, kv_head, limits_);
    const int32_t* table = cache.blocks.empty()
                               ? view.tables.data() + rows.sequence * view.table_width
                               : cache.blocks.data();
    const size_t total = (rows.end - rows.begin) * group();
    Query queries[kMaxQueries];
    for (size_t first = 0; first < total; first += kMaxQueries) {
      const size_t count = std::min(kMaxQueries, total - first);
      for (size_t i = 0; i < count; ++i)
        queries[i] = query(view, rows.begin + (first + i) / group(),
                           kv_head * group() + (first + i) % group());
      fn({queries, count, head.keys, head.values, table, limits_.block_size, op_.head_dim,
          head.value_bytes, op_.scale, op_.softcap, static_cast<int32_t>(op_.reach())},
         first);
    }
  }
  Query query(const View& view, size_t row, size_t head) const {
    const int32_t own = view.positions.empty() ? static_cast<int32_t>(row) : view.positions[row];
    const int32_t from = op_.window == 0 ? 0 : own + 1 - static_cast<int32_t>(op_.window);
    const size_t column = head * op_.head_dim;
    return {q_.row(row) + column, out_.row(row) + column, std::max(view.begin[row], from),
            view.end[row],        op_.relative_of(head),  own};
  }
  void quantize(const RowRun& rows, size_t kv_head) const {
    if (out_.quant == nullptr || !quantizes) return;
    for (size_t r = rows.begin; r < rows.end; ++r)
      for (size_t h = kv_head * group(); h < (kv_head + 1) * group(); ++h)
        out_.quantize(k_, r, h * op_.head_dim, op_.head_dim, out_.row(r) + h * op_.head_dim);
  }

  const Kernels& k_;
  const Limits& limits_;
  AttendOp op_;
  size_t view_;
  const KvCache& cache_;
  const Buffer &q_, &out_;
  SplitSums& split_;
  size_t few_, most_segments_;
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
  std::vector<float> near;      // [experts] scratch

  Routing(size_t rows, size_t experts_, size_t top_k_)
      : experts(experts_),
        top_k(top_k_),
        chosen(rows * top_k_),
        weight(rows * top_k_),
        begin(experts_ + 1),
        pair_of(rows * top_k_),
        row_of(rows * top_k_),
        near(experts_) {}

  // share_of(best, i, winner): the score of the i-th best, of those chosen so far.
  template <class Share>
  void choose(size_t row, const float* scores, bool normalize, const Share& share_of) {
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
      share[i] = share_of(best, i, static_cast<size_t>(winner));
      best[i] = winner;
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
  RoutePhase(const Kernels& k, Routing& routing, const Buffer& scores, bool normalize,
             std::optional<float> jitter, size_t shared)
      : k_(k),
        routing_(routing),
        scores_(scores),
        normalize_(normalize),
        jitter_(jitter),
        shared_(shared) {}
  size_t tasks(const Step&) const override { return 1; }
  void run(const Step& step, size_t) override {
    const size_t rows = step.rows_of(scores_);
    if (shared_ != kNone)
      choose_together(step.inputs.indices[shared_]);
    else
      choose(rows);
    routing_.sort(rows);
  }

 private:
  void choose(size_t rows) {
    for (size_t r = 0; r < rows; ++r) {
      float* y = scores_.row(r);
      if (jitter_) {
        routing_.choose(r, y, normalize_, [&](const int32_t* chosen, size_t count, size_t winner) {
          return near_share(y, chosen, count, winner);
        });
        continue;
      }
      k_.softmax(y, scores_.width);
      routing_.choose(r, y, normalize_,
                      [y](const int32_t*, size_t, size_t winner) { return y[winner]; });
    }
  }

  // Rows add their scores to those of the first of them, in order.
  void choose_together(std::span<const int32_t> shared) {
    const auto first = [&](size_t r) { return scores_.row(static_cast<size_t>(shared[r])); };
    for (size_t r = 0; r < shared.size(); ++r) {
      float* y = scores_.row(r);
      k_.softmax(y, scores_.width);
      if (first(r) != y) k_.add_scaled(first(r), y, 1.0f, scores_.width, first(r));
    }
    for (size_t r = 0; r < shared.size(); ++r)
      routing_.choose(r, first(r), false, [](const int32_t*, size_t, size_t) { return 1.0f; });
  }

  // The winner's part of a softmax over what is near it and not chosen before it.
  float near_share(const float* y, const int32_t* chosen, size_t count, size_t winner) {
    float* near = routing_.near.data();
    for (size_t e = 0; e < routing_.experts; ++e) {
      const float away = (y[winner] - y[e]) / std::max(std::abs(y[e]), y[winner]);
      near[e] = away > 2.0f * *jitter_ ? -FLT_MAX : y[e];
    }
    for (size_t i = 0; i < count; ++i) near[chosen[i]] = -FLT_MAX;
    k_.softmax(near, routing_.experts);
    return near[winner];
  }

  const Kernels& k_;
  Routing& routing_;
  const Buffer& scores_;
  bool normalize_;
  std::optional<float> jitter_;
  size_t shared_;
};

// Tile tasks for each expert in turn; fn(step, expert, tiles, first pair, pairs). weights: one or
// two of every expert, [weights][experts].
template <class Fn>
class ExpertPhase final : public TilePhase {
 public:
  ExpertPhase(const Routing& routing, std::vector<std::vector<TilePtr>> weights, size_t threads,
              Fn fn)
      : TilePhase(*weights.at(0).at(0), threads),
        routing_(routing),
        weights_(std::move(weights)),
        fn_(std::move(fn)) {}
  size_t tasks(const Step&) const override { return routing_.experts * tasks_for(1); }
  void run(const Step& step, size_t task) override {
    const size_t expert = task / tasks_for(1), first = routing_.begin[expert];
    blocks(range(task % tasks_for(1)), first, routing_.begin[expert + 1],
           [&](const TileRange& tiles, size_t row, size_t rows) {
             fn_(step, expert, tiles, row, rows);
           });
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
