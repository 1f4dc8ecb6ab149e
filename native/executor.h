// Runs a program on the CPU: ops become phases, phases between two barriers run together, one call
// a step.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels.h"
#include "profile.h"
#include "thread_pool.h"
#include "tile.h"

namespace squall {

struct Batch {
  std::span<const int32_t> tokens, positions, slots, bounds, block_tables, outputs;
  size_t table_width;

  size_t rows() const { return tokens.size(); }
  size_t sequences() const { return bounds.size() - 1; }
};

// Where a value lies while it lives. `quant` is set when some linear reads it as int8.
struct Buffer {
  size_t width = 0;
  bool outputs = false;  // rows: the step's wanted rows, else its tokens
  size_t multiple = 1;   // rows a token
  bool kept = false;     // readable after the step
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
};

// A run of consecutive rows of one sequence.
struct RowRun {
  size_t sequence, begin, end;
};

struct Step {
  const Batch& batch;
  std::vector<RowRun> runs;  // short enough to be attention tasks
  size_t rows_a_run;         // at most
  size_t context;            // one past the last position
  size_t rows_of(const Buffer& b) const {
    return (b.outputs ? batch.outputs.size() : batch.rows()) * b.multiple;
  }
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
};

struct Limits {
  size_t rows, outputs;       // of one step
  size_t blocks, block_size;  // of the KV cache
  size_t context;             // positions
  CacheType cache;
};

struct CacheLayer {
  size_t kv_heads, head_dim;
  size_t keys, values;  // their place in a region, in bytes
};

struct KvCache {
  std::vector<CacheLayer> layers;
  size_t region_bytes = 0;
  std::unique_ptr<Memory> memory;  // once the program is planned
};

using TilePtr = std::shared_ptr<const Tile>;
using Vector = std::vector<float>;
constexpr size_t kNone = SIZE_MAX;

// ---- ops, as squall.program defines them; values by number, kNone when absent ----

struct LinearOp {
  size_t out, x;
  TilePtr weight;
  Vector bias;  // empty: none
  Activation activation = Activation::kNone;
  float scale = 1.0f;
  size_t residual = kNone;
};
struct GatedLinearOp {
  size_t out, x;
  TilePtr gate, up;
  Vector gate_bias, up_bias;
  Activation activation;
};
struct NormalizeOp {
  size_t out, x;
  Vector weight, bias;
  bool rms;
  float eps;
  size_t group;  // columns that are normalized together
};
struct RotateOp {
  size_t out, x, angles, heads, head_dim;
  bool interleaved;
};
struct AttendOp {
  size_t out, q, k, v, layer, heads, kv_heads, head_dim;
  float scale;
  size_t window;  // 0: none
  float softcap;  // 0: none
};
struct MoeOp {
  size_t out, x;
  TilePtr router;
  std::vector<TilePtr> gate, up, down;  // an expert each
  size_t top_k;
  Activation activation;
  bool normalize;
  std::optional<float> jitter;  // of SparseMixer
  float scale;
  size_t residual;
};

struct Routing;
struct SplitSums;

class Executor {
 public:
  Executor(std::string_view isa, std::shared_ptr<ThreadPool> pool, const Limits& limits);
  ~Executor();

  size_t add_value(size_t width, bool outputs, bool kept, size_t multiple = 1);
  void add_cache(size_t kv_heads, size_t head_dim);

  void embed(size_t out, TilePtr table, float scale);
  void rope_angles(size_t out, Vector frequencies, float magnitude);
  void normalize(NormalizeOp op);
  void linear(LinearOp op);
  void gated_linear(GatedLinearOp op);
  void rotate(RotateOp op);
  void attend(AttendOp op);
  void mixture_of_experts(MoeOp op);
  void add(size_t out, size_t a, size_t b, float scale);
  void softcap(size_t out, size_t x, float cap);
  void gather_rows(size_t out, size_t x);
  // out[:, i] = x[:, order[i]]
  void gather_columns(size_t out, size_t x, std::vector<uint32_t> order);
  // No more ops: groups the phases and lays out the buffers.
  void plan(size_t logits);

  // Throws std::invalid_argument when an index of the batch is out of range. Thread-safe.
  void step(const Batch& batch, float* logits);
  // A kept value of the last step, [rows, width].
  std::vector<float> value(size_t id, size_t* rows) const;
  // From now on count where the time of steps goes, from zero; or no longer.
  void profile(bool on);
  std::vector<PhaseProfile> profiled() const;

  size_t buffer_bytes() const { return arena_ ? arena_->bytes() : 0; }
  size_t cache_bytes() const;
  size_t vocab() const { return buffers_[logits_]->width; }

 private:
  struct Mixture {
    MoeOp op;
    std::shared_ptr<Routing> routing;
    size_t routed = 0, gathered = 0, inner = 0, outer = 0;  // values; the last three a row a pair
  };
  void route(const Mixture& m);
  void run_experts(const Mixture& m);
  void combine(const Mixture& m);
  void check(const Batch& batch) const;
  Step prepare(const Batch& batch) const;
  void add_phase(std::string name, std::unique_ptr<Phase> phase);
  // The value, which someone is going to read as it is.
  const Buffer& floats(size_t id);
  // Float or int8 reading of `x`, whichever the weight wants.
  void read(Phase& phase, size_t x, const Tile& weight);
  // Phases that make the int8 form of values whose writers do not, group by group.
  void add_quantize_phases();
  void group_phases();
  void layout();
  void run_groups(const Step& step);
  // A group's time, from the end of the one before on, goes to its phases as their tasks took it.
  void account(const Step& step, int64_t start_ns);

  const Kernels& kernels_;
  std::shared_ptr<ThreadPool> pool_;
  Limits limits_;
  size_t logits_ = kNone, tokens_seen_ = 0, outputs_seen_ = 0;
  size_t vocab_in_ = SIZE_MAX;  // token ids must be below
  size_t split_value_ = kNone;  // stands for split_, so that no two attends run at once
  bool profiling_ = false;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  KvCache cache_;
  std::unique_ptr<SplitSums> split_;
  std::vector<std::unique_ptr<Phase>> phases_;
  std::vector<std::vector<Phase*>> groups_;
  std::unique_ptr<Memory> arena_;
  mutable std::mutex mutex_;
};

// out[rows, tile.rows] = x[rows, tile.cols] . tile, by itself: quantizes x where the tile wants
// int8, then multiplies. Returns the seconds of the fastest of `passes` that do both.
double linear_alone(const Kernels& kernels, ThreadPool& pool, const Tile& tile,
                    std::span<const float> x, size_t rows, float* out, size_t passes = 1);

}  // namespace squall
