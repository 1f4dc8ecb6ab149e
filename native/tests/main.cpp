// The native core by itself, for the sanitizers and for other processors: every format, kernel and
// op on small shapes in buffers of the exact size, so that a read or write outside of one is found.
//
//   squall_native_tests [isa | any [brief | pool] [seed]]
//
// isa: what must be the best one here; brief: fewer sizes; pool: of the threads alone
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "half.h"
#include "phases.h"
#include "sampler.h"
#include "weigh.h"

using namespace squall;
using namespace squall::test;

namespace squall::test {

int failures = 0;
std::mt19937 rng;
bool brief = false;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

std::vector<float> floats(size_t n, float size) {
  std::normal_distribution<float> normal(0.0f, size);
  std::vector<float> all(n);
  for (float& x : all) x = normal(rng);
  return all;
}

// The last bytes of a block's floats.
std::vector<size_t> exponents(Format format) {
  if (has_zero_code(format)) return {1, 3};
  switch (format) {
    case Format::kF32:
    case Format::kQ8K:
      return {3};
    case Format::kQ4_1:
    case Format::kQ5_1:
    case Format::kQ8_1:
    case Format::kQ4K:
    case Format::kQ5K:
      return {1, 3};
    case Format::kHqq8:
    case Format::kHqq4:
    case Format::kHqq3:
    case Format::kHqq2:
    case Format::kHqq1:
      return {1, 3};
    case Format::kF8:
      return {0};
    case Format::kQ2K:
      return {81, 83};
    case Format::kQ3K:
      return {109};
    case Format::kQ6K:
      return {209};
    default:
      return {1};
  }
}

// Any bytes are valid blocks but for their floats, which must be finite: less than 1 here.
std::vector<uint8_t> blocks(Format format, size_t rows, size_t cols) {
  const FormatInfo& f = info(format);
  std::vector<uint8_t> data(rows * cols / f.block * f.block_bytes);
  for (uint8_t& byte : data) byte = static_cast<uint8_t>(rng());
  for (size_t block = 0; block < data.size(); block += f.block_bytes)
    for (const size_t at : exponents(format)) data[block + at] &= 0xbb;
  return data;
}

TilePtr tile(Format format, size_t rows, size_t cols) {
  ThreadPool pool(2);
  Arena arena;
  return std::make_shared<Tile>(format, blocks(format, rows, cols), rows, cols, pool, arena);
}

}  // namespace squall::test

namespace {

void expect_rejected(const std::function<void()>& act, const std::string& what) {
  try {
    act();
  } catch (const std::invalid_argument&) {
    return;
  }
  expect(false, what + " is accepted");
}

TilePtr tile_of(const std::vector<float>& values, size_t rows) {
  ThreadPool pool(1);
  Arena arena;
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  return std::make_shared<Tile>(Format::kF32, std::span(bytes, values.size() * 4), rows,
                                values.size() / rows, pool, arena);
}

// ---- halves ----

void test_halves() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float f = half_to_float(static_cast<uint16_t>(h));
    if (std::isnan(f))
      expect(std::isnan(half_to_float(float_to_half(f))), "a NaN half");
    else
      expect(float_to_half(f) == h, "half " + std::to_string(h));
  }
  expect(float_to_half(65519.0f) == 0x7bff && float_to_half(65520.0f) == 0x7c00,
         "the largest half");
  expect(float_to_half(0x1p-25f) == 0 && float_to_half(0x1.8p-25f) == 1, "the smallest half");
  expect(float_to_half(1.0f + 0x1p-11f) == 0x3c00, "ties to even");
}

// ---- tiles ----

void test_tiles() {
  ThreadPool pool(1);
  Arena arena;
  const std::vector<uint8_t> data(18 * 4);
  const auto make = [&](size_t bytes, size_t rows, size_t cols) {
    return [&, bytes, rows, cols] {
      Tile(Format::kQ4_0, std::span(data).first(bytes), rows, cols, pool, arena);
    };
  };
  make(72, 2, 64)();
  expect_rejected(make(71, 2, 64), "a short weight");
  expect_rejected(make(72, 2, 63), "half a block");
  expect_rejected(make(0, 0, 64), "no rows");
  expect_rejected(make(72, size_t{1} << 40, 64), "a huge weight");
}

