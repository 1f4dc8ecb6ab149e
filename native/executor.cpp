#include "executor.h"

#include <stdexcept>

#include "phases.h"

namespace squall {
namespace {

constexpr size_t kRowsOfAttention = 16;  // rows of a sequence in one attention task

const Kernels& require(std::string_view isa, CacheType cache) {
  const Kernels* kernels = find_kernels(isa, cache);
  if (kernels == nullptr)
    throw std::invalid_argument("this machine has no kernels for ISA " + std::string(isa));
  return *kernels;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

void expect(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

// A weight's format and shape, as profiles tell them.
std::string described(const Tile& w) {
  return std::string(info(w.format()).name) + " " + std::to_string(w.rows()) + "x" +
         std::to_string(w.cols());
}

}  // namespace

Executor::Executor(std::string_view isa, std::shared_ptr<ThreadPool> pool, const Limits& limits)
    : kernels_(require(isa, limits.cache)),
      pool_(std::move(pool)),
      limits_(limits),
      split_(std::make_unique<SplitSums>()) {
  expect(limits.rows > 0 && limits.outputs > 0 && limits.blocks > 0, "limits must be positive");
  expect(limits.block_size > 0 && limits.block_size % kLanes == 0 && limits.block_size <= 1024,
         "block_size must be a multiple of 16, at most 1024");
  expect(limits.blocks <= size_t{INT32_MAX} / limits.block_size, "too many KV blocks");
  expect(std::max({limits.rows, limits.outputs, limits.context}) <= size_t{INT32_MAX},
         "rows, outputs and context must be below 2^31");
}

Executor::~Executor() = default;

size_t Executor::add_value(size_t width, bool outputs, bool kept, size_t multiple) {
  expect(width > 0 && width < size_t{1} << 28, "a value's width is out of range");
  auto buffer = std::make_unique<Buffer>();
  buffer->width = width;
  buffer->outputs = outputs;
  buffer->kept = buffer->wants_float = kept;
  buffer->multiple = multiple;
  buffers_.push_back(std::move(buffer));
  return buffers_.size() - 1;
}

void Executor::add_cache(size_t kv_heads, size_t head_dim) {
  expect(kv_heads > 0 && head_dim > 0 && head_dim <= kMaxHeadDim, "head_dim must be 1 to 512");
  const size_t slots = product({Plane::kRegion, limits_.block_size, kv_heads});
  const size_t keys = cache_.region_bytes;
  const size_t values = keys + product({slots, key_bytes(limits_.cache, head_dim)});
  cache_.region_bytes = values + product({slots, value_bytes(limits_.cache, head_dim)});
  cache_.layers.push_back({kv_heads, head_dim, keys, values});
}

size_t Executor::cache_bytes() const {
  return limits_.blocks * (cache_.region_bytes / Plane::kRegion);
}

void Executor::add_phase(std::string name, std::unique_ptr<Phase> phase) {
  phase->name = std::move(name);
  phases_.push_back(std::move(phase));
}

const Buffer& Executor::floats(size_t id) {
  buffers_.at(id)->wants_float = true;
  return *buffers_[id];
}

void Executor::read(Phase& phase, size_t x, const Tile& weight) {
  expect(buffers_[x]->width == weight.cols(), "a linear's input and weight differ in width");
  phase.reads.push_back(x);
  (weight.is_integer() ? buffers_[x]->wants_quant : buffers_[x]->wants_float) = true;
}

void Executor::embed(size_t out, TilePtr table, float scale) {
  const Buffer& to = *buffers_[out];
  expect(to.width == table->cols(), "the embedding's width differs from its table's");
  vocab_in_ = std::min(vocab_in_, table->rows());
  const uint64_t row_bytes = table->nbytes() / table->rows();
  auto phase = row_phase(to, pool_->threads(), [&to, table, scale](const Step& step, size_t r) {
    float* row = to.row(r);
    table->dequantize_row(static_cast<size_t>(step.batch.tokens[r]), row);
    if (scale != 1.0f)
      for (size_t i = 0; i < to.width; ++i) row[i] *= scale;
  });
  phase->writes = {out};
  phase->row_work.bytes = row_bytes;
  add_phase("embed", std::move(phase));
}

void Executor::rope_angles(size_t out, Vector frequencies, float magnitude) {
  const Buffer& to = *buffers_[out];
  expect(to.width == 2 * frequencies.size(), "angles are twice as wide as the frequencies");
  auto phase =
      row_phase(to, pool_->threads(), [&to, frequencies, magnitude](const Step& step, size_t r) {
        const size_t n = frequencies.size();
        for (size_t i = 0; i < n; ++i) {
          const float angle = static_cast<float>(step.batch.positions[r]) * frequencies[i];
          to.row(r)[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * magnitude;
          to.row(r)[n + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * magnitude;
        }
      });
  phase->writes = {out};
  add_phase("rope angles", std::move(phase));
}

void Executor::normalize(NormalizeOp op) {
  const Buffer &x = floats(op.x), &to = *buffers_[op.out];
  expect(x.width == to.width && op.group > 0 && x.width % op.group == 0 &&
             (op.weight.size() == op.group || op.weight.size() == x.width) &&
             (op.bias.empty() || op.bias.size() == op.weight.size()),
         "a norm's weight does not fit its input");
  const size_t in = op.x, out = op.out;
  auto phase = row_phase(
      to, pool_->threads(), [&k = kernels_, &x, &to, op = std::move(op)](const Step&, size_t r) {
        // At once where all groups share a weight, else each with its own.
        const size_t span = op.weight.size() == op.group ? x.width : op.group;
        for (size_t i = 0; i < x.width; i += span) {
          const float *in = x.row(r) + i, *weight = at(op.weight, i);
          if (op.rms)
            k.rms_norm(in, span, op.group, weight, op.eps, to.row(r) + i);
          else
            k.layer_norm(in, span, op.group, weight, at(op.bias, i), op.eps, to.row(r) + i);
        }
        if (to.quant != nullptr) to.quantize(k, r, 0, to.width, to.row(r));
      });
  phase->reads = {in};
  phase->writes = {out};
  phase->quantizes = true;
  add_phase("norm", std::move(phase));
}

void Executor::linear(LinearOp op) {
  const Buffer& to = *buffers_[op.out];
  expect(to.width == op.weight->rows() && (op.bias.empty() || op.bias.size() == to.width),
         "a linear's weight or bias does not fit its output");
  const Buffer* residual = op.residual == kNone ? nullptr : &floats(op.residual);
  expect(residual == nullptr || residual->width == to.width, "a residual differs in width");
  const size_t out = op.out, in = op.x, rest = op.residual;
  const TilePtr weight = op.weight;
  auto phase = std::make_unique<LinearPhase>(kernels_, pool_->threads(), std::move(op),
                                             *buffers_[in], to, residual);
  read(*phase, in, *weight);
  if (rest != kNone) phase->reads.push_back(rest);
  phase->writes = {out};
  add_phase("linear " + described(*weight), std::move(phase));
}

void Executor::gated_linear(GatedLinearOp op) {
  const Buffer& to = *buffers_[op.out];
  expect(to.width == op.gate->rows() && to.width == op.up->rows(), "gate and up differ in shape");
  expect((op.gate_bias.empty() || op.gate_bias.size() == to.width) &&
             (op.up_bias.empty() || op.up_bias.size() == to.width),
         "a gated linear's bias does not fit");
  const size_t out = op.out, in = op.x;
  const TilePtr gate = op.gate, up = op.up;
  auto phase = std::make_unique<GatedLinearPhase>(kernels_, pool_->threads(), std::move(op),
                                                  *buffers_[in], to);
  read(*phase, in, *gate);
  read(*phase, in, *up);
  phase->writes = {out};
  phase->quantizes = true;
  add_phase("gated linear " + described(*gate), std::move(phase));
}

void Executor::rotate(RotateOp op) {
  const Buffer &x = floats(op.x), &angles = floats(op.angles), &to = *buffers_[op.out];
  expect(x.width == product({op.heads, op.head_dim}) && to.width == x.width &&
             angles.width <= op.head_dim,
         "a rotation does not fit its heads");
  auto phase = row_phase(to, pool_->threads(), [&x, &angles, &to, op](const Step&, size_t r) {
    const size_t n = angles.width / 2, step = op.interleaved ? 2 : 1,
                 apart = op.interleaved ? 1 : n;
    const float *c = angles.row(r), *s = c + n;
    for (size_t h = 0; h < op.heads; ++h) {
      const float* from = x.row(r) + h * op.head_dim;
      float* head = to.row(r) + h * op.head_dim;
      for (size_t i = 0; i < n; ++i) {
        const float a = from[i * step], b = from[i * step + apart];
        head[i * step] = a * c[i] - b * s[i];
        head[i * step + apart] = b * c[i] + a * s[i];
      }
      std::copy(from + 2 * n, from + op.head_dim, head + 2 * n);
    }
  });
  phase->reads = {op.x, op.angles};
  phase->writes = {op.out};
  add_phase("rotate", std::move(phase));
}

void Executor::attend(AttendOp op) {
  expect(op.layer < cache_.layers.size(), "attention names a cache layer that does not exist");
  const CacheLayer& layer = cache_.layers[op.layer];
  expect(op.kv_heads == layer.kv_heads && op.head_dim == layer.head_dim &&
             op.heads % op.kv_heads == 0 &&
             buffers_[op.q]->width == product({op.heads, op.head_dim}) &&
             buffers_[op.out]->width == buffers_[op.q]->width &&
             buffers_[op.k]->width == op.kv_heads * op.head_dim &&
             buffers_[op.v]->width == buffers_[op.k]->width,
         "attention's heads do not fit its inputs or its cache");
  op.window = std::min(op.window, limits_.context);
  // The cache has no buffer; this value stands for it, so that the reader waits for the writer.
  const size_t stored = add_value(1, false, false);
  if (split_value_ == kNone) split_value_ = add_value(1, false, false);
  auto store =
      std::make_unique<StorePhase>(kernels_, limits_, cache_, op.layer, floats(op.k), floats(op.v));
  store->reads = {op.k, op.v};
  store->writes = {stored};
  add_phase("store", std::move(store));
  auto phase = std::make_unique<AttendPhase>(kernels_, pool_->threads(), limits_, op, cache_,
                                             floats(op.q), *buffers_[op.out], *split_);
  phase->reads = {op.q, stored, split_value_};
  phase->writes = {op.out, split_value_};
  phase->quantizes = op.head_dim % kGroup == 0;
  add_phase("attend", std::move(phase));
}

void Executor::mixture_of_experts(MoeOp op) {
  const size_t experts = op.gate.size(), hidden = buffers_[op.x]->width;
  expect(op.top_k > 0 && op.top_k <= experts && op.up.size() == experts &&
             op.down.size() == experts && op.router->rows() == experts,
         "a mixture's experts do not fit");
  const bool outputs = buffers_[op.x]->outputs;
  const size_t rows = outputs ? limits_.outputs : limits_.rows;
  Mixture m{op, std::make_shared<Routing>(rows, experts, op.top_k)};
  m.routed = add_value(1, outputs, false);
  m.gathered = add_value(hidden, outputs, false, op.top_k);
  m.inner = add_value(op.gate[0]->rows(), outputs, false, op.top_k);
  m.outer = add_value(hidden, outputs, false, op.top_k);
  route(m);
  run_experts(m);
  combine(m);
}

// Scores, each row's experts, and the rows sorted by expert.
void Executor::route(const Mixture& m) {
  const MoeOp& op = m.op;
  const size_t scores = add_value(op.router->rows(), buffers_[op.x]->outputs, false);
  linear({scores, op.x, op.router, {}, Activation::kNone, 1.0f, kNone});
  auto choose =
      std::make_unique<RoutePhase>(kernels_, *m.routing, floats(scores), op.normalize, op.jitter);
  choose->reads = {scores};
  choose->writes = {m.routed};
  add_phase("moe choose", std::move(choose));

  const Buffer &x = floats(op.x), &in = *buffers_[m.gathered];
  auto gather = row_phase(in, pool_->threads(),
                          [&k = kernels_, &x, &in, routing = m.routing](const Step&, size_t pair) {
                            std::copy_n(x.row(routing->row_of[pair]), x.width, in.row(pair));
                            if (in.quant != nullptr)
                              in.quantize(k, pair, 0, in.width, in.row(pair));
                          });
  gather->reads = {op.x, m.routed};
  gather->writes = {m.gathered};
  gather->quantizes = true;
  add_phase("moe gather", std::move(gather));
}

void Executor::run_experts(const Mixture& m) {
  const MoeOp& op = m.op;
  const Buffer &in = *buffers_[m.gathered], &mid = *buffers_[m.inner], &last = *buffers_[m.outer];
  std::vector<GatedLinearOp> gated;
  for (size_t e = 0; e < op.gate.size(); ++e)
    gated.push_back({m.inner, m.gathered, op.gate[e], op.up[e], {}, {}, op.activation});
  auto up = expert_phase(
      *m.routing, {op.gate, op.up}, pool_->threads(),
      [&k = kernels_, &in, &mid, gated](size_t e, const TileRange& tiles, size_t row, size_t rows) {
        gated_block(k, gated[e], in, mid, tiles, row, rows);
      });
  auto down = expert_phase(*m.routing, {op.down}, pool_->threads(),
                           [&k = kernels_, &mid, &last, weights = op.down](
                               size_t e, const TileRange& tiles, size_t row, size_t rows) {
                             alignas(64) float acc[kProductsAtOnce * kLanes];
                             matmul(k, *weights[e], tiles, mid, row, rows, acc);
                             for (size_t tile = tiles.begin; tile < tiles.end; ++tile) {
                               const size_t column = tile * kLanes;
                               k.finish(acc + (tile - tiles.begin) * rows * kLanes, rows, nullptr,
                                        Activation::kNone, 1.0f, nullptr, last.row(row) + column,
                                        last.width, std::min(kLanes, last.width - column));
                             }
                           });
  for (size_t e = 0; e < op.gate.size(); ++e) {
    expect(op.gate[e]->rows() == mid.width && op.up[e]->rows() == mid.width &&
               op.down[e]->rows() == last.width,
           "the experts differ in shape");
    read(*up, m.gathered, *op.gate[e]);
    read(*up, m.gathered, *op.up[e]);
    read(*down, m.inner, *op.down[e]);
  }
  up->writes = {m.inner};
  up->quantizes = true;
  down->writes = {m.outer};
  add_phase("moe gated linear " + described(*op.gate[0]), std::move(up));
  add_phase("moe linear " + described(*op.down[0]), std::move(down));
}

// A row's experts, summed in order of score.
void Executor::combine(const Mixture& m) {
  const Buffer &to = *buffers_[m.op.out], &last = floats(m.outer);
  const Buffer* residual = m.op.residual == kNone ? nullptr : &floats(m.op.residual);
  auto phase = row_phase(to, pool_->threads(),
                         [&k = kernels_, &to, &last, residual, routing = m.routing,
                          scale = m.op.scale](const Step&, size_t r) {
                           float* row = to.row(r);
                           std::fill_n(row, to.width, 0.0f);
                           for (size_t i = r * routing->top_k; i < (r + 1) * routing->top_k; ++i)
                             k.add_scaled(row, last.row(routing->pair_of[i]), routing->weight[i],
                                          to.width, row);
                           if (residual != nullptr)
                             k.add_scaled(residual->row(r), row, scale, to.width, row);
                           else if (scale != 1.0f)
                             for (size_t c = 0; c < to.width; ++c) row[c] *= scale;
                         });
  phase->reads = {m.outer, m.routed};
  if (m.op.residual != kNone) phase->reads.push_back(m.op.residual);
  phase->writes = {m.op.out};
  add_phase("moe combine", std::move(phase));
}

void Executor::add(size_t out, size_t a, size_t b, float scale) {
  const Buffer &x = floats(a), &y = floats(b), &to = *buffers_[out];
  expect(x.width == y.width && x.width == to.width, "a sum's inputs differ in width");
  auto phase =
      row_phase(to, pool_->threads(), [&k = kernels_, &x, &y, &to, scale](const Step&, size_t r) {
        k.add_scaled(x.row(r), y.row(r), scale, to.width, to.row(r));
      });
  phase->reads = {a, b};
  phase->writes = {out};
  add_phase("add", std::move(phase));
}

void Executor::softcap(size_t out, size_t x, float cap) {
  const Buffer &from = floats(x), &to = *buffers_[out];
  expect(from.width == to.width && cap > 0.0f, "a softcap must be positive and keep its width");
  auto phase =
      row_phase(to, pool_->threads(), [&k = kernels_, &from, &to, cap](const Step&, size_t r) {
        k.softcap(from.row(r), cap, to.width, to.row(r));
      });
  phase->reads = {x};
  phase->writes = {out};
  add_phase("softcap", std::move(phase));
}

void Executor::gather_rows(size_t out, size_t x) {
  const Buffer &from = floats(x), &to = *buffers_[out];
  expect(from.width == to.width && to.outputs, "gathered rows keep their width");
  auto phase =
      row_phase(to, pool_->threads(), [&k = kernels_, &from, &to](const Step& step, size_t r) {
        std::copy_n(from.row(static_cast<size_t>(step.batch.outputs[r])), to.width, to.row(r));
        if (to.quant != nullptr) to.quantize(k, r, 0, to.width, to.row(r));
      });
  phase->reads = {x};
  phase->writes = {out};
  phase->quantizes = true;
  add_phase("gather rows", std::move(phase));
}

void Executor::gather_columns(size_t out, size_t x, std::vector<uint32_t> order) {
  const Buffer &from = floats(x), &to = *buffers_.at(out);
  expect(to.width == order.size(), "gathered columns are as many as the order has");
  for (const uint32_t column : order)
    expect(column < from.width, "a gathered column is outside its input");
  auto phase =
      row_phase(to, pool_->threads(),
                [&k = kernels_, &from, &to, order = std::move(order)](const Step&, size_t r) {
                  float* row = to.row(r);
                  for (size_t c = 0; c < to.width; ++c) row[c] = from.row(r)[order[c]];
                  if (to.quant != nullptr) to.quantize(k, r, 0, to.width, row);
                });
  phase->reads = {x};
  phase->writes = {out};
  phase->quantizes = true;
  add_phase("gather columns", std::move(phase));
}

// ---- planning ----

void Executor::plan(size_t logits) {
  expect(logits < buffers_.size() && buffers_[logits]->outputs,
         "logits must be rows of the output");
  logits_ = logits;
  buffers_[logits]->kept = buffers_[logits]->wants_float = true;
  add_quantize_phases();
  group_phases();
  layout();
  split_->memory = std::make_unique<Memory>(split_->floats * sizeof(float));
  split_->done = std::vector<std::atomic<size_t>>(AttendPhase::few_tasks(pool_->threads()));
}

namespace {

bool meets(const std::vector<size_t>& a, const std::vector<size_t>& b) {
  return std::find_first_of(a.begin(), a.end(), b.begin(), b.end()) != a.end();
}

}  // namespace

void Executor::add_quantize_phases() {
  std::vector<std::unique_ptr<Phase>> phases;
  for (auto& phase : phases_) {
    const size_t out = phase->writes.at(0);
    const Buffer& value = *buffers_[out];
    const bool missing = value.wants_quant && !phase->quantizes;
    phases.push_back(std::move(phase));
    if (!missing) continue;
    auto extra = row_phase(value, pool_->threads(), [&k = kernels_, &value](const Step&, size_t r) {
      for (size_t c = 0; c < value.width; c += kGroup)
        value.quantize(k, r, c, kGroup, value.row(r) + c);
    });
    extra->name = "quantize";
    extra->reads = extra->writes = {out};
    phases.push_back(std::move(extra));
  }
  phases_ = std::move(phases);
}

void Executor::group_phases() {
  for (const auto& phase : phases_) {
    const bool clash =
        groups_.empty() ||
        std::any_of(groups_.back().begin(), groups_.back().end(), [&](const Phase* before) {
          return meets(phase->reads, before->writes) || meets(phase->writes, before->reads);
        });
    if (clash) groups_.emplace_back();
    groups_.back().push_back(phase.get());
  }
}

void Executor::layout() {
  struct Life {
    size_t first = SIZE_MAX, last = 0, bytes = 0, offset = 0;
  };
  std::vector<Life> lives(buffers_.size());
  for (size_t g = 0; g < groups_.size(); ++g)
    for (const Phase* phase : groups_[g]) {
      for (const size_t v : phase->writes) lives[v].first = std::min(lives[v].first, g);
      for (const auto* side : {&phase->reads, &phase->writes})
        for (const size_t v : *side) lives[v].last = std::max(lives[v].last, g);
    }
  const auto rows = [&](const Buffer& b) {
    return product({b.outputs ? limits_.outputs : limits_.rows, b.multiple});
  };
  size_t end = 0;
  std::vector<size_t> placed;
  for (size_t v = 0; v < buffers_.size(); ++v) {
    const Buffer& b = *buffers_[v];
    Life& life = lives[v];
    if (life.first == SIZE_MAX) continue;
    if (b.kept) life.last = SIZE_MAX;
    const size_t floats = round_up(product({rows(b), b.width, 4}), 64);
    const size_t groups = product({rows(b), b.quant_stride(), sizeof(QuantGroup)});
    life.bytes = floats + (b.wants_quant ? groups : 0);
    // First fit among those alive at the same time, in order of place.
    for (const size_t other : placed) {
      const Life& o = lives[other];
      const bool together = o.first <= life.last && life.first <= o.last;
      if (together && life.offset < o.offset + o.bytes && o.offset < life.offset + life.bytes)
        life.offset = o.offset + o.bytes;
    }
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), v,
                         [&](size_t a, size_t c) { return lives[a].offset < lives[c].offset; }),
        v);
    end = std::max(end, life.offset + life.bytes);
  }
  arena_ = std::make_unique<Memory>(end);
  const size_t regions = ceil_div(limits_.blocks, Plane::kRegion);
  cache_.memory = std::make_unique<Memory>(product({regions, cache_.region_bytes}));
  for (const size_t v : placed) {
    Buffer& b = *buffers_[v];
    b.data = reinterpret_cast<float*>(arena_->data() + lives[v].offset);
    if (b.wants_quant)
      b.quant = reinterpret_cast<QuantGroup*>(arena_->data() + lives[v].offset +
                                              round_up(rows(b) * b.width * 4, 64));
  }
}

// ---- running ----

void Executor::check(const Batch& b) const {
  expect(logits_ != kNone, "the program is not planned");
  const size_t rows = b.rows();
  expect(rows > 0 && rows <= limits_.rows, "too many or no rows in a step");
  expect(b.positions.size() == rows && b.slots.size() == rows,
         "positions or slots differ from rows");
  expect(b.outputs.size() <= limits_.outputs, "too many outputs in a step");
  expect(
      b.bounds.size() >= 2 && b.bounds.front() == 0 && static_cast<size_t>(b.bounds.back()) == rows,
      "sequence bounds must run from 0 to the number of rows");
  expect(std::is_sorted(b.bounds.begin(), b.bounds.end()), "sequence bounds must ascend");
  expect(b.table_width <= b.block_tables.size() &&
             b.block_tables.size() == b.sequences() * b.table_width,
         "one block table a sequence");
  const auto below = [](int32_t x, size_t limit) {
    return x >= 0 && static_cast<size_t>(x) < limit;
  };
  for (size_t s = 0; s < b.sequences(); ++s) {
    const int32_t* table = b.block_tables.data() + s * b.table_width;
    size_t needed = 0;
    for (int32_t r = b.bounds[s]; r < b.bounds[s + 1]; ++r) {
      const size_t row = static_cast<size_t>(r);
      expect(below(b.tokens[row], vocab_in_), "a token id is outside the vocabulary");
      expect(below(b.positions[row], limits_.context), "a position is outside the context");
      expect(r == b.bounds[s] || b.positions[row] == b.positions[row - 1] + 1,
             "positions of a sequence must ascend by one");
      const size_t block = static_cast<size_t>(b.positions[row]) / limits_.block_size;
      expect(block < b.table_width, "a block table is shorter than its sequence");
      expect(below(table[block], limits_.blocks), "a block is outside the KV cache");
      const size_t slot = static_cast<size_t>(table[block]) * limits_.block_size +
                          static_cast<size_t>(b.positions[row]) % limits_.block_size;
      expect(b.slots[row] >= 0 && static_cast<size_t>(b.slots[row]) == slot,
             "a slot is not its position's place in the block table");
      needed = block + 1;
    }
    for (size_t i = 0; i < needed; ++i)
      expect(below(table[i], limits_.blocks), "a block is outside the KV cache");
  }
  for (const int32_t row : b.outputs) expect(below(row, rows), "an output row is outside the step");
}

// Cuts the rows into attention tasks: enough for all threads, and long ones, as a task reads its
// context once.
Step Executor::prepare(const Batch& b) const {
  size_t heads = SIZE_MAX;
  for (const CacheLayer& layer : cache_.layers) heads = std::min(heads, layer.kv_heads);
  const size_t tasks = cache_.layers.empty() ? 0 : b.rows() * heads;
  Step step{b, {}, std::clamp(tasks / (4 * pool_->threads()), size_t{1}, kRowsOfAttention), 0};
  for (size_t s = 0; s < b.sequences(); ++s) {
    const size_t begin = static_cast<size_t>(b.bounds[s]);
    const size_t end = static_cast<size_t>(b.bounds[s + 1]);
    for (size_t r = begin; r < end; r += step.rows_a_run)
      step.runs.push_back({s, r, std::min(end, r + step.rows_a_run)});
    if (begin < end)
      step.context = std::max(step.context, static_cast<size_t>(b.positions[end - 1]) + 1);
  }
  return step;
}

void Executor::step(const Batch& batch, float* logits) {
  const std::lock_guard lock(mutex_);
  check(batch);
  split_->clear();
  run_groups(prepare(batch));
  tokens_seen_ = batch.rows();
  outputs_seen_ = batch.outputs.size();
  std::copy_n(buffers_[logits_]->data, outputs_seen_ * buffers_[logits_]->width, logits);
}

void Executor::run_groups(const Step& step) {
  std::vector<size_t> totals;
  for (const auto& group : groups_) {
    size_t total = 0;
    for (const Phase* phase : group) total += phase->tasks(step);
    totals.push_back(total);
  }
  const auto run = [&](size_t group, size_t i) {
    auto phase = groups_[group].begin();
    for (size_t tasks; i >= (tasks = (*phase)->tasks(step)); ++phase) i -= tasks;
    (*phase)->run(step, i);
    return *phase;
  };
  if (!profiling_) return pool_->run(totals, run);
  const int64_t start = now_ns();
  pool_->run(totals, [&](size_t group, size_t i) {
    const int64_t begin = now_ns();
    Phase* const phase = run(group, i);
    phase->timing.add(begin, now_ns());
  });
  account(step, start);
}

void Executor::account(const Step& step, int64_t start_ns) {
  const double threads = static_cast<double>(pool_->threads());
  for (const auto& group : groups_) {
    int64_t busy = 0, end = start_ns;
    for (const Phase* phase : group) {
      busy += phase->timing.busy;
      end = std::max(end, phase->timing.last.load());
    }
    for (Phase* phase : group) {
      const double own = static_cast<double>(phase->timing.busy.exchange(0)) * 1e-9;
      const double share = busy == 0 ? 0 : own * 1e9 / static_cast<double>(busy);
      const double seconds = static_cast<double>(end - start_ns) * 1e-9 * share;
      PhaseProfile& sum = phase->timing.sum;
      sum.seconds += seconds;
      sum.waiting += seconds - own / threads;
      sum.work += phase->work(step);
    }
    start_ns = end;
  }
}

void Executor::profile(bool on) {
  const std::lock_guard lock(mutex_);
  profiling_ = on;
  if (on)
    for (const auto& phase : phases_) phase->timing.sum = {};
}

std::vector<PhaseProfile> Executor::profiled() const {
  const std::lock_guard lock(mutex_);
  std::vector<PhaseProfile> all;
  for (const auto& phase : phases_) {
    all.push_back(phase->timing.sum);
    all.back().name = phase->name;
  }
  return all;
}

std::vector<float> Executor::value(size_t id, size_t* rows) const {
  const std::lock_guard lock(mutex_);
  expect(id < buffers_.size() && buffers_[id]->kept && buffers_[id]->data != nullptr,
         "only a kept value can be read after a step");
  const Buffer& b = *buffers_[id];
  *rows = (b.outputs ? outputs_seen_ : tokens_seen_) * b.multiple;
  return {b.data, b.data + *rows * b.width};
}

double linear_alone(const Kernels& kernels, ThreadPool& pool, const Tile& tile,
                    std::span<const float> x, size_t rows, float* out, size_t passes) {
  Buffer in, to;
  in.width = tile.cols();
  to.width = tile.rows();
  to.data = out;
  const Memory floats(rows * in.width * 4);
  const Memory groups(rows * in.quant_stride() * sizeof(QuantGroup));
  in.data = reinterpret_cast<float*>(floats.data());
  in.quant = reinterpret_cast<QuantGroup*>(groups.data());
  std::copy(x.begin(), x.end(), in.data);

  const std::vector<int32_t> tokens(rows);
  const Step step{Batch{tokens, {}, {}, {}, {}, {}, 0}, {}, 1, 0};
  const auto quantize = row_phase(in, pool.threads(), [&](const Step&, size_t r) {
    in.quantize(kernels, r, 0, in.width, in.row(r));
  });
  LinearOp op{0, 0, TilePtr(TilePtr(), &tile), {}};
  LinearPhase multiply(kernels, pool.threads(), std::move(op), in, to, nullptr);
  const size_t totals[] = {tile.is_integer() ? quantize->tasks(step) : 0, multiply.tasks(step)};
  int64_t best = INT64_MAX;
  for (size_t pass = 0; pass < passes; ++pass) {
    const int64_t start = now_ns();
    pool.run(totals, [&](size_t stage, size_t i) {
      (stage == 0 ? static_cast<Phase&>(*quantize) : multiply).run(step, i);
    });
    best = std::min(best, now_ns() - start);
  }
  return static_cast<double>(best) * 1e-9;
}

}  // namespace squall
