// Python bindings: shapes and types are checked here and in Executor::check, nothing else happens.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cmath>
#include <cstdlib>

#include "executor.h"
#include "platform.h"
#include "roofline.h"
#include "sampler.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace squall;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntTable = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Columns = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using NewMatrix = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
template <class T>
using NewVector = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
using MaybeId = std::optional<size_t>;
using TileRef = std::shared_ptr<Tile>;
// x, index of mixtures, scalings, columns, number of the first weight
using MaybeAdapters = std::optional<std::tuple<size_t, size_t, MaybeId, std::vector<int>, size_t>>;

std::span<const int32_t> span(const Ints& a) { return {a.data(), a.size()}; }
Vector vector(const std::optional<Floats>& a) {
  return a ? Vector(a->data(), a->data() + a->size()) : Vector();
}
size_t id(const MaybeId& v) { return v.value_or(kNone); }
AdaptersOp adapters_of(const MaybeAdapters& a) {
  if (!a) return {};
  const auto& [x, mixture, scalings, columns, site] = *a;
  return {x, mixture, id(scalings), columns, site};
}

NewMatrix new_matrix(size_t rows, size_t cols) {
  auto* data = new float[product({rows, cols})];
  return NewMatrix(data, {rows, cols},
                   nb::capsule(data, [](void* p) noexcept { delete[] static_cast<float*>(p); }));
}

CacheType cache_named(std::string_view name) {
  constexpr std::string_view kNames[kCacheTypes] = {"f16", "f32", "q8_0"};
  for (size_t i = 0; i < kCacheTypes; ++i)
    if (kNames[i] == name) return static_cast<CacheType>(i);
  throw nb::value_error(("unknown cache type " + std::string(name)).c_str());
}

template <class T>
NewVector<T> new_vector(std::span<const T> from) {
  auto* data = new T[from.size()];
  std::copy(from.begin(), from.end(), data);
  return NewVector<T>(data, {from.size()},
                      nb::capsule(data, [](void* p) noexcept { delete[] static_cast<T*>(p); }));
}

Activation activation_named(const std::optional<std::string>& name) {
  if (!name) return Activation::kNone;
  if (*name == "silu") return Activation::kSilu;
  if (*name == "gelu") return Activation::kGelu;
  if (*name == "gelu_tanh") return Activation::kGeluTanh;
  if (*name == "quick_gelu") return Activation::kQuickGelu;
  if (*name == "relu") return Activation::kRelu;
  throw nb::value_error(("unknown activation " + *name).c_str());
}

std::string default_isa() {
  const char* forced = std::getenv("SQUALL_ISA");
  if (forced == nullptr || *forced == 0) return std::string(isas().front());
  if (find_kernels(forced, CacheType::kF16) != nullptr) return forced;
  std::string known;
  for (const std::string_view isa : isas()) known.append(" ").append(isa);
  throw nb::value_error(
      ("SQUALL_ISA=" + std::string(forced) + " does not run on this machine; it runs:" + known)
          .c_str());
}

Format known_format(const std::string& name) {
  if (const auto known = format_named(name)) return *known;
  std::string names;
  for (const FormatInfo& f : kFormatInfo) names.append(" ").append(f.name);
  throw nb::value_error(("unknown format " + name + "; known:" + names).c_str());
}

// What to pack with: the given, or a thread and memory of one's own.
struct Place {
  ThreadPool alone{1};
  Arena own;
  ThreadPool& pool;
  Arena& arena;

  Place(const std::shared_ptr<ThreadPool>& p, const std::shared_ptr<Arena>& a)
      : pool(p ? *p : alone), arena(a ? *a : own) {}
};

std::shared_ptr<Tile> pack(const std::string& format, const Bytes& data, size_t rows, size_t cols,
                           const std::shared_ptr<ThreadPool>& pool,
                           const std::shared_ptr<Arena>& arena,
                           const std::optional<Floats>& factors) {
  const Format known = known_format(format);
  const Vector all = vector(factors);
  const nb::gil_scoped_release release;
  Place place(pool, arena);
  return std::make_shared<Tile>(known, std::span(data.data(), data.size()), rows, cols, place.pool,
                                place.arena, all);
}