// ---- a program with every op ----

constexpr size_t kRemembered = 30;
constexpr size_t kVocab = 50, kHidden = 64, kHeads = 6, kKvHeads = 2, kDim = 20, kBlock = 16;

struct Model {
  TilePtr table = tile(Format::kQ4_0, kVocab, kHidden), head = tile(Format::kQ8_0, kVocab, kHidden);
  TilePtr q = tile_of(floats(kHeads * kDim * kHidden, 0.1f), kHeads* kDim);
  TilePtr k = tile_of(floats(kKvHeads * kDim * kHidden, 0.1f), kKvHeads* kDim);
  TilePtr v = tile_of(floats(kKvHeads * kDim * kHidden, 0.1f), kKvHeads* kDim);
  TilePtr o = tile_of(floats(kHidden * kHeads * kDim, 0.1f), kHidden);
  TilePtr gate = tile(Format::kQ5_0, 96, kHidden), up = tile(Format::kQ4_1, 96, kHidden);
  TilePtr down = tile(Format::kQ5_1, kHidden, 96);
  TilePtr router = tile_of(floats(4 * kHidden), 4);
  std::vector<TilePtr> gates, ups, downs;
  Vector norm = floats(kHidden), head_norm = floats(kDim), bias = floats(kHidden);
  std::vector<float> remembered = floats(kRemembered * kKvHeads * kDim);
  Vector of_router = floats(4), of_ups = floats(4 * 32), of_downs = floats(4 * kHidden);
  std::vector<std::shared_ptr<Adapter>> adapters;

  Model() {
    for (int i = 0; i < 2; ++i) adapters.push_back(adapter(3 + 15 * i));
    for (int e = 0; e < 4; ++e) {
      gates.push_back(tile(Format::kQ8_0, 32, kHidden));
      ups.push_back(tile(Format::kQ8_0, 32, kHidden));
      downs.push_back(tile(Format::kQ8_0, kHidden, 32));
    }
  }

  // Of the weights in `executor`: a table, a linear, a gated one, a router, gates, ups and downs.
  static std::shared_ptr<Adapter> adapter(size_t rank) {
    auto made = std::make_shared<Adapter>();
    const auto add = [&](size_t site, size_t rows, size_t cols) {
      made->add(site, {tile_of(floats(rank * cols, 0.1f), rank),
                       tile_of(floats(rows * rank, 0.1f), rows), 0.5f, floats(rows)});
    };
    made->add(0, {tile_of(floats(kVocab * rank, 0.1f), kVocab),
                  tile_of(floats(kHidden * rank, 0.1f), kHidden),
                  0.5f,
                  {}});
    add(1, kHidden, kHeads * kDim);
    for (size_t part = 2; part < 4; ++part) add(part, 96, kHidden);
    add(4, 4, kHidden);
    for (size_t part = 5; part < 13; ++part) add(part, 32, kHidden);
    for (size_t part = 13; part < 17; ++part) add(part, kHidden, 32);
    return made;
  }

