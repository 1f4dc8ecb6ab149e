// Runs a program on the CPU: ops become phases, phases between two barriers run together, one call
// a step.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels.h"
#include "low_rank.h"
#include "profile.h"
#include "thread_pool.h"
#include "tile.h"

namespace squall {

class SequenceMemory;

// What a run is given: indices and values by number, and the sequences of cached attention. Rows
// bounds[s] to bounds[s + 1] belong to sequence s; their K and V go to `positions` of its blocks.
struct Inputs {
  std::vector<size_t> rows;                       // of each row space
  std::vector<std::span<const int32_t>> indices;  // [axes][rows]
  std::vector<const float*> values;               // [rows][width]
  std::span<const int32_t> positions, bounds, block_tables;
  size_t table_width = 0;
  std::vector<Mixture> mixtures = {};                // of adapters, which indices name
  std::vector<const SequenceMemory*> memories = {};  // of each sequence, null: none; or empty

  size_t sequences() const { return bounds.empty() ? 0 : bounds.size() - 1; }
};

// Where a value lies while it lives. `quant` is set when some linear reads it as int8.
struct Buffer {
  size_t width = 0;
  size_t space = 0;     // whose rows it has
  size_t multiple = 1;  // rows to one of its space
  bool kept = false;    // readable after the step
  bool wants_quant = false;
  bool wants_float = false;  // someone reads it as it is
  float* data = nullptr;
  QuantGroup* quant = nullptr;

  size_t groups() const { return width / kGroup; }
  // One more than its groups take, so that rows fall in other cache sets.
  size_t quant_stride() const { return 2 * groups() + 1; }
  float* row(size_t r) const { return data + r * width; }
  QuantGroup* quant_row(size_t r) const { return quant + r * quant_stride(); }
  // Writes the int8 form of `cols` columns from `column` on, which are at x, as one span.
  void quantize(const Kernels& k, size_t r, size_t column, size_t cols, const float* x) const {
    QuantGroup* first = quant_row(r);
    auto* digits = reinterpret_cast<FineGroup*>(first + groups());
    k.quantize(x, cols, first + column / kGroup, digits + column / kGroup);
  }
  // Of a row, where it is wanted; each group as a span, as of what comes with a run.
  void quantize_groups(const Kernels& k, size_t r) const {
    for (size_t c = 0; quant != nullptr && c < width; c += kGroup)
      quantize(k, r, c, kGroup, row(r) + c);
  }
};

// A run of consecutive rows of one sequence.
struct RowRun {
  size_t sequence, begin, end;
};

struct KvCache;

// What the rows of an attention see, and how they are cut into tasks.
struct View {
  std::vector<int32_t> begin, end;     // of each row: the positions it sees
  std::span<const int32_t> positions;  // its own; empty: rows
  std::span<const int32_t> tables;     // [sequences][table_width]
  size_t table_width = 0;
  std::vector<const KvCache*> caches;  // of each sequence; empty: one for all
  std::vector<RowRun> runs;
  size_t rows_a_run = 1;  // at most
  size_t context = 0;     // one past the last position that is seen
};

struct Step {
  const Inputs& inputs;
  std::vector<View> views;
  size_t rows_of(const Buffer& b) const { return inputs.rows[b.space] * b.multiple; }
};

class Phase {
 public:
  virtual ~Phase() = default;
  virtual size_t tasks(const Step& step) const = 0;
  virtual void run(const Step& step, size_t task) = 0;
  // Of a step that has run.
  virtual Work work(const Step&) const { return {}; }
  std::string name;
  Timing timing;
  std::vector<size_t> reads, writes;  // values
  bool quantizes = false;             // also writes the int8 form of its output where one is wanted
  // A value as wide as its output, over which it may write that: it reads no float later.
  size_t replaces = kNone;
};

struct Limits {
  std::vector<size_t> rows;   // of each row space
  size_t blocks, block_size;  // of the KV cache
  size_t context;             // positions
  CacheType cache;
};

struct CacheLayer {
  size_t kv_heads, head_dim;
  size_t keys, values;  // their place in a region, in bytes
  bool operator==(const CacheLayer&) const = default;
};

struct KvCache {
  std::vector<CacheLayer> layers;
  size_t region_bytes = 0;
  std::unique_ptr<Memory> memory = nullptr;  // once the program is planned
  std::vector<int32_t> blocks = {};          // where it is no sequence's: 0, 1, ...
  // So many blocks; in order: without tables of sequences.
  void make(size_t count, bool in_order);
};

// What a sequence has to recall: rows of keys and values for each memory of a program.
class SequenceMemory {
 public:
  SequenceMemory(const Kernels& kernels, const Limits& limits, const KvCache& like, size_t rows);
  // keys, values: of each memory, [count][kv_heads * head_dim]. Not while a run recalls the rows.
  void write(size_t first, size_t count, const std::vector<const float*>& keys,
             const std::vector<const float*>& values);
  // Whether an executor with these could recall it.
  bool fits(const Limits& limits, const KvCache& like) const;
  const KvCache& cache() const { return cache_; }
  size_t rows() const { return rows_; }
  size_t nbytes() const { return cache_.memory->bytes(); }
  size_t width(size_t memory) const;
  size_t memories() const { return cache_.layers.size(); }