std::shared_ptr<Tile> requantize(const Tile& tile, const std::string& format,
                                 const std::shared_ptr<ThreadPool>& pool,
                                 const std::shared_ptr<Arena>& arena) {
  const Format known = known_format(format);
  const nb::gil_scoped_release release;
  Place place(pool, arena);
  const RowReader from{tile.rows(), tile.cols(),
                       [&](size_t row, float* out) { tile.dequantize_row(row, out); }};
  return std::make_shared<Tile>(known, from, place.pool, place.arena);
}

// The rows of f32, f16 or bf16 quantized as they are read.
std::shared_ptr<Tile> quantize_tile(const std::string& source, const Bytes& data, size_t rows,
                                    size_t cols, const std::string& format,
                                    const std::shared_ptr<ThreadPool>& pool,
                                    const std::shared_ptr<Arena>& arena) {
  const Format stored = known_format(source), known = known_format(format);
  const size_t row_bytes = product({cols, info(stored).block_bytes});
  if (info(stored).bits != 0 || stored == Format::kF8 || data.size() != product({rows, row_bytes}))
    throw nb::value_error("rows must be whole, and f32, f16 or bf16");
  const nb::gil_scoped_release release;
  Place place(pool, arena);
  const RowReader from{rows, cols, [&](size_t row, float* out) {
                         read_floats(stored, data.data() + row * row_bytes, cols, out);
                       }};
  return std::make_shared<Tile>(known, from, place.pool, place.arena);
}

// Blocks as in a file, and the factors of the rows where the format has them.
std::pair<NewVector<uint8_t>, NewVector<float>> quantize_rows(
    const std::string& format, const Matrix& x, const std::optional<Floats>& importance,
    const std::shared_ptr<ThreadPool>& pool) {
  const Format known = known_format(format);
  const size_t rows = x.shape(0), cols = x.shape(1);
  const FormatInfo& f = info(known);
  if (x.size() == 0 || cols % f.block != 0 || (importance && importance->size() != cols))
    throw nb::value_error("rows must be whole blocks, importance a number for each column");
  std::vector<uint8_t> blocks(rows * (cols / f.block) * f.block_bytes);
  std::vector<float> factors(head_bytes(known) == 0 ? 0 : rows);
  std::atomic<bool> refused{false};
  {
    const nb::gil_scoped_release release;
    Place place(pool, nullptr);
    const RowReader from{
        rows, cols, [&](size_t row, float* out) { std::copy_n(x.data() + row * cols, cols, out); }};
    const Quantizer quantizer(known, from, importance ? importance->data() : nullptr, place.pool);
    place.pool.run({&rows, 1}, [&](size_t, size_t row) {
      float factor = 0.0f;
      if (!quantizer.row(row, x.data() + row * cols, &blocks[row * (blocks.size() / rows)],
                         &factor))
        refused = true;
      if (!factors.empty()) factors[row] = factor;
    });
  }
  if (refused) throw nb::value_error("a value is NaN, infinite or above 65504");
  return {new_vector<uint8_t>(blocks), new_vector<float>(factors)};
}

NewMatrix dequantize(const Tile& tile) {
  const DefaultFloats floats;
  NewMatrix out = new_matrix(tile.rows(), tile.cols());
  for (size_t r = 0; r < tile.rows(); ++r) tile.dequantize_row(r, out.data() + r * tile.cols());
  return out;
}

const Kernels& kernels_of(const std::string& isa) {
  const Kernels* kernels = find_kernels(isa, CacheType::kF16);
  if (kernels == nullptr) throw std::invalid_argument("this machine has no kernels for " + isa);
  return *kernels;
}