  std::unique_ptr<Executor> executor(std::string_view isa, size_t threads, CacheType cache) const {
    auto e = std::make_unique<Executor>(isa, std::make_shared<ThreadPool>(threads),
                                        Limits{{64, 8}, 8, kBlock, 100, cache});
    const auto value = [&](size_t width) { return e->add_value(width, 0, false); };
    const size_t tokens = e->add_index(0, 1), rotary = e->add_index(0, 1);
    const size_t spans = e->add_index(0, 2), outputs = e->add_index(1, 1);
    const size_t mixture = e->add_index(0, 1), shared = e->add_index(0, 1);
    const size_t place = e->add_index(0, 1), near = e->add_index(0, 2), known = e->add_index(0, 2);
    const auto adapted = [&](size_t in, size_t site) {
      return AdaptersOp{in, mixture, kNone, {}, site};
    };
    e->add_cache(kKvHeads, kDim);
    e->add_memory(kKvHeads, kDim);
    const size_t x = value(kHidden), angles = value(16), n = value(kHidden);
    e->embed(x, tokens, table, 1.5f, adapted(tokens, 0));
    e->rope_angles(angles, rotary, floats_of(8), std::vector<size_t>(8), 1.1f);
    e->normalize({n, x, norm, bias, false, 1e-5f, kHidden});
    const size_t query = value(kHeads * kDim), key = value(kKvHeads * kDim);
    const size_t val = value(kKvHeads * kDim), normed = value(kHeads * kDim);
    e->linear({query, n, q, {}, Activation::kNone, 1.0f, kNone});
    e->linear({key, n, k, {}, Activation::kNone, 1.0f, kNone});
    e->linear({val, n, v, {}, Activation::kNone, 1.0f, kNone});
    e->normalize({normed, query, head_norm, {}, true, 1e-6f, kDim});
    const size_t query2 = value(kHeads * kDim), key2 = value(kKvHeads * kDim);
    e->rotate({query2, normed, angles, kHeads, kDim, false});
    e->rotate({key2, key, angles, kKvHeads, kDim, true});
    const size_t seen = value(kHeads * kDim), y = value(kHidden);
    const size_t recalled = value(kHeads * kDim), both = value(2 * kHeads * kDim);
    const size_t laid = value(kHeads * kDim), mean = value(kHeads * kDim);
    e->attend({seen, query2, key2, val, spans, 0, kHeads, kKvHeads, kDim, 0.2f, 19, 30.0f});
    e->attend({recalled, query2, kNone, kNone, known, 0, kHeads, kKvHeads, kDim, 0.2f, 0, 0.0f});
    e->overlay(laid, seen, recalled, place);
    e->gather_rows(mean, laid, near, true);
    e->gather_rows(both, mean, near);
    const size_t half = value(kHeads * kDim);
    std::vector<uint32_t> order(kHeads * kDim);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<uint32_t>(2 * i);
    e->gather_columns(half, both, order);
    e->linear({y, half, o, bias, Activation::kGelu, 0.5f, x, adapted(half, 1)});
    const size_t inner = value(96), z = value(kHidden), mixed = value(kHidden),
                 sum = value(kHidden);
    e->gated_linear({inner, y, gate, up, {}, {}, Activation::kSilu, adapted(y, 2)});
    const size_t quick = value(kHidden);
    e->linear({z, inner, down, {}, Activation::kRelu, 1.0f, y});
    e->linear({quick, inner, down, {}, Activation::kQuickGelu, 0.1f, z});
    e->mixture_of_experts({mixed, z, router, gates, ups, downs, 2, Activation::kGeluTanh, true,
                           0.01f, 0.5f, z, adapted(z, 4)});
    e->add({sum, mixed, quick, 0.25f});
    const size_t last = value(kHidden);
    MoeOp plain{last, sum, router, {}, ups, downs, 1, Activation::kGelu, false, {}, 1.0f, sum};
    plain.router_bias = of_router, plain.up_bias = of_ups, plain.down_bias = of_downs;
    plain.shared = shared;
    e->mixture_of_experts(plain);
    const size_t wanted = e->add_value(kHidden, 1, false), raw = e->add_value(kVocab, 1, false);
    const size_t logits = e->add_value(kVocab, 1, false);
    e->gather_rows(wanted, last, outputs);
    e->linear({raw, wanted, head, {}, Activation::kNone, 1.0f, kNone});
    e->softcap(logits, raw, 30.0f);
    e->plan({logits});
    return e;
  }

  static Vector floats_of(size_t n) {
    Vector all(n);
    for (size_t i = 0; i < n; ++i) all[i] = 1.0f / static_cast<float>(i + 1);
    return all;
  }
};

// Arrays of one step of one sequence, whose blocks are not in order.
struct Arrays {
  std::vector<int32_t> tokens, positions, spans, bounds, table{5, 2, 7, 0}, outputs, mixture,
      shared, place, near, known;
  std::vector<Mixture> mixtures;
  std::vector<const SequenceMemory*> memories;