 private:
  const Kernels& k_;
  Limits limits_;
  KvCache cache_;
  size_t rows_;
};

using Vector = std::vector<float>;

// ---- ops, as squall.program defines them; values by number, kNone when absent ----

struct LinearOp {
  size_t out, x;
  TilePtr weight;
  Vector bias;  // empty: none
  Activation activation = Activation::kNone;
  float scale = 1.0f;
  size_t residual = kNone;
  AdaptersOp adapters = {};
  size_t taps = kNone;  // index
};
struct GatedLinearOp {
  size_t out, x;
  TilePtr gate, up;
  Vector gate_bias, up_bias;
  Activation activation;
  AdaptersOp adapters = {};
};
struct NormalizeOp {
  size_t out, x;
  Vector weight, bias;
  bool rms;
  float eps;
  size_t group;  // columns that are normalized together
};
struct GroupNormalizeOp {
  size_t out, x;
  Vector weight, bias;
  size_t groups;
  float eps;
  Activation activation;
};
struct RotateOp {
  size_t out, x, angles, heads, head_dim;
  bool interleaved;
};
struct AttendOp {
  size_t out, q, k, v;  // without k and v: of a memory
  size_t spans;         // index [2][rows]: begin and end of what each row sees
  size_t cache;         // or memory; kNone: the rows of k and v in this run
  size_t heads, kv_heads, head_dim;
  float scale;
  size_t window;                       // 0: none
  float softcap;                       // 0: none
  Vector relative = {};                // [distances][heads]; empty: none
  std::vector<uint32_t> buckets = {};  // which of them is for -n, ..., n
  Vector by_head = {};                 // [heads][-n - kLanes, ..., n + kLanes], from these

  size_t reach() const { return buckets.size() / 2; }
  const float* relative_of(size_t head) const {
    const size_t centre = reach() + kLanes;
    return by_head.empty() ? nullptr : &by_head[head * (2 * centre + 1) + centre];
  }
};
struct AddOp {
  size_t out, a, b;
  float scale = 1.0f;
  size_t gate = kNone, column = 0;  // a value of one row, and where it begins there
  Activation activation = Activation::kNone;
};
struct ModulateOp {
  size_t out, x, by, shift, scale;  // columns of `by`, a value of one row
  float eps;
};
struct MoeOp {
  size_t out, x;
  TilePtr router;
  std::vector<TilePtr> gate, up, down;  // an expert each; no gates: the activation is of up
  size_t top_k;
  Activation activation;
  bool normalize;
  std::optional<float> jitter;  // of SparseMixer
  float scale;
  size_t residual;
  AdaptersOp adapters = {};
  // Of experts one after another; empty: none.
  Vector router_bias = {}, gate_bias = {}, up_bias = {}, down_bias = {};
  size_t shared = kNone;  // index: the first of the rows that have one expert together
};

struct SplitSums;

class Executor {
 public:
  Executor(std::string_view isa, std::shared_ptr<ThreadPool> pool, const Limits& limits);
  ~Executor();

