#include "executor.h"

#include <numeric>
#include <stdexcept>

#include "phases.h"

namespace squall {
namespace {

constexpr size_t kRowsOfAttention = 48;  // rows of a sequence in one attention task

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

bool meets(const std::vector<size_t>& a, const std::vector<size_t>& b) {
  return std::find_first_of(a.begin(), a.end(), b.begin(), b.end()) != a.end();
}

void join(std::vector<size_t>& to, const std::vector<size_t>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

constexpr const char* kUnlikeExperts = "the experts differ in shape";

// The values of one of several that follow each other; nothing of nothing.
Vector part(const Vector& all, size_t index, size_t parts) {
  const auto size = static_cast<ptrdiff_t>(all.size() / parts);
  const auto begin = all.begin() + static_cast<ptrdiff_t>(index) * size;
  return {begin, begin + size};
}

// Of [distances][heads] those of each head by distance, with more of the outermost on both sides.
Vector spread(const Vector& relative, const std::vector<uint32_t>& buckets, size_t heads) {
  expect(heads > 0 && relative.size() % heads == 0 && buckets.size() % 2 == 1 &&
             *std::max_element(buckets.begin(), buckets.end()) < relative.size() / heads,
         "relative positions are of an odd number of distances, each of them there");
  Vector all;
  for (size_t head = 0; head < heads; ++head)
    for (size_t i = 0; i < buckets.size() + 2 * kLanes; ++i) {
      const size_t at = std::clamp(i, kLanes, buckets.size() - 1 + kLanes) - kLanes;
      all.push_back(relative[buckets[at] * heads + head]);
    }
  return all;
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
  expect(limits.blocks > 0 && !limits.rows.empty() &&
             *std::min_element(limits.rows.begin(), limits.rows.end()) > 0,
         "limits must be positive");
  expect(limits.block_size > 0 && limits.block_size % kLanes == 0 && limits.block_size <= 1024,
         "block_size must be a multiple of 16, at most 1024");
  expect(limits.blocks <= size_t{INT32_MAX} / limits.block_size, "too many KV blocks");
  expect(std::max(limits.context, *std::max_element(limits.rows.begin(), limits.rows.end())) <=
             size_t{INT32_MAX},
         "rows and context must be below 2^31");
}

Executor::~Executor() = default;

size_t Executor::add_value(size_t width, size_t space, bool kept, size_t multiple) {
  expect(width > 0 && width < size_t{1} << 28, "a value's width is out of range");
  expect(space < limits_.rows.size(), "a value is in a row space that does not exist");
  auto buffer = std::make_unique<Buffer>();
  buffer->width = width;
  buffer->space = space;
  buffer->kept = buffer->wants_float = kept;
  buffer->multiple = multiple;
  buffers_.push_back(std::move(buffer));
  return buffers_.size() - 1;
}

size_t Executor::add_index(size_t space, size_t axes) {
  expect(space < limits_.rows.size() && axes > 0, "an index needs a row space and an axis");
  indices_.push_back({space, axes});
  return indices_.size() - 1;
}

void Executor::add_cache(size_t kv_heads, size_t head_dim) {
  add_layer(cache_, kv_heads, head_dim, cache_.region_bytes);
}

void Executor::add_memory(size_t kv_heads, size_t head_dim) {
  add_layer(recalled_, kv_heads, head_dim, recalled_.region_bytes);
}

void Executor::add_layer(KvCache& cache, size_t kv_heads, size_t head_dim, size_t keys) {
  expect(kv_heads > 0 && head_dim > 0 && head_dim <= kMaxHeadDim, "head_dim must be 1 to 512");
  const size_t slots = product({Plane::kRegion, limits_.block_size, kv_heads});
  const size_t values = keys + product({slots, key_bytes(limits_.cache, head_dim)});
  const size_t end = values + product({slots, value_bytes(limits_.cache, head_dim)});
  cache.layers.push_back({kv_heads, head_dim, keys, values});
  cache.region_bytes = std::max(cache.region_bytes, end);
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

const Buffer& Executor::one_row(size_t id, size_t column, size_t columns) {
  const Buffer& value = floats(id);
  expect(column <= value.width && columns <= value.width - column,
         "columns of a gate or a modulation are not there");
  single_.push_back(value.space);
  return value;
}

void Executor::read(Phase& phase, size_t x, const Tile& weight) {
  expect(buffers_[x]->width == weight.cols(), "a linear's input and weight differ in width");
  phase.reads.push_back(x);
  (weight.is_integer() ? buffers_[x]->wants_quant : buffers_[x]->wants_float) = true;
}

Executor::Added Executor::adapt(const AdaptersOp& op, size_t first, size_t experts, size_t rows,
                                size_t x, const Routing* routing) {
  if (!op.any()) return {};
  Index& mixture = indices_.at(op.mixture);
  const Buffer& to = *buffers_.at(rows);
  expect(mixture.space == to.space && (op.columns.empty() == (op.scalings == kNone)),
         "adapters are chosen by other rows, or scaled without scalings");
  mixture.mixtures = true;
  const Buffer* scalings = op.scalings == kNone ? nullptr : &floats(op.scalings);
  expect(
      scalings == nullptr || (scalings->space == to.space && op.columns.size() >= first + experts),
      "scalings are of other rows, or lack a column");
  low_ranks_.push_back(std::make_unique<LowRank>(
      kernels_, op, first, experts, to, x == kNone ? nullptr : &floats(x), scalings, routing));
  auto phase = std::make_unique<DownPhase>(*low_ranks_.back(), pool_->threads());
  if (x != kNone) phase->reads.push_back(x);
  if (scalings != nullptr) phase->reads.push_back(op.scalings);
  const size_t value = add_value(1, to.space, false);
  phase->writes = {value};
  phase->name = "adapters";
  const auto writes = [&](const auto& before) { return meets(before->writes, phase->reads); };
  const auto last = std::find_if(phases_.rbegin(), phases_.rend(), writes);
  phases_.insert(last.base(), std::move(phase));
  std::vector<size_t> reads = {value};
  if (x != kNone) reads.push_back(x);  // by terms without an `a`
  if (scalings != nullptr) reads.push_back(op.scalings);
  return {low_ranks_.back().get(), std::move(reads)};
}

void Executor::input(size_t out) {
  const Buffer& to = *buffers_.at(out);
  auto phase =
      row_phase(to, pool_->threads(), [&to, number = inputs_.size()](const Step& step, size_t r) {
        std::copy_n(step.inputs.values[number] + r * to.width, to.width, to.row(r));
      });
  phase->writes = {out};
  add_phase("input", std::move(phase));
  inputs_.push_back(out);
}

void Executor::embed(size_t out, size_t index, TilePtr table, float scale,
                     const AdaptersOp& adapters) {
  const Buffer& to = *buffers_.at(out);
  expect(to.width == table->cols(), "the embedding's width differs from its table's");
  expect(indices_.at(index).space == to.space, "an embedding's index is of other rows");
  indices_[index].limit = std::min(indices_[index].limit, table->rows());
  const uint64_t row_bytes = table->nbytes() / table->rows();
  const Added added = adapt(adapters, 0, 1, out, kNone);
  auto phase =
      row_phase(to, pool_->threads(),
                [&to, index, table, scale, sums = added.sums](const Step& step, size_t r) {
                  float* row = to.row(r);
                  table->dequantize_row(static_cast<size_t>(step.inputs.indices[index][r]), row);
                  if (sums != nullptr && sums->active())
                    for (size_t i = 0; i < to.width; i += kLanes) {
                      const size_t n = std::min(kLanes, to.width - i);
                      alignas(64) float lanes[kLanes] = {};
                      std::copy_n(row + i, n, lanes);
                      sums->add(step, i / kLanes, 1, r, 1, lanes);
                      std::copy_n(lanes, n, row + i);
                    }
                  if (scale != 1.0f)
                    for (size_t i = 0; i < to.width; ++i) row[i] *= scale;
                });
  phase->reads = added.reads;
  phase->writes = {out};
  phase->row_work.bytes = row_bytes;
  add_phase("embed", std::move(phase));
}

void Executor::rope_angles(size_t out, size_t positions, Vector frequencies,
                           std::vector<size_t> axes, float magnitude) {
  const Buffer& to = *buffers_.at(out);
  const Index& index = indices_.at(positions);
  expect(to.width == 2 * frequencies.size() && axes.size() == frequencies.size(),
         "angles are twice as wide as the frequencies, each with its axis");
  expect(index.space == to.space, "positions are of other rows");
  for (const size_t axis : axes) expect(axis < index.axes, "a frequency's axis does not exist");
  auto phase =
      row_phase(to, pool_->threads(),
                [&to, positions, frequencies, axes, magnitude](const Step& step, size_t r) {
                  const size_t n = frequencies.size(), rows = step.rows_of(to);
                  const int32_t* at = step.inputs.indices[positions].data() + r;
                  for (size_t i = 0; i < n; ++i) {
                    const float angle = static_cast<float>(at[axes[i] * rows]) * frequencies[i];
                    const double exact = static_cast<double>(angle);
                    to.row(r)[i] = static_cast<float>(std::cos(exact)) * magnitude;
                    to.row(r)[n + i] = static_cast<float>(std::sin(exact)) * magnitude;
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

void Executor::group_normalize(GroupNormalizeOp op) {
  const Buffer &x = floats(op.x), &to = *buffers_[op.out];
  expect(x.width == to.width && x.space == to.space && op.groups > 0 && x.width % op.groups == 0 &&
             op.weight.size() == x.width && op.bias.size() == x.width,
         "a group norm's groups or weights do not fit its input");
  const size_t in = op.x, out = op.out, sums = split(x.space);
  const auto moments =
      std::make_shared<Moments>(std::move(op), x, limits_.rows[x.space] * x.multiple, *split_);
  const auto blocks = [&x](const Step& step) { return ceil_div(step.rows_of(x), Moments::kRows); };
  auto blockwise = task_phase(blocks, [&k = kernels_, moments](const Step& step, size_t block) {
    moments->block(k, step, block);
  });
  blockwise->reads = {in};
  blockwise->writes = {sums};
  add_phase("group norm moments", std::move(blockwise));
  auto merge =
      task_phase([&x, groups = moments->op.groups](
                     const Step& step) { return step.rows_of(x) > 0 ? groups : 0; },
                 [moments](const Step& step, size_t group) { moments->merge(step, group); });
  merge->reads = merge->writes = {sums};
  add_phase("group norm merge", std::move(merge));
  auto phase =
      row_phase(to, pool_->threads(), [&k = kernels_, &x, &to, moments](const Step&, size_t r) {
        k.scale_columns(x.row(r), moments->means(), moments->factors(), moments->op.bias.data(),
                        moments->op.activation, to.width, to.row(r));
        if (to.quant != nullptr) to.quantize(k, r, 0, to.width, to.row(r));
      });
  phase->reads = {in, sums};
  phase->replaces = in;
  phase->writes = {out};
  phase->quantizes = true;
  add_phase("group norm", std::move(phase));
}

void Executor::linear(LinearOp op) {
  const Buffer& to = *buffers_[op.out];
  expect(to.width == op.weight->rows() && (op.bias.empty() || op.bias.size() == to.width),
         "a linear's weight or bias does not fit its output");
  const Buffer* residual = op.residual == kNone ? nullptr : &floats(op.residual);
  expect(residual == nullptr || residual->width == to.width, "a residual differs in width");
  if (op.taps != kNone) return convolution(std::move(op), residual);
  const size_t out = op.out, in = op.x, rest = op.residual;
  const TilePtr weight = op.weight;
  const Added added = adapt(op.adapters, 0, 1, out, op.adapters.x);
  auto phase = std::make_unique<LinearPhase>(kernels_, pool_->threads(), std::move(op),
                                             *buffers_[in], to, residual, added.sums);
  read(*phase, in, *weight);
  join(phase->reads, added.reads);
  if (rest != kNone) phase->reads.push_back(rest);
  phase->replaces = rest;
  phase->writes = {out};
  add_phase("linear " + described(*weight), std::move(phase));
}

void Executor::convolution(LinearOp op, const Buffer* residual) {
  const Buffer &x = *buffers_.at(op.x), &to = *buffers_[op.out];
  const Tile& weight = *op.weight;
  expect(weight.cols() == product({choosing(op.taps, x, to, true).axes, x.width}),
         "a convolution's weight has not the columns of its taps");
  expect(!op.adapters.any(), "a convolution has no adapters");
  expect(!weight.is_integer() || x.width % kGroup == 0,
         "of int8 a tap has columns in multiples of 32");
  (weight.is_integer() ? buffers_[op.x]->wants_quant : buffers_[op.x]->wants_float) = true;
  std::vector<size_t> reads = {op.x}, writes = {op.out};
  if (residual != nullptr) reads.push_back(op.residual);
  const size_t rest = op.residual;
  std::string name = "convolution " + described(weight);
  auto phase = std::make_unique<ConvolutionPhase>(kernels_, pool_->threads(), std::move(op), x, to,
                                                  residual);
  phase->reads = std::move(reads);
  phase->writes = std::move(writes);
  phase->replaces = rest;
  add_phase(std::move(name), std::move(phase));
}

void Executor::gated_linear(GatedLinearOp op) {
  const Buffer& to = *buffers_[op.out];
  expect(to.width == op.gate->rows() && to.width == op.up->rows(), "gate and up differ in shape");
  expect((op.gate_bias.empty() || op.gate_bias.size() == to.width) &&
             (op.up_bias.empty() || op.up_bias.size() == to.width),
         "a gated linear's bias does not fit");
  const size_t out = op.out, in = op.x;
  const TilePtr gate = op.gate, up = op.up;
  const size_t x = op.adapters.x;
  const Added to_gate = adapt(op.adapters, 0, 1, out, x), to_up = adapt(op.adapters, 1, 1, out, x);
  auto phase =
      std::make_unique<GatedLinearPhase>(kernels_, pool_->threads(), std::move(op), *buffers_[in],
                                         to, GatedAdded{to_gate.sums, to_up.sums});
  read(*phase, in, *gate);
  read(*phase, in, *up);
  for (const Added* added : {&to_gate, &to_up}) join(phase->reads, added->reads);
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

size_t Executor::sight_of(const AttendOp& op, Keys keys, size_t from) {
  const size_t space = buffers_.at(op.q)->space;
  expect(indices_.at(op.spans).space == space && indices_[op.spans].axes == 2,
         "attention's spans are a begin and an end for each of its rows");
  for (size_t i = 0; i < sights_.size(); ++i) {
    Sight& s = sights_[i];
    if (s.spans != op.spans || s.keys != keys || s.from != from) continue;
    s.kv_heads = std::min(s.kv_heads, op.kv_heads);
    return i;
  }
  sights_.push_back({op.spans, space, keys, from, op.kv_heads});
  return sights_.size() - 1;
}

void Executor::add_attend(const AttendOp& op, Keys keys, size_t from, size_t stored) {
  const KvCache& cache = keys == Keys::kCached  ? cache_
                         : keys == Keys::kOfRun ? uncached_
                                                : recalled_;
  const Buffer &q = *buffers_.at(op.q), &out = *buffers_.at(op.out);
  expect(op.cache < cache.layers.size(), "attention names a cache that does not exist");
  const CacheLayer& layer = cache.layers[op.cache];
  expect(op.kv_heads == layer.kv_heads && op.head_dim == layer.head_dim &&
             op.heads % op.kv_heads == 0 && q.width == product({op.heads, op.head_dim}) &&
             out.width == q.width && out.space == q.space,
         "attention's heads or rows do not fit its inputs or its cache");
  const size_t sums = split(q.space);
  auto phase =
      std::make_unique<AttendPhase>(kernels_, pool_->threads(), limits_, op,
                                    sight_of(op, keys, from), cache, floats(op.q), out, *split_);
  phase->reads = {op.q, sums};
  if (stored != kNone) phase->reads.push_back(stored);
  phase->writes = {op.out, sums};
  phase->quantizes = op.head_dim % kGroup == 0;
  add_phase(keys == Keys::kRecalled ? "recall" : "attend", std::move(phase));
}

size_t Executor::split(size_t space) {
  if (split_value_ == kNone) split_value_ = add_value(1, space, false);
  return split_value_;
}

void Executor::attend(AttendOp op) {
  if (op.k == kNone) return add_attend(op, Keys::kRecalled, kNone, kNone);
  const bool cached = op.cache != kNone;
  if (!op.relative.empty()) {
    expect(!cached, "positions are relative without a cache only");
    op.by_head = spread(op.relative, op.buckets, op.heads);
  }
  const size_t space = buffers_.at(op.k)->space;
  if (!cached) {
    op.cache = uncached_.layers.size();
    add_layer(uncached_, op.kv_heads, op.head_dim, 0);
    uncached_rows_ = std::max(uncached_rows_, limits_.rows[space]);
  }
  expect(buffers_[op.k]->width == product({op.kv_heads, op.head_dim}) &&
             buffers_.at(op.v)->width == buffers_[op.k]->width && buffers_[op.v]->space == space,
         "attention's keys and values do not fit its heads");
  expect(!cached || space == buffers_.at(op.q)->space,
         "cached keys are of other rows than queries");
  expect(!cached || op.cache < cache_.layers.size(), "attention names a cache that does not exist");
  op.window = std::min(op.window, size_t{INT32_MAX});
  // The cache has no buffer; this value stands for it, so that the reader waits for the writer,
  // and without a cache the next writer for the reader.
  const size_t stored =
      cached || uncached_key_ == kNone ? add_value(1, space, false) : uncached_key_;
  if (!cached) uncached_key_ = stored;
  auto store = std::make_unique<StorePhase>(kernels_, limits_, cached ? cache_ : uncached_,
                                            op.cache, cached, floats(op.k), floats(op.v));
  store->reads = {op.k, op.v};
  store->writes = {stored};
  add_phase("store", std::move(store));
  const auto keys = cached ? Keys::kCached : Keys::kOfRun;
  add_attend(op, keys, cached ? kNone : space, stored);
}

void Executor::mixture_of_experts(MoeOp op) {
  const size_t experts = op.up.size(), hidden = buffers_[op.x]->width;
  expect(op.top_k > 0 && op.top_k <= experts && (op.gate.empty() || op.gate.size() == experts) &&
             op.down.size() == experts && op.router->rows() == experts,
         "a mixture's experts do not fit");
  const size_t space = buffers_[op.x]->space, width = op.up[0]->rows();
  const auto fits = [&](const Vector& biases, size_t size) {
    return biases.empty() || biases.size() == product({experts, size});
  };
  expect(fits(op.router_bias, 1) && fits(op.gate_bias, width) && fits(op.up_bias, width) &&
             fits(op.down_bias, hidden),
         "a mixture's biases do not fit");
  if (op.shared != kNone) {
    expect(indices_.at(op.shared).space == space && op.top_k == 1,
           "rows that share are other rows, or have several experts");
    indices_[op.shared].shared = true;
  }
  Mixture m{op, std::make_shared<Routing>(limits_.rows[space], experts, op.top_k)};
  m.routed = add_value(1, space, false);
  m.gathered = add_value(hidden, space, false, op.top_k);
  m.inner = add_value(width, space, false, op.top_k);
  m.outer = add_value(hidden, space, false, op.top_k);
  route(m);
  run_experts(m);
  combine(m);
}

// Scores, each row's experts, and the rows sorted by expert.
void Executor::route(const Mixture& m) {
  const MoeOp& op = m.op;
  const size_t scores = add_value(op.router->rows(), buffers_[op.x]->space, false);
  linear({scores, op.x, op.router, op.router_bias, Activation::kNone, 1.0f, kNone, op.adapters});
  auto choose = std::make_unique<RoutePhase>(kernels_, *m.routing, floats(scores), op.normalize,
                                             op.jitter, op.shared);
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
  const Buffer &in = *buffers_[m.gathered], &mid = *buffers_[m.inner];
  const size_t experts = op.up.size();
  if (op.gate.empty()) {
    expert_linear(m, op.up, op.up_bias, op.activation, m.gathered, m.inner, 1);
  } else {
    std::vector<GatedLinearOp> gated;
    for (size_t e = 0; e < experts; ++e)
      gated.push_back({m.inner,
                       m.gathered,
                       op.gate[e],
                       op.up[e],
                       part(op.gate_bias, e, experts),
                       part(op.up_bias, e, experts),
                       op.activation,
                       {}});
    const auto adapted = [&](size_t first) {
      return adapt(op.adapters, first, experts, m.gathered, m.gathered, m.routing.get());
    };
    const Added to_gate = adapted(1), to_up = adapted(1 + experts);
    auto up = expert_phase(
        *m.routing, {op.gate, op.up}, pool_->threads(),
        [&k = kernels_, &in, &mid, gated, added = GatedAdded{to_gate.sums, to_up.sums}](
            const Step& step, size_t e, const TileRange& tiles, size_t row, size_t rows) {
          gated_block(k, gated[e], in, mid, step, added, tiles, row, rows);
        });
    up->writes = {m.inner};
    up->quantizes = true;
    for (size_t e = 0; e < experts; ++e) {
      expect(op.gate[e]->rows() == mid.width && op.up[e]->rows() == mid.width, kUnlikeExperts);
      read(*up, m.gathered, *op.gate[e]);
      read(*up, m.gathered, *op.up[e]);
    }
    for (const Added* added : {&to_gate, &to_up}) join(up->reads, added->reads);
    add_phase("moe gated linear " + described(*op.gate[0]), std::move(up));
  }
  const size_t first = 1 + op.gate.size() + experts;
  expert_linear(m, op.down, op.down_bias, Activation::kNone, m.inner, m.outer, first);
}

void Executor::expert_linear(const Mixture& m, const std::vector<TilePtr>& weights,
                             const Vector& biases, Activation activation, size_t x, size_t out,
                             size_t first) {
  const size_t experts = weights.size();
  const Buffer &from = *buffers_[x], &to = *buffers_[out];
  const Added added = adapt(m.op.adapters, first, experts, x, x, m.routing.get());
  std::vector<LinearOp> linears;
  for (size_t e = 0; e < experts; ++e)
    linears.push_back({out, x, weights[e], part(biases, e, experts), activation, 1.0f, kNone, {}});
  auto phase = expert_phase(
      *m.routing, {weights}, pool_->threads(),
      [&k = kernels_, &from, &to, linears, sums = added.sums](
          const Step& step, size_t e, const TileRange& tiles, size_t row, size_t rows) {
        linear_block(k, linears[e], from, to, nullptr, step, sums, tiles, row, rows);
      });
  for (const TilePtr& weight : weights) {
    expect(weight->rows() == to.width, kUnlikeExperts);
    read(*phase, x, *weight);
  }
  join(phase->reads, added.reads);
  phase->writes = {out};
  add_phase("moe linear " + described(*weights[0]), std::move(phase));
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

void Executor::add(AddOp op) {
  const Buffer &x = floats(op.a), &y = floats(op.b), &to = *buffers_.at(op.out);
  expect(x.width == y.width && x.width == to.width && x.space == to.space && y.space == to.space,
         "a sum's inputs differ in width or rows");
  const Buffer* gate = op.gate == kNone ? nullptr : &one_row(op.gate, op.column, to.width);
  auto phase = row_phase(
      to, pool_->threads(), [&k = kernels_, &x, &y, &to, gate, op](const Step&, size_t r) {
        const float* by = gate == nullptr ? nullptr : gate->data + op.column;
        k.add_gated(x.row(r), y.row(r), op.scale, by, op.activation, to.width, to.row(r));
        to.quantize_groups(k, r);
      });
  phase->reads = {op.a, op.b};
  if (gate != nullptr) phase->reads.push_back(op.gate);
  phase->writes = {op.out};
  phase->quantizes = true;
  add_phase("add", std::move(phase));
}

void Executor::modulate(ModulateOp op) {
  const Buffer &x = floats(op.x), &to = *buffers_.at(op.out);
  expect(x.width == to.width && x.space == to.space, "a modulation keeps its rows and width");
  const Buffer& by = one_row(op.by, std::max(op.shift, op.scale), to.width);
  auto phase =
      row_phase(to, pool_->threads(), [&k = kernels_, &x, &to, &by, op](const Step&, size_t r) {
        auto* const weight = static_cast<float*>(thread_memory(to.width * sizeof(float)));
        for (size_t i = 0; i < to.width; ++i) weight[i] = 1.0f + by.data[op.scale + i];
        k.layer_norm(x.row(r), to.width, to.width, weight, by.data + op.shift, op.eps, to.row(r));
        if (to.quant != nullptr) to.quantize(k, r, 0, to.width, to.row(r));
      });
  phase->reads = {op.x, op.by};
  phase->writes = {op.out};
  phase->quantizes = true;
  add_phase("modulate", std::move(phase));
}

void Executor::concatenate_rows(size_t out, size_t a, size_t b) {
  const Buffer &first = floats(a), &second = floats(b), &to = *buffers_.at(out);
  expect(first.width == to.width && second.width == to.width,
         "rows one after another are equally wide");
  joined_.push_back({to.space, first.space, second.space});
  auto phase = row_phase(
      to, pool_->threads(), [&k = kernels_, &first, &second, &to](const Step& step, size_t r) {
        const size_t rows = step.rows_of(first);
        std::copy_n(r < rows ? first.row(r) : second.row(r - rows), to.width, to.row(r));
        if (to.quant != nullptr) to.quantize(k, r, 0, to.width, to.row(r));
      });
  phase->reads = {a, b};
  phase->writes = {out};
  phase->quantizes = true;
  add_phase("concatenate rows", std::move(phase));
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

Executor::Index& Executor::choosing(size_t index, const Buffer& from, const Buffer& to,
                                    bool overlays) {
  Index& i = indices_.at(index);
  expect(i.space == to.space, "the index of gathered rows is of other rows");
  expect(i.into == kNone || (i.into == from.space && i.overlays == overlays),
         "an index chooses rows of two spaces, or is to choose none and some");
  i.into = from.space;
  i.overlays = overlays;
  return i;
}

void Executor::gather_rows(size_t out, size_t x, size_t index, bool mean) {
  const Buffer &from = floats(x), &to = *buffers_.at(out);
  const size_t axes = choosing(index, from, to, false).axes;
  expect(to.width == product({from.width, mean ? 1 : axes}),
         "gathered rows lie side by side, or their mean is as wide as one");
  auto phase = row_phase(
      to, pool_->threads(),
      [&k = kernels_, &from, &to, index, axes, mean](const Step& step, size_t r) {
        const size_t rows = step.rows_of(to);
        float* const row = to.row(r);
        for (size_t axis = 0; axis < axes; ++axis) {
          const size_t chosen = static_cast<size_t>(step.inputs.indices[index][axis * rows + r]);
          if (mean && axis > 0)
            k.add_scaled(row, from.row(chosen), 1.0f, to.width, row);
          else
            std::copy_n(from.row(chosen), from.width, row + axis * from.width);
        }
        if (mean)
          for (size_t i = 0; i < to.width; ++i) row[i] *= 1.0f / static_cast<float>(axes);
        if (to.quant != nullptr) to.quantize(k, r, 0, to.width, row);
      });
  phase->reads = {x};
  phase->writes = {out};
  phase->quantizes = true;
  add_phase("gather rows", std::move(phase));
}

void Executor::overlay(size_t out, size_t x, size_t rows, size_t index) {
  const Buffer &under = floats(x), &over = floats(rows), &to = *buffers_.at(out);
  expect(choosing(index, over, to, true).axes == 1 && under.space == to.space &&
             under.width == to.width && over.width == to.width,
         "an overlay's rows differ in width, or lie over rows of another space");
  auto phase = row_phase(to, pool_->threads(),
                         [&k = kernels_, &under, &over, &to, index](const Step& step, size_t r) {
                           const int32_t row = step.inputs.indices[index][r];
                           std::copy_n(row < 0 ? under.row(r) : over.row(static_cast<size_t>(row)),
                                       to.width, to.row(r));
                           if (to.quant != nullptr) to.quantize(k, r, 0, to.width, to.row(r));
                         });
  phase->reads = {x, rows};
  phase->writes = {out};
  phase->quantizes = true;
  add_phase("overlay", std::move(phase));
}

void Executor::concatenate(size_t out, size_t a, size_t b) {
  const Buffer &first = floats(a), &second = floats(b), &to = *buffers_.at(out);
  expect(
      first.space == to.space && second.space == to.space && first.width + second.width == to.width,
      "rows side by side are as wide as both");
  auto phase =
      row_phase(to, pool_->threads(), [&k = kernels_, &first, &second, &to](const Step&, size_t r) {
        float* row = to.row(r);
        std::copy_n(first.row(r), first.width, row);
        std::copy_n(second.row(r), second.width, row + first.width);
        if (to.quant != nullptr) to.quantize(k, r, 0, to.width, row);
      });
  phase->reads = {a, b};
  phase->writes = {out};
  phase->quantizes = true;
  add_phase("concatenate", std::move(phase));
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

void Executor::plan(const std::vector<size_t>& outputs, int64_t adapted) {
  layout_ = adapted;
  for (const size_t value : outputs) buffers_.at(value)->kept = buffers_[value]->wants_float = true;
  outputs_ = outputs;
  planned_ = true;
  add_quantize_phases();
  group_phases();
  layout();
  split_->memory = std::make_unique<Memory>(split_->floats * sizeof(float));
  split_->done = std::vector<std::atomic<size_t>>(AttendPhase::few_tasks(pool_->threads()));
}

void Executor::add_quantize_phases() {
  std::vector<std::unique_ptr<Phase>> phases;
  for (auto& phase : phases_) {
    const size_t out = phase->writes.at(0);
    const Buffer& value = *buffers_[out];
    const bool missing = value.wants_quant && !phase->quantizes;
    phases.push_back(std::move(phase));
    if (!missing) continue;
    auto extra = row_phase(value, pool_->threads(), [&k = kernels_, &value](const Step&, size_t r) {
      value.quantize_groups(k, r);
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

// Values with one place: those that may be written over each other become one life.
std::vector<size_t> Executor::joined(std::vector<Life>& lives) const {
  std::vector<size_t> owner(lives.size());
  std::iota(owner.begin(), owner.end(), size_t{0});
  for (size_t g = 0; g < groups_.size(); ++g)
    for (const Phase* phase : groups_[g]) {
      const size_t x = phase->replaces, out = phase->writes[0];
      if (x == kNone || lives[x].last != g || lives[out].first != g) continue;
      ptrdiff_t uses = 0;
      for (const Phase* any : groups_[g])
        for (const auto* side : {&any->reads, &any->writes})
          uses += std::count(side->begin(), side->end(), x);
      const Buffer &a = *buffers_[x], &b = *buffers_[out];
      if (uses != 1 || a.width != b.width || a.space != b.space || a.multiple != b.multiple)
        continue;
      owner[out] = owner[x];
      Life& life = lives[owner[x]];
      life.last = std::max(life.last, lives[out].last);
      life.bytes = std::max(life.bytes, lives[out].bytes);
    }
  return owner;
}

void Executor::layout() {
  std::vector<Life> lives(buffers_.size());
  for (size_t g = 0; g < groups_.size(); ++g)
    for (const Phase* phase : groups_[g]) {
      for (const size_t v : phase->writes) lives[v].first = std::min(lives[v].first, g);
      for (const auto* side : {&phase->reads, &phase->writes})
        for (const size_t v : *side) lives[v].last = std::max(lives[v].last, g);
    }
  const auto float_bytes = [&](const Buffer& b) {
    return round_up(product({limits_.rows[b.space], b.multiple, b.width, 4}), 64);
  };
  for (size_t v = 0; v < lives.size(); ++v) {
    const Buffer& b = *buffers_[v];
    const size_t rows = product({limits_.rows[b.space], b.multiple});
    const size_t groups = product({rows, b.quant_stride(), sizeof(QuantGroup)});
    lives[v].bytes = float_bytes(b) + (b.wants_quant ? groups : 0);
    if (b.kept) lives[v].last = SIZE_MAX;
  }
  const std::vector<size_t> owner = joined(lives);
  std::vector<size_t> order;
  for (size_t v = 0; v < lives.size(); ++v)
    if (owner[v] == v && lives[v].first != SIZE_MAX) order.push_back(v);
  // The largest first, each where it fits first among those alive at the same time.
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return lives[a].bytes > lives[b].bytes; });
  size_t end = 0;
  std::vector<size_t> placed;  // in order of place
  for (const size_t v : order) {
    Life& life = lives[v];
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
  cache_.make(limits_.blocks, false);
  uncached_.make(ceil_div(uncached_rows_, limits_.block_size), true);
  recalled_.make(0, false);
  for (size_t v = 0; v < lives.size(); ++v) {
    if (lives[v].first == SIZE_MAX) continue;
    Buffer& b = *buffers_[v];
    uint8_t* const at = arena_->data() + lives[owner[v]].offset;
    b.data = reinterpret_cast<float*>(at);
    if (b.wants_quant) b.quant = reinterpret_cast<QuantGroup*>(at + float_bytes(b));
  }
}

void KvCache::make(size_t count, bool in_order) {
  memory = std::make_unique<Memory>(product({ceil_div(count, Plane::kRegion), region_bytes}));
  blocks.resize(in_order ? count : 0);
  std::iota(blocks.begin(), blocks.end(), 0);
}

// ---- what sequences recall ----

SequenceMemory::SequenceMemory(const Kernels& kernels, const Limits& limits, const KvCache& like,
                               size_t rows)
    : k_(kernels), limits_(limits), cache_{like.layers, like.region_bytes}, rows_(rows) {
  expect(!like.layers.empty(), "the program has no memories");
  expect(rows > 0 && rows <= size_t{INT32_MAX}, "a memory has 1 to 2^31 - 1 rows");
  cache_.make(ceil_div(rows, limits.block_size), true);
}

size_t SequenceMemory::width(size_t memory) const {
  return cache_.layers.at(memory).kv_heads * cache_.layers[memory].head_dim;
}

bool SequenceMemory::fits(const Limits& limits, const KvCache& like) const {
  return cache_.layers == like.layers && limits_.block_size == limits.block_size &&
         limits_.cache == limits.cache;
}

void SequenceMemory::write(size_t first, size_t count, const std::vector<const float*>& keys,
                           const std::vector<const float*>& values) {
  const DefaultFloats rules;
  expect(keys.size() == memories() && values.size() == memories() && first <= rows_ &&
             count <= rows_ - first,
         "keys and values are of each memory, and of rows that it has");
  for (size_t m = 0; m < keys.size(); ++m)
    for (size_t h = 0; h < cache_.layers[m].kv_heads; ++h) {
      const HeadCache head(cache_, m, h, limits_);
      const size_t dim = cache_.layers[m].head_dim;
      for (size_t r = 0; r < count; ++r) {
        const size_t at = r * width(m) + h * dim;
        head.store(k_, first + r, limits_.block_size, dim, keys[m] + at, values[m] + at);
      }
    }
}

std::shared_ptr<SequenceMemory> Executor::remember(size_t rows) const {
  return std::make_shared<SequenceMemory>(kernels_, limits_, recalled_, rows);
}

// ---- running ----

namespace {

bool below(int32_t x, size_t limit) { return x >= 0 && static_cast<size_t>(x) < limit; }

}  // namespace

void Executor::check(const Inputs& in) const {
  expect(planned_, "the program is not planned");
  expect(in.rows.size() == limits_.rows.size() && in.indices.size() == indices_.size() &&
             in.values.size() == inputs_.size(),
         "a run needs rows of each space, and all indices and values");
  for (size_t space = 0; space < in.rows.size(); ++space)
    expect(in.rows[space] <= limits_.rows[space], "too many rows in a step");
  for (const size_t space : single_)
    expect(in.rows[space] == 1, "a gate or a modulation has one row");
  for (const auto& [both, a, b] : joined_)
    expect(in.rows[both] == in.rows[a] + in.rows[b],
           "rows one after another are as many as there are of both");
  for (size_t i = 0; i < indices_.size(); ++i) check_index(in, i);
  for (const auto& mixture : in.mixtures)
    for (const auto& [adapter, weight] : mixture)
      expect(adapter != nullptr && adapter->layout() == layout_,
             "an adapter was made for another model");
  for (const Sight& sight : sights_)
    if (sight.keys != Keys::kOfRun) {
      expect(in.rows[sight.space] > 0 && in.positions.size() == in.rows[sight.space],
             "cached attention needs rows, and a position for each");
      check_sequences(in);
      break;
    }
  expect(in.memories.empty() || in.memories.size() == in.sequences(),
         "memories are one a sequence, or none");
  for (const SequenceMemory* memory : in.memories)
    expect(memory == nullptr || memory->fits(limits_, recalled_),
           "a memory was made for another model");
  for (const Sight& sight : sights_) check_spans(in, sight);
}

void Executor::check_index(const Inputs& in, size_t index) const {
  const Index& i = indices_[index];
  expect(in.indices[index].size() == i.axes * in.rows[i.space], "an index differs from its rows");
  if (i.mixtures) {
    for (const int32_t x : in.indices[index])
      expect(x < static_cast<int64_t>(in.mixtures.size()),
             "a row names adapters that are not there");
    return;
  }
  for (size_t row = 0; i.shared && row < in.indices[index].size(); ++row) {
    const int32_t first = in.indices[index][row];
    expect(below(first, row + 1) && in.indices[index][static_cast<size_t>(first)] == first,
           "rows that share must name the first of them");
  }
  const size_t limit = i.into == kNone ? i.limit : std::min(i.limit, in.rows[i.into]);
  for (const int32_t x : in.indices[index])
    expect(below(x, limit) || (i.overlays && x < 0),
           i.into != kNone       ? "a chosen row is outside the step"
           : i.limit == SIZE_MAX ? "an index is negative"
                                 : "a token id is outside the vocabulary");
}

void Executor::check_sequences(const Inputs& in) const {
  const size_t rows = in.positions.size();
  expect(in.bounds.size() >= 2 && in.bounds.front() == 0 &&
             static_cast<size_t>(in.bounds.back()) == rows &&
             std::is_sorted(in.bounds.begin(), in.bounds.end()),
         "sequence bounds must ascend from 0 to the number of rows");
  expect(in.table_width <= in.block_tables.size() &&
             in.block_tables.size() == in.sequences() * in.table_width,
         "one block table a sequence");
  for (size_t s = 0; s < in.sequences(); ++s) {
    const size_t begin = static_cast<size_t>(in.bounds[s]);
    const size_t end = static_cast<size_t>(in.bounds[s + 1]);
    if (begin == end) continue;
    for (size_t row = begin; row < end; ++row) {
      expect(below(in.positions[row], limits_.context), "a position is outside the context");
      expect(row == begin || in.positions[row] == in.positions[row - 1] + 1,
             "positions of a sequence must ascend by one");
    }
    const size_t needed = static_cast<size_t>(in.positions[end - 1]) / limits_.block_size + 1;
    expect(needed <= in.table_width, "a block table is shorter than its sequence");
    for (size_t i = 0; i < needed; ++i)
      expect(below(in.block_tables[s * in.table_width + i], limits_.blocks),
             "a block is outside the KV cache");
  }
}

size_t Executor::positions_there(const Inputs& in, const Sight& sight, size_t sequence) const {
  if (sight.keys == Keys::kOfRun) return in.rows[sight.from];
  if (sight.keys == Keys::kRecalled) {
    const SequenceMemory* memory = in.memories.empty() ? nullptr : in.memories[sequence];
    return memory == nullptr ? size_t{INT32_MAX} : memory->rows();
  }
  return static_cast<size_t>(in.positions[static_cast<size_t>(in.bounds[sequence + 1]) - 1]) + 1;
}

void Executor::check_spans(const Inputs& in, const Sight& sight) const {
  const bool whole = sight.keys == Keys::kOfRun;
  const size_t rows = in.rows[sight.space];
  const int32_t *first = in.indices[sight.spans].data(), *last = first + rows;
  for (size_t s = 0; s < (whole ? 1 : in.sequences()); ++s) {
    const size_t begin = whole ? 0 : static_cast<size_t>(in.bounds[s]);
    const size_t end = whole ? rows : static_cast<size_t>(in.bounds[s + 1]);
    if (begin == end) continue;
    const size_t there = positions_there(in, sight, s);
    for (size_t row = begin; row < end; ++row)
      expect(first[row] >= 0 && first[row] <= last[row] && static_cast<size_t>(last[row]) <= there,
             "a row sees a position that is not there");
  }
}

// Cuts the rows into attention tasks: enough for all threads, and long ones, as a task reads its
// context once.
View Executor::view(const Inputs& in, const Sight& sight) const {
  const size_t rows = in.rows[sight.space];
  const auto spans = in.indices[sight.spans];
  View view;
  view.begin.assign(spans.begin(), spans.begin() + static_cast<ptrdiff_t>(rows));
  view.end.assign(spans.begin() + static_cast<ptrdiff_t>(rows), spans.end());
  view.rows_a_run =
      std::clamp(rows * sight.kv_heads / (4 * pool_->threads()), size_t{1}, kRowsOfAttention);
  const auto cut = [&](size_t sequence, size_t begin, size_t end) {
    for (size_t r = begin; r < end; r += view.rows_a_run)
      view.runs.push_back({sequence, r, std::min(end, r + view.rows_a_run)});
  };
  if (sight.keys == Keys::kOfRun) {
    cut(0, 0, rows);
  } else {
    view.positions = in.positions, view.tables = in.block_tables;
    view.table_width = in.table_width;
  }
  for (size_t s = 0; sight.keys != Keys::kOfRun && s < in.sequences(); ++s) {
    const size_t begin = static_cast<size_t>(in.bounds[s]);
    const size_t end = static_cast<size_t>(in.bounds[s + 1]);
    cut(s, begin, end);
    if (sight.keys != Keys::kRecalled) continue;
    const SequenceMemory* memory = in.memories.empty() ? nullptr : in.memories[s];
    view.caches.push_back(memory == nullptr ? &recalled_ : &memory->cache());
    if (memory == nullptr) std::copy_n(&view.begin[begin], end - begin, &view.end[begin]);
  }
  for (size_t row = 0; row < rows; ++row)
    if (view.begin[row] < view.end[row])
      view.context = std::max(view.context, static_cast<size_t>(view.end[row]));
  return view;
}

void Executor::run(const Inputs& inputs, const std::vector<float*>& to, bool patient) {
  const std::lock_guard lock(mutex_);
  check(inputs);
  Step step{inputs, {}};
  for (const Sight& sight : sights_) step.views.push_back(view(inputs, sight));
  for (const auto& sums : low_ranks_) sums->prepare(step);
  split_->clear();
  run_groups(step, patient ? Turn::kPatient : Turn::kFirst);
  rows_seen_ = inputs.rows;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const Buffer& b = *buffers_[outputs_[i]];
    std::copy_n(b.data, step.rows_of(b) * b.width, to[i]);
  }
}

void Executor::run_groups(const Step& step, Turn turn) {
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
  if (!profiling_) return pool_->run(totals, run, turn);
  const int64_t start = now_ns();
  const auto timed = [&](size_t group, size_t i) {
    const int64_t begin = now_ns();
    Phase* const phase = run(group, i);
    phase->timing.add(begin, now_ns());
  };
  pool_->run(totals, timed, turn);
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
  *rows = rows_seen_.empty() ? 0 : rows_seen_[b.space] * b.multiple;
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

  const Inputs inputs{{rows}, {}, {}, {}, {}, {}, 0};
  const Step step{inputs, {}};
  const auto quantize = row_phase(in, pool.threads(), [&](const Step&, size_t r) {
    in.quantize(kernels, r, 0, in.width, in.row(r));
  });
  LinearOp op{0, 0, TilePtr(TilePtr(), &tile), {}};
  LinearPhase multiply(kernels, pool.threads(), std::move(op), in, to, nullptr, nullptr);
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