  Arrays(const Model& model, size_t begin, size_t end)
      : bounds{0, static_cast<int32_t>(end - begin)},
        mixtures{{{model.adapters[0], 1.0f}},
                 {{model.adapters[1], 0.3f}, {model.adapters[0], 0.5f}}} {
    for (size_t p = begin; p < end; ++p) {
      tokens.push_back(static_cast<int32_t>(p * 7 % kVocab));
      positions.push_back(static_cast<int32_t>(p));
      mixture.push_back(static_cast<int32_t>(p / 3 % 3) - 1);
      shared.push_back(static_cast<int32_t>(p - begin));
      place.push_back(p % 2 == 0 ? -1 : shared.back());
      known.push_back(static_cast<int32_t>(p * 3 % (kRemembered + 1)));
    }
    for (const auto* own : {&shared, &shared}) near.insert(near.end(), own->begin(), own->end());
    known.insert(known.begin(), end - begin, 0);
    spans.assign(end - begin, 0);
    for (const int32_t p : positions) spans.push_back(p + 1);
    outputs.push_back(bounds[1] - 1);
  }
  Inputs inputs() const {
    return {{tokens.size(), outputs.size()},
            {tokens, positions, spans, outputs, mixture, shared, place, near, known},
            {},
            positions,
            bounds,
            table,
            table.size(),
            mixtures,
            memories};
  }
};

std::vector<float> last_logits(const Model& model, Executor& e, const std::vector<size_t>& cuts) {
  std::vector<float> logits(kVocab);
  const auto memory = e.remember(kRemembered);
  const float* rows = model.remembered.data();
  memory->write(0, kRemembered, {rows}, {rows});
  size_t begin = 0;
  for (const size_t end : cuts) {
    Arrays arrays(model, begin, end);
    arrays.memories = {memory.get()};
    e.run(arrays.inputs(), {logits.data()});
    begin = end;
  }
  return logits;
}

void test_peaks(const Kernels& kernels) {
  for (const auto loop : {kernels.peak_dots, kernels.peak_fmas}) {
    float sum = 0;
    const uint64_t products = loop(3, &sum);
    expect(products > 0 && sum == static_cast<float>(products),
           "as many products as are counted on " + std::string(kernels.isa));
  }
}

void test_program(const Model& model, std::string_view isa) {
  test_peaks(*find_kernels(isa, CacheType::kF16));
  for (const CacheType cache : {CacheType::kF16, CacheType::kF32, CacheType::kQ8_0}) {
    const auto one = model.executor(isa, 1, cache), three = model.executor(isa, 3, cache);
    const std::vector<float> whole = last_logits(model, *one, {50});
    for (const float x : whole) expect(std::isfinite(x), "logits are finite");
    const std::string where = " on " + std::string(isa);
    expect(whole == last_logits(model, *three, {50}), "threads change nothing" + where);
    expect(whole == last_logits(model, *three, {1, 2, 18, 25, 49, 50}),
           "steps change nothing" + where);
    on_small_stack(
        [&] { expect(whole == last_logits(model, *one, {50}), "stacks change nothing" + where); });
  }
}