  size_t add_value(size_t width, size_t space, bool kept, size_t multiple = 1);
  size_t add_index(size_t space, size_t axes);
  void add_cache(size_t kv_heads, size_t head_dim);
  void add_memory(size_t kv_heads, size_t head_dim);

  // The rows of `out` come with the run.
  void input(size_t out);
  void embed(size_t out, size_t index, TilePtr table, float scale, const AdaptersOp& adapters);
  // Frequency i turns with axis axes[i] of `positions`.
  void rope_angles(size_t out, size_t positions, Vector frequencies, std::vector<size_t> axes,
                   float magnitude);
  void normalize(NormalizeOp op);
  void group_normalize(GroupNormalizeOp op);
  void linear(LinearOp op);
  void gated_linear(GatedLinearOp op);
  void rotate(RotateOp op);
  void attend(AttendOp op);
  void mixture_of_experts(MoeOp op);
  void add(AddOp op);
  void modulate(ModulateOp op);
  void softcap(size_t out, size_t x, float cap);
  // Of an index with axes, side by side, or their mean.
  void gather_rows(size_t out, size_t x, size_t index, bool mean = false);
  // out[i] = rows[index[i]], where that is negative x[i]
  void overlay(size_t out, size_t x, size_t rows, size_t index);
  // out = the columns of a, then those of b
  void concatenate(size_t out, size_t a, size_t b);
  // out = the rows of a, then those of b
  void concatenate_rows(size_t out, size_t a, size_t b);
  // out[:, i] = x[:, order[i]]
  void gather_columns(size_t out, size_t x, std::vector<uint32_t> order);
  // No more ops: groups the phases and lays out the buffers. adapted: as adapters' layout.
  void plan(const std::vector<size_t>& outputs, int64_t adapted = 0);

  // Throws std::invalid_argument when an input is out of range. to: where each of the plan's
  // outputs goes, [rows, width]. Thread-safe.
  // A patient run gives way to others of the pool that are not.
  void run(const Inputs& inputs, const std::vector<float*>& to, bool patient = false);
  // For a sequence to recall.
  std::shared_ptr<SequenceMemory> remember(size_t rows) const;
  // A kept value of the last run, [rows, width].
  std::vector<float> value(size_t id, size_t* rows) const;
  // From now on count where the time of steps goes, from zero; or no longer.
  void profile(bool on);
  std::vector<PhaseProfile> profiled() const;

  size_t buffer_bytes() const { return arena_ ? arena_->bytes() : 0; }
  size_t cache_bytes() const;
  size_t width(size_t value) const { return buffers_.at(value)->width; }
  const std::vector<size_t>& inputs() const { return inputs_; }
  const std::vector<size_t>& outputs() const { return outputs_; }
  size_t rows_of(const Inputs& inputs, size_t value) const {
    return inputs.rows.at(buffers_.at(value)->space);
  }