// One linear op by itself, and the seconds of its fastest pass.
std::pair<NewMatrix, double> timed_linear(const Matrix& x, const Tile& tile, const std::string& isa,
                                          size_t threads, size_t passes) {
  const size_t rows = x.shape(0), cols = x.shape(1);
  if (cols != tile.cols())
    throw nb::value_error(("x has " + std::to_string(cols) + " columns, the weight " +
                           std::to_string(tile.cols()) + " columns")
                              .c_str());
  if (passes == 0) throw nb::value_error("at least one pass is needed");
  NewMatrix out = new_matrix(rows, tile.rows());
  const nb::gil_scoped_release release;
  ThreadPool pool(threads);
  const double seconds =
      linear_alone(kernels_of(isa), pool, tile, {x.data(), x.size()}, rows, out.data(), passes);
  return {out, seconds};
}

NewMatrix linear(const Matrix& x, const Tile& tile, const std::string& isa, size_t threads) {
  return timed_linear(x, tile, isa, threads, 1).first;
}

NewVector<float> adjusted(const SamplerState& state, const Floats& logits,
                          const std::vector<int32_t>& banned) {
  const DefaultFloats floats;
  NewVector<float> out = new_vector<float>({logits.data(), logits.size()});
  state.adjust({out.data(), out.size()}, banned);
  return out;
}

using Mask = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// (row of the logits, state, processed logits, banned ids, which ids are allowed, how many of the
// likeliest)
using RowToSample = std::tuple<size_t, const SamplerState*, std::optional<Floats>,
                               std::vector<int32_t>, std::optional<Mask>, int>;
// (id, log-probability, likeliest)
using SampledRow = std::tuple<int32_t, double, std::vector<std::pair<int32_t, double>>>;

std::vector<SampledRow> sample(const Matrix& logits, const std::vector<RowToSample>& wanted,
                               ThreadPool* pool) {
  const size_t vocab = logits.shape(1);
  std::vector<SamplerRow> rows;
  for (const auto& [index, state, processed, banned, allowed, top] : wanted) {
    if (index >= logits.shape(0) || (processed && processed->size() != vocab) || vocab == 0)
      throw nb::value_error("a row is outside of the logits, or has not as many");
    if (allowed && allowed->size() != (vocab + 31) / 32)
      throw nb::value_error("a mask has not a bit for each logit");
    SamplerRow row{*state, {logits.data() + index * vocab, vocab}, {}, banned, {}, top};
    if (processed) row.processed = {processed->data(), vocab};
    if (allowed) row.allowed = {allowed->data(), allowed->size()};
    rows.push_back(row);
  }
  std::vector<Choice> choices;
  {
    const nb::gil_scoped_release release;
    choices = choose(rows, pool);
  }
  std::vector<SampledRow> sampled;
  for (Choice& c : choices) sampled.emplace_back(c.token, c.logprob, std::move(c.top));
  return sampled;
}

double read_bandwidth_py(size_t threads) {
  const nb::gil_scoped_release release;
  ThreadPool pool(threads);
  return read_bandwidth(pool);
}

// int8 and f32 multiply-accumulates a second
std::pair<double, double> peak_rates(const std::string& isa, size_t threads) {
  const nb::gil_scoped_release release;
  ThreadPool pool(threads);
  return {peak_dots(kernels_of(isa), pool), peak_fmas(kernels_of(isa), pool)};
}

using Entry = std::tuple<std::string, double, double, uint64_t, uint64_t, uint64_t>;
// (name, seconds, of these waiting, bytes, int8 and f32 multiply-accumulates) of each phase
std::vector<Entry> profiled(const Executor& e) {
  std::vector<Entry> all;
  for (PhaseProfile& p : e.profiled())
    all.emplace_back(std::move(p.name), p.seconds, p.waiting, p.work.bytes, p.work.dots,
                     p.work.fmas);
  return all;
}

using Numbers = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;