void test_rejected(const Model& model) {
  const auto e = model.executor("scalar", 1, CacheType::kF16);
  std::vector<float> logits(kVocab * 2);
  const auto rejects = [&](const char* what, const std::function<void(Arrays&)>& spoil) {
    Arrays arrays(model, 0, 20);
    spoil(arrays);
    expect_rejected([&] { e->run(arrays.inputs(), {logits.data()}); }, what);
  };
  rejects("a token beyond the vocabulary", [](Arrays& a) { a.tokens[3] = kVocab; });
  rejects("a negative token", [](Arrays& a) { a.tokens[3] = -1; });
  rejects("a position beyond the context", [](Arrays& a) { a.positions[19] = 100; });
  rejects("positions with a gap", [](Arrays& a) { a.positions[19] = 20; });
  rejects("a row that ends before it begins", [](Arrays& a) { a.spans[1] = 3; });
  rejects("a chosen row beyond the step", [](Arrays& a) { a.place[3] = 20; });
  rejects("a gathered row beyond the step", [](Arrays& a) { a.near[39] = 20; });
  rejects("a negative gathered row", [](Arrays& a) { a.near[39] = -1; });
  rejects("a row that remembers from before the beginning", [](Arrays& a) { a.known[3] = -1; });
  const auto other = std::make_unique<Executor>("scalar", std::make_shared<ThreadPool>(1),
                                                Limits{{64, 8}, 8, kBlock, 100, CacheType::kF16});
  other->add_memory(kKvHeads, kDim + 1);
  const auto strange = other->remember(40);
  const auto short_one = e->remember(kRemembered - 1);
  rejects("another's memory", [&](Arrays& a) { a.memories = {strange.get()}; });
  rejects("a short memory", [&](Arrays& a) { a.memories = {short_one.get()}; });
  rejects("two memories of a sequence", [&](Arrays& a) { a.memories = {nullptr, nullptr}; });
  rejects("a row that sees what is not there", [](Arrays& a) { a.spans[21] = 21; });
  rejects("a row that sees from before the beginning", [](Arrays& a) { a.spans[1] = -1; });
  rejects("a block beyond the cache", [](Arrays& a) { a.table[0] = 8; });
  rejects("a negative block", [](Arrays& a) { a.table[1] = -1; });
  rejects("a short table", [](Arrays& a) { a.table.resize(1); });
  rejects("descending bounds", [](Arrays& a) { a.bounds = {0, 25, 20}; });
  rejects("bounds that leave rows out", [](Arrays& a) { a.bounds = {0, 19}; });
  rejects("an output row beyond the step", [](Arrays& a) { a.outputs = {20}; });
  rejects("too many outputs", [](Arrays& a) { a.outputs.assign(9, 0); });
  rejects("a missing span", [](Arrays& a) { a.spans.pop_back(); });
  rejects("a missing position", [](Arrays& a) { a.positions.pop_back(); });
  rejects("a row with adapters that are not there", [](Arrays& a) { a.mixture[3] = 2; });
  rejects("a missing row of adapters", [](Arrays& a) { a.mixture.pop_back(); });
  rejects("no rows", [&](Arrays& a) { a = Arrays(model, 0, 0); });
}

// Group norms and convolutions of floats and of int8, where sums lie over what they add to.
struct Pictures {
  static constexpr size_t kWidth = 64, kRows = 200;
  TilePtr first = tile_of(floats(kWidth * 3 * kWidth, 0.1f), kWidth);
  TilePtr second = tile(Format::kQ8_0, kWidth, 3 * kWidth);
  Vector weight = floats(kWidth), bias = floats(kWidth);
  std::vector<float> x = floats(kRows * kWidth);

  std::unique_ptr<Executor> executor(std::string_view isa, size_t threads) const {
    auto e = std::make_unique<Executor>(isa, std::make_shared<ThreadPool>(threads),
                                        Limits{{kRows}, 1, kBlock, 1, CacheType::kF32});
    const size_t taps = e->add_index(0, 3);
    std::vector<size_t> v;
    for (int i = 0; i < 6; ++i) v.push_back(e->add_value(kWidth, 0, false));
    e->input(v[0]);
    e->group_normalize({v[1], v[0], weight, bias, 8, 1e-6f, Activation::kSilu});
    e->linear({v[2], v[1], first, bias, Activation::kNone, 1.0f, kNone, {}, taps});
    e->group_normalize({v[3], v[2], weight, bias, 32, 1e-6f, Activation::kNone});
    e->linear({v[4], v[3], second, bias, Activation::kRelu, 0.5f, v[0], {}, taps});
    e->group_normalize({v[5], v[4], weight, bias, 1, 1e-6f, Activation::kSilu});
    e->plan({v[5]});
    return e;
  }
  std::vector<float> run(Executor& e, std::vector<int32_t> taps) const {
    std::vector<float> out(kRows * kWidth);
    e.run({{kRows}, {taps}, {x.data()}, {}, {}, {}, 0}, {out.data()});
    return out;
  }
  static std::vector<int32_t> taps() {
    std::vector<int32_t> all;
    for (int32_t tap = -1; tap < 2; ++tap)
      for (int32_t row = 0; row < static_cast<int32_t>(kRows); ++row)
        all.push_back(row + tap < static_cast<int32_t>(kRows) ? row + tap : -1);
    return all;
  }
};