 private:
  struct Mixture {
    MoeOp op;
    std::shared_ptr<Routing> routing;
    size_t routed = 0, gathered = 0, inner = 0, outer = 0;  // values; the last three a row a pair
  };
  void route(const Mixture& m);
  void run_experts(const Mixture& m);
  // A linear of every expert. first: of the op's weights.
  void expert_linear(const Mixture& m, const std::vector<TilePtr>& weights, const Vector& biases,
                     Activation activation, size_t x, size_t out, size_t first);
  void combine(const Mixture& m);
  // Whole numbers that come with a run; those that choose rows are below `limit`, or below how many
  // rows the space `into` has.
  struct Index {
    size_t space, axes, limit = SIZE_MAX, into = kNone;
    bool mixtures = false;  // chooses mixtures of adapters, or negative: none
    bool overlays = false;  // chooses rows, or negative: none
    bool shared = false;    // names the first of a group's rows
  };
  // The adapters of a weight; null: none.
  struct Added {
    LowRank* sums = nullptr;
    std::vector<size_t> reads;  // what stands for a(x), and scalings
  };
  // An attention's rows: those of one space with the same spans of the same kind of keys.
  enum class Keys : uint8_t { kCached, kOfRun, kRecalled };
  struct Sight {
    size_t spans, space;
    Keys keys;
    size_t from;      // the space of k and v, where they are of the run
    size_t kv_heads;  // the fewest of its attentions
  };
  void check(const Inputs& inputs) const;
  void check_index(const Inputs& inputs, size_t index) const;
  void check_sequences(const Inputs& inputs) const;
  void check_spans(const Inputs& inputs, const Sight& sight) const;
  size_t positions_there(const Inputs& inputs, const Sight& sight, size_t sequence) const;
  // The index, which chooses rows of `from` for `to`.
  Index& choosing(size_t index, const Buffer& from, const Buffer& to, bool overlays);
  void add_layer(KvCache& cache, size_t kv_heads, size_t head_dim, size_t keys);
  size_t sight_of(const AttendOp& op, Keys keys, size_t from);
  void convolution(LinearOp op, const Buffer* residual);
  // The value that stands for the sums in split_, so that no two ops have them at once.
  size_t split(size_t space);
  // What attends to keys and values once they are stored. stored: stands for them; kNone: a memory.
  void add_attend(const AttendOp& op, Keys keys, size_t from, size_t stored);
  View view(const Inputs& inputs, const Sight& sight) const;
  void add_phase(std::string name, std::unique_ptr<Phase> phase);
  // Adds a phase for a(x) as soon as x is there. first: of the op's weights; rows: a value of its
  // rows; x: the floats that it multiplies, kNone for a table.
  Added adapt(const AdaptersOp& op, size_t first, size_t experts, size_t rows, size_t x,
              const Routing* routing = nullptr);
  // The value, which someone is going to read as it is.
  const Buffer& floats(size_t id);
  // The same, and that it has one row in every run, with these columns.
  const Buffer& one_row(size_t id, size_t column, size_t columns);
  // Float or int8 reading of `x`, whichever the weight wants.
  void read(Phase& phase, size_t x, const Tile& weight);
  // Phases that make the int8 form of values whose writers do not, group by group.
  void add_quantize_phases();
  void group_phases();
  void layout();
  // Groups of phases between which a value is there, and its place in the arena.
  struct Life {
    size_t first = SIZE_MAX, last = 0, bytes = 0, offset = 0;
  };
  std::vector<size_t> joined(std::vector<Life>& lives) const;
  void run_groups(const Step& step, Turn turn);
  // A group's time, from the end of the one before on, goes to its phases as their tasks took it.
  void account(const Step& step, int64_t start_ns);

  const Kernels& kernels_;
  std::shared_ptr<ThreadPool> pool_;
  Limits limits_;
  std::vector<size_t> inputs_, outputs_;  // values
  std::vector<size_t> rows_seen_;         // of each space, in the last run
  bool planned_ = false, profiling_ = false;
  int64_t layout_ = 0;
  size_t split_value_ = kNone;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<Index> indices_;
  std::vector<Sight> sights_;
  std::vector<size_t> single_;                 // spaces of one row
  std::vector<std::array<size_t, 3>> joined_;  // a space with the rows of two others
  KvCache cache_;
  KvCache uncached_;             // keys and values of attention without a cache, an op at a time
  size_t uncached_key_ = kNone;  // the value that stands for it
  size_t uncached_rows_ = 0;     // that it has room for
  KvCache recalled_;             // how a sequence's memories lie; empty itself
  std::unique_ptr<SplitSums> split_;
  std::vector<std::unique_ptr<Phase>> phases_;
  std::vector<std::unique_ptr<LowRank>> low_ranks_;
  std::vector<std::vector<Phase*>> groups_;
  std::unique_ptr<Memory> arena_;
  mutable std::mutex mutex_;
};

// out[rows, tile.rows] = x[rows, tile.cols] . tile, by itself: quantizes x where the tile wants
// int8, then multiplies. Returns the seconds of the fastest of `passes` that do both.
double linear_alone(const Kernels& kernels, ThreadPool& pool, const Tile& tile,
                    std::span<const float> x, size_t rows, float* out, size_t passes = 1);

}  // namespace squall