void run(Executor& self, std::vector<size_t> rows, const std::vector<Numbers>& indices,
         const std::vector<Matrix>& values, const Ints& positions, const Ints& bounds,
         const IntTable& tables, const std::vector<OutMatrix>& outputs,
         const std::vector<std::vector<std::pair<std::shared_ptr<Adapter>, float>>>& mixtures,
         const std::vector<std::optional<std::shared_ptr<SequenceMemory>>>& memories,
         bool patient) {
  Inputs in{std::move(rows), {}, {}, span(positions), span(bounds), {tables.data(), tables.size()},
            tables.shape(1)};
  for (const auto& mixture : mixtures) in.mixtures.emplace_back(mixture.begin(), mixture.end());
  for (const auto& memory : memories) in.memories.push_back(memory ? memory->get() : nullptr);
  for (const Numbers& index : indices) in.indices.emplace_back(index.data(), index.size());
  const auto check = [&](const std::vector<size_t>& ids, const auto& matrices) {
    if (ids.size() != matrices.size()) throw nb::value_error("a run needs all values and outputs");
    for (size_t i = 0; i < ids.size(); ++i)
      if (matrices[i].shape(0) != self.rows_of(in, ids[i]) ||
          matrices[i].shape(1) != self.width(ids[i]))
        throw nb::value_error("values and outputs must be [rows, width]");
  };
  check(self.inputs(), values);
  check(self.outputs(), outputs);
  for (const Matrix& value : values) in.values.push_back(value.data());
  std::vector<float*> to;
  for (const OutMatrix& output : outputs) to.push_back(output.data());
  const nb::gil_scoped_release release;
  self.run(in, to, patient);
}