void test_pictures() {
  const Pictures pictures;
  std::vector<float> expected;
  for (const std::string_view isa : isas()) {
    const auto one = pictures.executor(isa, 1), three = pictures.executor(isa, 3);
    const std::vector<float> found = pictures.run(*one, Pictures::taps());
    const std::string where = " on " + std::string(isa);
    if (expected.empty()) expected = found;
    for (const float x : found) expect(std::isfinite(x), "pixels are finite" + where);
    expect(found == expected, "pixels are those of other processors" + where);
    expect(found == pictures.run(*three, Pictures::taps()), "threads change no pixel" + where);
    on_small_stack([&] {
      expect(found == pictures.run(*one, Pictures::taps()), "stacks change no pixel" + where);
    });
    std::vector<int32_t> beyond = Pictures::taps();
    beyond.back() = static_cast<int32_t>(Pictures::kRows);
    expect_rejected([&] { pictures.run(*one, beyond); }, "a tap beyond the step" + where);
  }
}

// ---- threads, sampling ----

void test_pool() {
  for (size_t threads = 1; threads <= 4; ++threads) {
    ThreadPool pool(threads);
    for (int round = 0; round < 200; ++round) {
      const std::vector<size_t> totals{5, 0, 1, 33, 0, 2};
      std::vector<std::atomic<int>> done(totals.size());
      std::atomic<bool> early{false};
      pool.run(totals, [&](size_t stage, size_t) {
        for (size_t s = 0; s < stage; ++s)
          if (done[s] != static_cast<int>(totals[s])) early = true;
        ++done[stage];
      });
      expect(!early, "a stage begins when the one before is done");
      for (size_t s = 0; s < totals.size(); ++s)
        expect(done[s] == static_cast<int>(totals[s]), "every task runs once");
    }
  }
}

int32_t sample(const std::vector<float>& logits, const SamplingOptions& options, size_t position) {
  SamplerState state(options, 0);
  state.extend(std::vector<int32_t>(position), {});
  return choose({state, logits, {}, {}, {}, 2}).token;
}

void test_sampler() {
  const std::vector<float> logits{1.0f, 3.0f, 3.0f, -2.0f, 0.5f};
  const SamplingOptions greedy{}, free{.temperature = 1, .seed = 7};
  expect(sample(logits, greedy, 0) == 1, "greedy takes the first of equals");
  const auto always = [&](const SamplingOptions& s, int32_t a, int32_t b) {
    for (size_t p = 0; p < 200; ++p) {
      const int32_t id = sample(logits, s, p);
      if (id != a && id != b) return false;
    }
    return true;
  };
  expect(always({.temperature = 1, .top_k = 1}, 1, 1), "top_k 1");
  expect(always({.temperature = 1, .top_k = 2}, 1, 2), "top_k 2");
  expect(always({.temperature = 1, .top_p = 1e-9}, 1, 1), "a tiny top_p");
  expect(always({.temperature = 1, .min_p = 1}, 1, 2), "min_p 1");
  const float nan = std::nanf(""), inf = INFINITY;
  for (const auto& odd : {std::vector{nan, 1.0f}, {inf, 1.0f}, {-inf, -inf}, {nan, nan}})
    for (const SamplingOptions& s : {greedy, free, SamplingOptions{1, 1, 0.5, 0.1, 3}}) {
      const int32_t id = sample(odd, s, 1);
      const int32_t right = std::isnan(odd[0]) ? Choice::kNan
                            : odd[0] == inf    ? 0
                                               : Choice::kNothing;
      expect(id == right, "strange logits");
    }
}

void test_options() {
  const double nan = std::nan(""), inf = INFINITY;
  const auto rejects = [](const char* what, const auto& set) {
    SamplingOptions options;
    set(options);
    expect_rejected([&] { SamplerState(options, 0); }, what);
  };
  for (const double bad : {nan, inf, -inf, -1.0}) {
    rejects("a temperature", [&](SamplingOptions& o) { o.temperature = bad; });
    rejects("a top_p", [&](SamplingOptions& o) { o.top_p = bad; });
    rejects("a min_p", [&](SamplingOptions& o) { o.min_p = bad; });
    rejects("a repetition penalty", [&](SamplingOptions& o) { o.repetition = bad; });
    rejects("a multiplier of DRY", [&](SamplingOptions& o) { o.dry_multiplier = bad; });
    rejects("a base of DRY", [&](SamplingOptions& o) { o.dry_base = bad; });
    if (bad == -1.0) continue;
    rejects("a frequency penalty", [&](SamplingOptions& o) { o.frequency = bad; });
    rejects("a presence penalty", [&](SamplingOptions& o) { o.presence = bad; });
    if (bad != -inf) rejects("a bias", [&](SamplingOptions& o) { o.bias = {{1, bad}}; });
  }
  rejects("no range of DRY", [](SamplingOptions& o) { o.dry_range = 0; });
  rejects("no allowed length of DRY", [](SamplingOptions& o) { o.dry_allowed_length = 0; });
  rejects("a top_p of 0", [](SamplingOptions& o) { o.top_p = 0; });
}