void bind_ops(nb::class_<Executor>& c) {
  c.def("value", &Executor::add_value, "width"_a, "space"_a, "kept"_a, "multiple"_a = 1)
      .def("index", &Executor::add_index, "space"_a, "axes"_a)
      .def("cache", &Executor::add_cache, "kv_heads"_a, "head_dim"_a)
      .def("memory", &Executor::add_memory, "kv_heads"_a, "head_dim"_a)
      .def("input", &Executor::input, "out"_a)
      .def(
          "embed",
          [](Executor& e, size_t out, size_t index, TileRef table, float scale,
             const MaybeAdapters& adapters) {
            e.embed(out, index, std::move(table), scale, adapters_of(adapters));
          },
          "out"_a, "index"_a, "table"_a, "scale"_a, "adapters"_a.none() = nb::none())
      .def("rope_angles", &Executor::rope_angles, "out"_a, "positions"_a, "frequencies"_a, "axes"_a,
           "magnitude"_a)
      .def(
          "normalize",
          [](Executor& e, size_t out, size_t x, const Floats& weight,
             const std::optional<Floats>& bias, bool rms, float eps, size_t group) {
            e.normalize({out, x, vector(weight), vector(bias), rms, eps, group});
          },
          "out"_a, "x"_a, "weight"_a, "bias"_a.none(), "rms"_a, "eps"_a, "group"_a)
      .def(
          "linear",
          [](Executor& e, size_t out, size_t x, TileRef weight, const std::optional<Floats>& bias,
             const std::optional<std::string>& act, float scale, MaybeId residual,
             const MaybeAdapters& adapters, MaybeId taps) {
            e.linear({out, x, std::move(weight), vector(bias), activation_named(act), scale,
                      id(residual), adapters_of(adapters), id(taps)});
          },
          "out"_a, "x"_a, "weight"_a, "bias"_a.none(), "activation"_a.none(), "scale"_a,
          "residual"_a.none(), "adapters"_a.none() = nb::none(), "taps"_a.none() = nb::none())
      .def(
          "group_normalize",
          [](Executor& e, size_t out, size_t x, const Floats& weight, const Floats& bias,
             size_t groups, float eps, const std::optional<std::string>& act) {
            e.group_normalize(
                {out, x, vector(weight), vector(bias), groups, eps, activation_named(act)});
          },
          "out"_a, "x"_a, "weight"_a, "bias"_a, "groups"_a, "eps"_a, "activation"_a.none())
      .def(
          "gated_linear",
          [](Executor& e, size_t out, size_t x, TileRef gate, TileRef up,
             const std::optional<Floats>& gate_bias, const std::optional<Floats>& up_bias,
             const std::string& act, const MaybeAdapters& adapters) {
            e.gated_linear({out, x, std::move(gate), std::move(up), vector(gate_bias),
                            vector(up_bias), activation_named(act), adapters_of(adapters)});
          },
          "out"_a, "x"_a, "gate"_a, "up"_a, "gate_bias"_a.none(), "up_bias"_a.none(),
          "activation"_a, "adapters"_a.none() = nb::none())
      .def(
          "rotate",
          [](Executor& e, size_t out, size_t x, size_t angles, size_t heads, size_t head_dim,
             bool interleaved) { e.rotate({out, x, angles, heads, head_dim, interleaved}); },
          "out"_a, "x"_a, "angles"_a, "heads"_a, "head_dim"_a, "interleaved"_a)
      .def(
          "attend",
          [](Executor& e, size_t out, size_t q, MaybeId k, MaybeId v, size_t spans, MaybeId cache,
             size_t heads, size_t kv_heads, size_t head_dim, float scale,
             std::optional<size_t> window, std::optional<float> softcap,
             const std::optional<Floats>& relative, const std::vector<uint32_t>& buckets) {
            e.attend({out, q, id(k), id(v), spans, id(cache), heads, kv_heads, head_dim, scale,
                      window.value_or(0), softcap.value_or(0.0f), vector(relative), buckets});
          },
          "out"_a, "q"_a, "k"_a.none(), "v"_a.none(), "spans"_a, "cache"_a.none(), "heads"_a,
          "kv_heads"_a, "head_dim"_a, "scale"_a, "window"_a.none(), "softcap"_a.none(),
          "relative"_a.none() = nb::none(), "buckets"_a = std::vector<uint32_t>{})
      .def(
          "mixture_of_experts",
          [](Executor& e, size_t out, size_t x, TileRef router, const std::vector<TileRef>& gate,
             const std::vector<TileRef>& up, const std::vector<TileRef>& down, size_t top_k,
             const std::string& act, bool normalize, std::optional<float> jitter, float scale,
             MaybeId residual, const MaybeAdapters& adapters,
             const std::vector<std::optional<Floats>>& biases, MaybeId shared) {
            const auto all = [](const auto& tiles) {
              return std::vector<TilePtr>(tiles.begin(), tiles.end());
            };
            e.mixture_of_experts({out, x, std::move(router), all(gate), all(up), all(down), top_k,
                                  activation_named(act), normalize, jitter, scale, id(residual),
                                  adapters_of(adapters), vector(biases.at(0)), vector(biases.at(1)),
                                  vector(biases.at(2)), vector(biases.at(3)), id(shared)});
          },
          "out"_a, "x"_a, "router"_a, "gate"_a, "up"_a, "down"_a, "top_k"_a, "activation"_a,
          "normalize"_a, "jitter"_a.none(), "scale"_a, "residual"_a.none(), "adapters"_a.none(),
          "biases"_a, "shared"_a.none())
      .def(
          "add",
          [](Executor& e, size_t out, size_t a, size_t b, float scale, MaybeId gate, size_t column,
             const std::optional<std::string>& act) {
            e.add({out, a, b, scale, id(gate), column, activation_named(act)});
          },
          "out"_a, "a"_a, "b"_a, "scale"_a, "gate"_a.none() = nb::none(), "column"_a = 0,
          "activation"_a.none() = nb::none())
      .def(
          "modulate",
          [](Executor& e, size_t out, size_t x, size_t by, size_t shift, size_t scale, float eps) {
            e.modulate({out, x, by, shift, scale, eps});
          },
          "out"_a, "x"_a, "by"_a, "shift"_a, "scale"_a, "eps"_a)
      .def("softcap", &Executor::softcap, "out"_a, "x"_a, "cap"_a)
      .def("gather_rows", &Executor::gather_rows, "out"_a, "x"_a, "index"_a, "mean"_a = false)
      .def("overlay", &Executor::overlay, "out"_a, "x"_a, "rows"_a, "index"_a)
      .def("concatenate", &Executor::concatenate, "out"_a, "a"_a, "b"_a)
      .def("concatenate_rows", &Executor::concatenate_rows, "out"_a, "a"_a, "b"_a)
      .def(
          "gather_columns",
          [](Executor& e, size_t out, size_t x, const Columns& order) {
            e.gather_columns(out, x, {order.data(), order.data() + order.size()});
          },
          "out"_a, "x"_a, "order"_a);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("isas", &isas);
  m.def("default_isa", &default_isa);
  m.def(
      "default_threads",
      [](const std::string& root) {
        const ThreadLimit limit = default_threads(root);
        return std::pair(limit.threads, limit.why);
      },
      "root"_a = "");
  m.def("read_bandwidth", &read_bandwidth_py, "threads"_a);
  m.def("peak_rates", &peak_rates, "isa"_a, "threads"_a);

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<size_t>(), "threads"_a)
      .def_prop_ro("threads", &ThreadPool::threads);

  nb::class_<Arena>(m, "Arena").def(nb::init<size_t>(), "chunk"_a = size_t{64} << 20);

  using Options = SamplingOptions;
  nb::class_<Options>(m, "SamplingOptions")
      .def(nb::init<>())
      .def_rw("temperature", &Options::temperature)
      .def_rw("top_k", &Options::top_k)
      .def_rw("top_p", &Options::top_p)
      .def_rw("min_p", &Options::min_p)
      .def_rw("seed", &Options::seed)
      .def_rw("bias", &Options::bias)
      .def_rw("frequency", &Options::frequency)
      .def_rw("presence", &Options::presence)
      .def_rw("repetition", &Options::repetition)
      .def_rw("dry_multiplier", &Options::dry_multiplier)
      .def_rw("dry_base", &Options::dry_base)
      .def_rw("dry_allowed_length", &Options::dry_allowed_length)
      .def_rw("dry_range", &Options::dry_range);

  nb::class_<SamplerState>(m, "SamplerState")
      .def(nb::init<SamplingOptions, size_t>(), "options"_a, "prompt"_a)
      .def(
          "extend",
          [](SamplerState& s, const std::vector<int32_t>& tokens, const nb::bytes& breaks) {
            if (breaks.size() != 0 && breaks.size() != tokens.size())
              throw nb::value_error("breaks must be empty or a byte a token");
            s.extend(tokens, {static_cast<const uint8_t*>(breaks.data()), breaks.size()});
          },
          "tokens"_a, "breaks"_a)
      .def("copy", [](const SamplerState& s) { return SamplerState(s); })
      .def("tokens", [](const SamplerState& s) { return new_vector<int32_t>(s.tokens()); })
      .def_prop_ro("length", [](const SamplerState& s) { return s.tokens().size(); })
      .def("adjusted", &adjusted, "logits"_a, "banned"_a);
  m.attr("LOGITS_ARE_NAN") = Choice::kNan;  // in place of an id
  m.def("sample", &sample, "logits"_a, "rows"_a, "pool"_a.none());

  nb::class_<Tile>(m, "Tile")
      .def_prop_ro("rows", &Tile::rows)
      .def_prop_ro("cols", &Tile::cols)
      .def_prop_ro("nbytes", &Tile::nbytes)
      .def_prop_ro("format", [](const Tile& t) { return info(t.format()).name; })
      .def("dequantize", &dequantize)
      .def_prop_ro("data", [](const Tile& t) {
        return nb::bytes(reinterpret_cast<const char*>(t.tile(0)), t.nbytes());
      });
  m.def("pack", &pack, "format"_a, "data"_a, "rows"_a, "cols"_a, "pool"_a.none() = nb::none(),
        "arena"_a.none() = nb::none(), "factors"_a.none() = nb::none());
  m.def("requantize", &requantize, "tile"_a, "format"_a, "pool"_a.none() = nb::none(),
        "arena"_a.none() = nb::none());
  m.def("quantize_tile", &quantize_tile, "source"_a, "data"_a, "rows"_a, "cols"_a, "format"_a,
        "pool"_a.none() = nb::none(), "arena"_a.none() = nb::none());
  m.def("quantize", &quantize_rows, "format"_a, "x"_a, "importance"_a.none() = nb::none(),
        "pool"_a.none() = nb::none());
  m.def("linear", &linear, "x"_a, "tile"_a, "isa"_a, "threads"_a);
  m.def("timed_linear", &timed_linear, "x"_a, "tile"_a, "isa"_a, "threads"_a, "passes"_a);

  nb::class_<Adapter>(m, "Adapter")
      .def(nb::init<int64_t>(), "layout"_a)
      .def(
          "add",
          [](Adapter& self, size_t site, const std::shared_ptr<Tile>& a,
             const std::shared_ptr<Tile>& b, float scale,
             const std::optional<Floats>& bias) { self.add(site, {a, b, scale, vector(bias)}); },
          "site"_a, "a"_a.none(), "b"_a.none(), "scale"_a, "bias"_a.none())
      .def_prop_ro("nbytes", &Adapter::nbytes);

  nb::class_<SequenceMemory>(m, "Memory")
      .def(
          "write",
          [](SequenceMemory& self, size_t first, const std::vector<Matrix>& keys,
             const std::vector<Matrix>& values) {
            const size_t count = keys.empty() ? 0 : keys[0].shape(0);
            std::vector<const float*> from[2];
            for (const auto& [matrices, to] :
                 {std::pair(&keys, &from[0]), std::pair(&values, &from[1])})
              for (const Matrix& x : *matrices) {
                if (to->size() < self.memories() &&
                    (x.shape(0) != count || x.shape(1) != self.width(to->size())))
                  throw nb::value_error("keys and values must be [rows, kv_heads * head_dim]");
                to->push_back(x.data());
              }
            const nb::gil_scoped_release release;
            self.write(first, count, from[0], from[1]);
          },
          "first"_a, "keys"_a, "values"_a)
      .def_prop_ro("rows", &SequenceMemory::rows)
      .def_prop_ro("nbytes", &SequenceMemory::nbytes);

  nb::class_<Executor> executor(m, "Executor");
  executor.def(
      "__init__",
      [](Executor* self, const std::string& isa, std::shared_ptr<ThreadPool> pool,
         std::vector<size_t> rows, size_t blocks, size_t block_size, size_t context,
         std::string_view cache) {
        new (self) Executor(isa, std::move(pool),
                            {std::move(rows), blocks, block_size, context, cache_named(cache)});
      },
      "isa"_a, "pool"_a, "rows"_a, "blocks"_a, "block_size"_a, "context"_a, "cache"_a);
  bind_ops(executor);
  executor.def("plan", &Executor::plan, "outputs"_a, "layout"_a = 0)
      .def("run", &run, "rows"_a, "indices"_a, "values"_a, "positions"_a, "bounds"_a,
           "block_tables"_a, "outputs"_a,
           "mixtures"_a = std::vector<std::vector<std::pair<std::shared_ptr<Adapter>, float>>>{},
           "memories"_a = std::vector<std::optional<std::shared_ptr<SequenceMemory>>>{},
           "patient"_a = false)
      .def("remember", &Executor::remember, "rows"_a)
      .def(
          "read",
          [](const Executor& e, size_t value) {
            size_t rows = 0;
            const std::vector<float> data = e.value(value, &rows);
            NewMatrix out = new_matrix(rows, rows == 0 ? 0 : data.size() / rows);
            std::copy(data.begin(), data.end(), out.data());
            return out;
          },
          "value"_a)
      .def("profile", &Executor::profile, "on"_a)
      .def("profiled", &profiled)
      .def_prop_ro("buffer_bytes", &Executor::buffer_bytes)
      .def_prop_ro("cache_bytes", &Executor::cache_bytes);
}