// Sizes around a block, every filter, tokens outside of the vocabulary; masks without a spare word.
void test_sampler_sizes() {
  SamplingOptions all{0.7, 3, 0.9, 0.01, 5, 0.5, 0.5, 1.1, 1.0, 1.75, 1};
  all.bias = {{2, 1.0}, {5000, 1.0}, {-1, 1.0}};
  SamplerState full(all, 4), free({.temperature = 1, .top_p = 0.8}, 0);
  full.extend(std::vector<int32_t>{1, 2, -7, 1, 5000, 2, 1, 2, 1}, {});
  const std::vector<int32_t> banned{0, -1, 70000};
  ThreadPool pool(2);
  for (const size_t vocab : {2, 63, 64, 65, 1000}) {
    const std::vector<float> logits = floats(vocab, 3.0f);
    std::vector<uint32_t> masks[] = {{}, std::vector<uint32_t>((vocab + 31) / 32, 0xaaaaaaaau)};
    if (vocab > 200) std::fill_n(&masks[1][2], 4, 0u);  // whole blocks
    std::vector<SamplerRow> rows;
    for (const SamplerState* state : {&full, &free})
      for (const auto& allowed : masks)
        for (const int top : {-1, 0, 20})
          rows.push_back({*state, logits, {}, banned, allowed, top});
    const std::vector<Choice> choices = choose(rows, &pool);
    for (size_t i = 0; i < rows.size(); ++i) {
      const int32_t token = choices[i].token;
      expect(token > 0 && token == choose(rows[i]).token, "a row alone");
      if (!rows[i].allowed.empty())
        expect(rows[i].allowed[static_cast<size_t>(token) / 32] >> token % 32 & 1, "a mask");
    }
  }
}

void test_weigh() {
  std::vector<float> x = floats(100000, 30.0f);
  for (float& v : x) v = -std::abs(v);
  x.insert(x.end(), {0.0f, -0.0f, -INFINITY, std::nanf(""), -85.0f, -3e38f, -1e-40f});
  std::vector<float> expected(x.size()), found(x.size());
  weigh_variants().front()(x.data(), x.size(), 0.0f, 1.0f, expected.data());
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = x[i] > -85.0f ? std::exp(double{x[i]}) : 0.0;
    expect(std::abs(expected[i] - exact) <= 3e-7 * exact, "exp " + std::to_string(x[i]));
  }
  for (const Weigh variant : weigh_variants()) {
    variant(x.data(), x.size(), 0.0f, 1.0f, found.data());
    expect(std::memcmp(found.data(), expected.data(), 4 * x.size()) == 0, "variants of weigh");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  const auto says = [&](size_t i, const char* word) {
    return i < words.size() && words[i] == word;
  };
  brief = says(1, "brief");
  const size_t number = brief || says(1, "pool") ? 2 : 1;
  const unsigned seed = number < words.size() ? static_cast<unsigned>(std::stoul(words[number]))
                                              : std::random_device()();
  rng.seed(seed);
  if (!words.empty() && !says(0, "any"))
    expect(isas().front() == words[0], std::string(isas().front()) + " is used");
  if (says(1, "pool")) return test_pool(), test_callers(), failures != 0;
  test_halves();
  test_tiles();
  test_pool();
  test_sampler();
  test_options();
  test_faults();
  rng.seed(seed);
  test_kernels();
  test_sampler_sizes();
  test_weigh();
  const Model model;
  test_rejected(model);
  test_pictures();
  for (const std::string_view isa : isas()) test_program(model, isa);
  std::printf("%s: ", std::string(isas().front()).c_str());
  std::printf(failures == 0 ? "native tests passed\n" : "%d native tests failed\n", failures);
  if (failures != 0) std::printf("the random numbers' seed was %u\n", seed);
  return failures == 0 ? 0 : 1;
}
