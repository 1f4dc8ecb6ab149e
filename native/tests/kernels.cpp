// Every kernel: the scalar ISA against float64, every other ISA against the scalar one, bit for
// bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numbers>
#include <numeric>

#include "check.h"
#include "half.h"

namespace squall::test {
namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Run = std::function<Floats(const Kernels&)>;

constexpr double kTolerance = 1e-5;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = INFINITY;

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The error's root mean square in units of the expected values'.
double error(const Floats& got, const Doubles& expected) {
  double errors = 0, squares = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    errors += (got[i] - expected[i]) * (got[i] - expected[i]);
    squares += expected[i] * expected[i];
  }
  return std::sqrt(errors / std::max(squares, 1e-30));
}

Floats on_every_isa(const std::string& what, const Run& run, CacheType cache = CacheType::kF16) {
  const Floats scalar = run(*find_kernels("scalar", cache));
  for (const std::string_view isa : isas())
    if (isa != "scalar")
      expect(same_bits(run(*find_kernels(isa, cache)), scalar),
             what + " on " + std::string(isa) + " is not that on scalar");
  return scalar;
}

void check(const std::string& what, const Doubles& expected, const Run& run,
           CacheType cache = CacheType::kF16) {
  const double e = error(on_every_isa(what, run, cache), expected);
  expect(e <= kTolerance, what + ": error " + std::to_string(e));
}

// ---- linear ----

// Among normal values a row of zeros, and in every other row peaks, which make groups fine.
Floats activations(size_t rows, size_t cols) {
  Floats x = floats(rows * cols);
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < cols; ++c) {
      if (r % 7 == 6) x[r * cols + c] = 0.0f;
      if (r % 2 == 0 && c % 41 == 40) x[r * cols + c] *= 30.0f;
    }
  return x;
}

struct Quantized {
  size_t stride;  // of a row: its groups, then their digits
  std::vector<QuantGroup> groups;

  Quantized(const Kernels& k, const Floats& x, size_t rows)
      : stride(x.size() / rows / kGroup * 2), groups(rows * stride) {
    memset(static_cast<void*>(groups.data()), 0, groups.size() * sizeof(QuantGroup));
    for (size_t r = 0; r < rows; ++r) {
      QuantGroup* const row = groups.data() + r * stride;
      k.quantize(x.data() + r * stride / 2 * kGroup, stride / 2 * kGroup, row,
                 reinterpret_cast<FineGroup*>(row + stride / 2));
    }
  }
  Doubles values() const {
    Doubles all;
    for (size_t row = 0; row < groups.size(); row += stride)
      for (size_t i = row; i < row + stride / 2; ++i) {
        const QuantGroup& g = groups[i];
        const auto& digits = reinterpret_cast<const FineGroup&>(groups[i + stride / 2]);
        for (size_t c = 0; c < kGroup; ++c)
          all.push_back(double{g.scale} * (g.q[c] + (g.fine != 0 ? digits.r[c] / 256.0 : 0.0)));
      }
    return all;
  }
};

void test_quantize() {
  for (const size_t cols : {32, 64, 288}) {
    const Floats x = activations(23, cols);
    const Quantized q(*find_kernels("scalar", CacheType::kF16), x, 23);
    const Doubles values = q.values();
    bool near = true;
    size_t fine = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const QuantGroup& g = q.groups[i / cols * q.stride + i % cols / kGroup];
      fine += g.fine != 0 ? 1 : 0;
      // A digit of 128, half a step, is stored as 127.
      const double allowed = (g.fine != 0 ? 1.001 / 256 : 0.501) * double{g.scale};
      near = near && std::abs(values[i] - x[i]) <= allowed + 1e-30;
    }
    const std::string what = "quantize " + std::to_string(cols);
    expect(near, what + " is near");
    expect(cols == 32 || fine > 0, what + " finds fine groups");
    on_every_isa(what, [&](const Kernels& k) {
      const Quantized other(k, x, 23);
      Floats bytes(other.groups.size() * sizeof(QuantGroup) / sizeof(float));
      memcpy(bytes.data(), other.groups.data(), bytes.size() * sizeof(float));
      return bytes;
    });
  }
}

// [tiles][rows][16], as the kernels give them
Doubles products(const Tile& w, const Doubles& x, size_t rows) {
  Doubles all(w.tiles() * rows * kLanes);
  Floats weights(w.cols());
  for (size_t o = 0; o < w.rows(); ++o) {
    w.dequantize_row(o, weights.data());
    for (size_t r = 0; r < rows; ++r)
      all[(o / kLanes * rows + r) * kLanes + o % kLanes] = std::inner_product(
          weights.begin(), weights.end(), x.begin() + static_cast<ptrdiff_t>(r * w.cols()), 0.0);
  }
  return all;
}

void test_linear(Format format, size_t cols, size_t rows) {
  const TilePtr w = tile(format, 5 * kLanes - 11, cols);
  const Floats x = activations(rows, cols);
  const size_t f = static_cast<size_t>(format);
  Doubles read(x.begin(), x.end());
  if (w->is_integer()) read = Quantized(*find_kernels("scalar", CacheType::kF16), x, rows).values();
  check(std::string(info(format).name) + ", " + std::to_string(rows) + " rows, " +
            std::to_string(cols) + " columns",
        products(*w, read, rows), [&](const Kernels& k) {
          Floats out(w->tiles() * rows * kLanes);
          if (w->is_integer()) {
            const Quantized q(k, x, rows);
            k.matmul_quantized[f](w->tile(0), w->tiles(), w->tile_bytes(), cols, q.groups.data(),
                                  q.stride, rows, out.data());
          } else {
            k.matmul_float[f](w->tile(0), w->tiles(), w->tile_bytes(), cols, {x.data(), cols}, rows,
                              out.data());
          }
          return out;
        });
}

// Rows that taps name have the same bits as when they lie side by side.
void test_taps(Format format, size_t width, size_t rows) {
  constexpr size_t kTaps = 3, kGiven = 40;
  const size_t cols = kTaps * width;
  const TilePtr w = tile(format, 3 * kLanes - 5, cols);
  const Floats x = floats(kGiven * width);
  std::vector<int32_t> taps(kTaps * (rows + 1));
  for (int32_t& row : taps) row = static_cast<int32_t>(rng() % (kGiven + 9)) - 9;
  Floats dense(rows * cols);
  for (size_t r = 0; r < rows; ++r)
    for (size_t tap = 0; tap < kTaps; ++tap)
      if (const int32_t row = taps[tap * (rows + 1) + r]; row >= 0)
        std::copy_n(x.data() + static_cast<size_t>(row) * width, width,
                    dense.data() + r * cols + tap * width);
  Floats panel(rows * kPanelStride, kNan);
  const auto with = [&](const FloatRows& read) {
    return [&, read](const Kernels& k) {
      Floats out(w->tiles() * rows * kLanes);
      k.matmul_float[static_cast<size_t>(format)](w->tile(0), w->tiles(), w->tile_bytes(), cols,
                                                  read, rows, out.data());
      return out;
    };
  };
  const std::string what = std::string(info(format).name) + ", " + std::to_string(rows) +
                           " rows, 3 taps of " + std::to_string(width);
  const Run run = with({x.data(), width, taps.data(), rows + 1, width, panel.data()});
  check(what, products(*w, Doubles(dense.begin(), dense.end()), rows), run);
  const Floats plain = on_every_isa(what, with({dense.data(), cols}));
  expect(same_bits(plain, on_every_isa(what, run)), what + " alike");
}

void test_taps() {
  for (const Format format : {Format::kF32, Format::kF16, Format::kBF16, Format::kF8})
    for (const size_t width : {1, 27, 130})
      for (const size_t rows : {1, 5, 23}) test_taps(format, width, rows);
}

void test_linear() {
  for (size_t f = 0; f < kFormats; ++f) {
    const Format format = static_cast<Format>(f);
    const size_t block = info(format).block;
    const size_t narrow = block == 1 ? 5 : block, wide = block == 1 ? 77 : block == 32 ? 608 : 768;
    const std::vector<size_t> rows =
        brief ? std::vector<size_t>{1, 7} : std::vector<size_t>{1, 2, 3, 4, 5, 8, 23};
    for (const size_t n : rows) test_linear(format, wide, n);
    test_linear(format, narrow, brief ? 51 : 512);
  }
}

// ---- attention ----

constexpr size_t kBlocks = 40;

struct Context {
  CacheType type;
  size_t dim, block_size;
  size_t slots = kBlocks * block_size;
  std::vector<int32_t> table = shuffled();
  Floats keys = floats(slots * dim), values = floats(slots * dim);
  Floats queries = floats(kMaxQueries * dim);
  size_t reach = 0;
  Floats relative = {};  // for distances from -reach - kLanes to reach + kLanes; empty: none

  // Scores of queries that see up to the position before theirs depend on the distance.
  void measure(size_t far) {
    reach = far;
    relative = floats(2 * (reach + kLanes) + 1);
    std::fill_n(relative.begin(), kLanes, relative[kLanes]);
    std::fill_n(relative.rbegin(), kLanes, *(relative.rbegin() + kLanes));
  }
  static std::vector<int32_t> shuffled() {
    std::vector<int32_t> blocks(kBlocks);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), rng);
    return blocks;
  }
  // Queries at the last positions that `length` has, as one sees another's heads and successors.
  Query query(size_t i, size_t length, size_t window, float* out) const {
    const size_t end = length - std::min(i / 2, length - 1);
    const size_t begin = end > window ? end - window : 0;
    return {queries.data() + i * dim,
            out,
            static_cast<int32_t>(begin),
            static_cast<int32_t>(end),
            relative.empty() ? nullptr : relative.data() + reach + kLanes,
            static_cast<int32_t>(end)};
  }
  // What the cache keeps of x[d], one of a position's `dim` values.
  double stored(const float* x, size_t d) const {
    if (type == CacheType::kF32) return x[d];
    if (type == CacheType::kF16) return half_to_float(float_to_half(x[d]));
    float peak = 0;
    for (size_t i = d / kGroup * kGroup; i < std::min(dim, d / kGroup * kGroup + kGroup); ++i)
      peak = std::max(peak, std::abs(x[i]));
    const float step = peak / 127;
    return std::clamp(std::nearbyint(x[d] / step), -127.0f, 127.0f) * double{step};
  }

  Floats run(const Kernels& k, size_t count, size_t length, size_t window, float softcap) const {
    const size_t key_block = key_bytes(type, dim) * block_size, row = value_bytes(type, dim);
    const size_t key_run = Plane::kRegion * key_block, run = Plane::kRegion * block_size * row;
    const size_t heads = 3, region = heads * (key_run + run);  // ours is the second
    std::vector<uint8_t> cache((kBlocks + Plane::kRegion - 1) / Plane::kRegion * region);
    const Plane own_keys{cache.data() + key_run, key_block, region};
    const Plane own_values{cache.data() + heads * key_run + run, row * block_size, region};
    for (size_t p = 0; p < length; ++p) {
      const size_t block = static_cast<size_t>(table[p / block_size]), at = p % block_size;
      k.store_key(keys.data() + p * dim, dim, block_size, own_keys.block(block), at);
      k.store_value(values.data() + p * dim, dim, own_values.block(block) + at * row);
    }
    Floats out(count * dim), pieces(count * dim);
    Query all[kMaxQueries];
    for (size_t i = 0; i < count; ++i) all[i] = query(i, length, window, out.data() + i * dim);
    AttendArgs args{all,
                    count,
                    own_keys,
                    own_values,
                    table.data(),
                    block_size,
                    dim,
                    row,
                    0.3f,
                    softcap,
                    static_cast<int32_t>(reach)};
    k.attend(args);
    const size_t segments = (length + kSegment - 1) / kSegment;
    std::vector<Floats> parts(segments, Floats(count * part_floats(dim)));
    std::vector<const float*> found;
    for (size_t s = 0; s < segments; ++s) {
      k.attend_segment(args, s, parts[s].data());
      found.push_back(parts[s].data());
    }
    for (size_t i = 0; i < count; ++i) all[i].out = pieces.data() + i * dim;
    k.merge_segments(args, found.data(), segments);
    expect(same_bits(out, pieces), "attention in pieces is not attention");
    return out;
  }

  Doubles expected(size_t count, size_t length, size_t window, float softcap) const {
    Doubles out(count * dim);
    for (size_t i = 0; i < count; ++i) {
      const Query q = query(i, length, window, nullptr);
      double total = 0;
      for (size_t p = static_cast<size_t>(q.begin); p < static_cast<size_t>(q.end); ++p) {
        double score = 0;
        for (size_t d = 0; d < dim; ++d) score += q.q[d] * stored(&keys[p * dim], d);
        score *= double{0.3f};
        const auto far = static_cast<ptrdiff_t>(reach);
        const ptrdiff_t apart = static_cast<ptrdiff_t>(p) - q.own;
        if (q.relative != nullptr) score += double{q.relative[std::clamp(apart, -far, far)]};
        if (softcap != 0) score = std::tanh(score / double{softcap}) * double{softcap};
        total += std::exp(score);
        for (size_t d = 0; d < dim; ++d)
          out[i * dim + d] += std::exp(score) * stored(&values[p * dim], d);
      }
      for (size_t d = 0; d < dim; ++d) out[i * dim + d] /= total;
    }
    return out;
  }
};

void test_attention() {
  for (const CacheType type : {CacheType::kF16, CacheType::kF32, CacheType::kQ8_0})
    for (const auto& [dim, block_size] : {std::pair<size_t, size_t>{20, 16}, {64, 32}, {112, 16}}) {
      if (brief && dim == 64) continue;
      Context context{type, dim, block_size};
      for (const size_t count : {1, 2, 3, 4, 7, 32}) {
        if (count > 2) context.measure(count == 4 ? 600 : count);
        for (const size_t length : {2, 37, 131, brief ? 300 : 600}) {
          if (brief && (count % 2 == 0 || length == 131)) continue;
          for (const auto& limits : {std::pair<size_t, float>{1000, 0.0f}, {50, 5.0f}}) {
            const size_t window = limits.first;
            const float softcap = limits.second;
            check(
                "attention, " + std::to_string(count) + " heads of " + std::to_string(dim) +
                    ", context " + std::to_string(length),
                context.expected(count, length, window, softcap),
                [&](const Kernels& k) { return context.run(k, count, length, window, softcap); },
                type);
          }
        }
      }
    }
}

// ---- rows ----

void test_norms() {
  for (const size_t group : {5, 16, 47, 128}) {
    const size_t cols = 3 * group;
    const Floats x = floats(cols, 3.0f), weight = floats(group), bias = floats(group);
    Doubles rms(cols), layer(cols), plain(cols);
    for (size_t begin = 0; begin < cols; begin += group) {
      double squares = 0, mean = 0, variance = 0;
      for (size_t c = 0; c < group; ++c) {
        squares += double{x[begin + c]} * x[begin + c] / static_cast<double>(group);
        mean += x[begin + c] / static_cast<double>(group);
      }
      for (size_t c = 0; c < group; ++c)
        variance += std::pow(x[begin + c] - mean, 2) / static_cast<double>(group);
      for (size_t c = 0; c < group; ++c) {
        rms[begin + c] = x[begin + c] * weight[c] / std::sqrt(squares + double{1e-5f});
        plain[begin + c] = (x[begin + c] - mean) * weight[c] / std::sqrt(variance + double{1e-5f});
        layer[begin + c] = plain[begin + c] + bias[c];
      }
    }
    const auto layer_norm = [&](const float* b) {
      return [&, b](const Kernels& k) {
        Floats out(cols);
        k.layer_norm(x.data(), cols, group, weight.data(), b, 1e-5f, out.data());
        return out;
      };
    };
    const std::string width = " of " + std::to_string(group);
    check("layer norm" + width, layer, layer_norm(bias.data()));
    check("layer norm without bias" + width, plain, layer_norm(nullptr));
    check("rms norm" + width, rms, [&](const Kernels& k) {
      Floats out(cols);
      k.rms_norm(x.data(), cols, group, weight.data(), 1e-5f, out.data());
      return out;
    });
  }
}

void test_columns(size_t cols) {
  const size_t rows = 37, stride = cols + 3;
  const Floats x = floats(rows * stride, 3.0f), factor = floats(cols), bias = floats(cols);
  Doubles moments(2 * cols), scaled(cols);
  for (size_t c = 0; c < cols; ++c) {
    double &mean = moments[c], &squares = moments[cols + c];
    for (size_t r = 0; r < rows; ++r) mean += x[r * stride + c] / static_cast<double>(rows);
    for (size_t r = 0; r < rows; ++r) squares += std::pow(x[r * stride + c] - mean, 2);
    const double y = (x[c] - double{bias[c]}) * factor[c] + double{bias[c]};
    scaled[c] = y / (1 + std::exp(-y));
  }
  check("moments of " + std::to_string(cols), moments, [&](const Kernels& k) {
    Floats out(2 * cols);
    k.moments(x.data(), stride, rows, cols, out.data(), out.data() + cols);
    return out;
  });
  check("scaled columns of " + std::to_string(cols), scaled, [&](const Kernels& k) {
    Floats out(cols);
    k.scale_columns(x.data(), bias.data(), factor.data(), bias.data(), Activation::kSilu, cols,
                    out.data());
    return out;
  });
}

double activate(Activation act, double x) {
  switch (act) {
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
    case Activation::kQuickGelu:
      return x / (1 + std::exp(-double{1.702f} * x));
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kNone:
      break;
  }
  return x;
}

void test_finish(Activation act, size_t n) {
  constexpr size_t kRows = 23, kStride = 19;
  const Floats gate = floats(kRows * kLanes, 4.0f), up = floats(kRows * kLanes), bias = floats(n);
  const Floats residual = floats(kRows * kStride);
  Doubles alone(kRows * kStride), added(kRows * kStride), gated(kRows * kStride);
  for (size_t r = 0; r < kRows; ++r)
    for (size_t c = 0; c < n; ++c) {
      const size_t to = r * kStride + c, from = r * kLanes + c;
      alone[to] = activate(act, gate[from]) * 0.75;
      added[to] = residual[to] + activate(act, gate[from] + bias[c]) * 0.75;
      gated[to] = activate(act, gate[from] + bias[c]) * (up[from] + bias[c]);
    }
  const auto finish = [&](const float* b, const float* rest) {
    return [&, b, rest](const Kernels& k) {
      Floats out(kRows * kStride);
      k.finish(gate.data(), kRows, b, act, 0.75f, rest, out.data(), kStride, n);
      return out;
    };
  };
  const std::string what =
      "activation " + std::to_string(static_cast<int>(act)) + " of " + std::to_string(n);
  check(what, alone, finish(nullptr, nullptr));
  check(what + " with bias and residual", added, finish(bias.data(), residual.data()));
  check(what + ", gated", gated, [&](const Kernels& k) {
    Floats out(kRows * kStride);
    k.finish_gated(gate.data(), up.data(), kRows, bias.data(), bias.data(), act, out.data(),
                   kStride, n);
    return out;
  });
}

void test_rows() {
  for (const size_t n : {1, 15, 16, 50, 1000}) {
    const Floats x = floats(n, 20.0f), y = floats(n), gate = floats(n);
    Doubles soft(n), capped(n), sum(n), gated(n);
    const double top = *std::max_element(x.begin(), x.end());
    double total = 0;
    for (const float v : x) total += std::exp(v - top);
    for (size_t i = 0; i < n; ++i) {
      soft[i] = std::exp(x[i] - top) / total;
      capped[i] = std::tanh(x[i] / 30.0) * 30;
      sum[i] = x[i] + 0.3f * double{y[i]};
      gated[i] = activate(Activation::kSilu, x[i] + 0.3f * double{gate[i]} * y[i]);
    }
    const std::string width = " of " + std::to_string(n);
    check("softmax" + width, soft, [&](const Kernels& k) {
      Floats out = x;
      k.softmax(out.data(), n);
      return out;
    });
    check("softcap" + width, capped, [&](const Kernels& k) {
      Floats out(n);
      k.softcap(x.data(), 30.0f, n, out.data());
      return out;
    });
    check("a scaled sum" + width, sum, [&](const Kernels& k) {
      Floats out(n);
      k.add_scaled(x.data(), y.data(), 0.3f, n, out.data());
      return out;
    });
    check("a gated sum" + width, gated, [&](const Kernels& k) {
      Floats out(n);
      k.add_gated(x.data(), y.data(), 0.3f, gate.data(), Activation::kSilu, n, out.data());
      return out;
    });
  }
}

// ---- NaN: whoever depends on one is one, everybody else is as without ----

using RunRows = std::function<Floats(const Kernels&, const Floats& x)>;

// Of `rows` rows of x the one with `bad` gives NaN, as far as `all` outputs of a row are wanted.
void spoils_its_row(const std::string& what, const Floats& x, size_t rows, float bad,
                    const RunRows& run) {
  for (const std::string_view isa : isas()) {
    const Kernels& k = *find_kernels(isa, CacheType::kF16);
    const Floats before = run(k, x);
    const size_t row = rows / 2, cols = x.size() / rows, outputs = before.size() / rows;
    Floats spoiled = x;
    spoiled[row * cols + rng() % cols] = bad;
    const Floats after = run(k, spoiled);
    bool right = true;
    for (size_t i = 0; i < after.size(); ++i)
      right = right && (i / outputs == row ? std::isnan(after[i])
                                           : memcmp(&after[i], &before[i], sizeof(float)) == 0);
    expect(right, what + " of " + std::to_string(bad) + " on " + std::string(isa));
  }
}

void test_nan_linear(Format format) {
  const TilePtr w = tile(format, 3 * kLanes, 256);
  for (const size_t rows : {1, 2, 5, 23, 64})
    for (const float bad : {kNan, kInf, -kInf}) {
      if (!w->is_integer() && std::isinf(bad)) continue;  // a float's products tell
      spoils_its_row("linear of " + std::string(info(format).name), activations(rows, 256), rows,
                     bad, [&](const Kernels& k, const Floats& x) {
                       ThreadPool pool(1);
                       Floats out(rows * w->rows());
                       linear_alone(k, pool, *w, x, rows, out.data());
                       return out;
                     });
    }
}

void test_nan_rows() {
  constexpr size_t kRows = 4, kCols = 48;
  const Floats x = floats(kRows * kCols), weight = floats(kCols);
  const auto by_row = [&](const auto& fn) {
    return [&, fn](const Kernels& k, const Floats& in) {
      Floats out(in.size());
      for (size_t i = 0; i < in.size(); i += kCols) fn(k, in.data() + i, out.data() + i);
      return out;
    };
  };
  spoils_its_row("rms norm", x, kRows, kNan, by_row([&](auto& k, auto* from, auto* to) {
                   k.rms_norm(from, kCols, kCols, weight.data(), 1e-5f, to);
                 }));
  spoils_its_row("layer norm", x, kRows, kNan, by_row([&](auto& k, auto* from, auto* to) {
                   k.layer_norm(from, kCols, kCols, weight.data(), nullptr, 1e-5f, to);
                 }));
  for (const float bad : {kNan, kInf})
    spoils_its_row("softmax", x, kRows, bad, by_row([&](auto& k, auto* from, auto* to) {
                     std::copy_n(from, kCols, to);
                     k.softmax(to, kCols);
                   }));
  // One value a row: what is not NaN is elsewhere.
  const Floats one = floats(20);
  for (const Activation act : {Activation::kNone, Activation::kSilu, Activation::kGelu,
                               Activation::kGeluTanh, Activation::kQuickGelu, Activation::kRelu})
    for (const bool gated : {false, true})
      spoils_its_row("activation " + std::to_string(static_cast<int>(act)), one, 20, kNan,
                     [&](const Kernels& k, const Floats& in) {
                       Floats acc(32), up(32, 2.0f), out(32);
                       std::copy(in.begin(), in.end(), acc.begin());
                       if (gated)
                         k.finish_gated(acc.data(), up.data(), 2, nullptr, nullptr, act, out.data(),
                                        kLanes, kLanes);
                       else
                         k.finish(acc.data(), 2, nullptr, act, 0.5f, up.data(), out.data(), kLanes,
                                  kLanes);
                       out.resize(20);
                       return out;
                     });
  spoils_its_row("softcap", one, 20, kNan, [](const Kernels& k, const Floats& in) {
    Floats out(20);
    k.softcap(in.data(), 3.0f, 20, out.data());
    return out;
  });
}

// In one query, or in the key or the value of one position.
void test_nan_attention(CacheType type, size_t dim, float bad) {
  constexpr size_t kLength = 300, kSeen = 100;
  const Context clean{type, dim, 16};
  for (const size_t count : {1, 3, 32})
    for (const auto& [softcap, where] :
         {std::pair{0.0f, 'q'}, {5.0f, 'q'}, {0.0f, 'k'}, {5.0f, 'k'}, {0.0f, 'v'}}) {
      if (std::isinf(bad) && (where == 'q' || type == CacheType::kF32)) continue;
      const size_t place = where == 'q' ? count / 2 : kLength - 3, d = dim / 2;
      Context spoiled = clean;
      (where == 'q'   ? spoiled.queries
       : where == 'k' ? spoiled.keys
                      : spoiled.values)[place * dim + d] = bad;
      for (const std::string_view isa : isas()) {
        const Kernels& k = *find_kernels(isa, type);
        const Floats before = clean.run(k, count, kLength, kSeen, softcap);
        const Floats after = spoiled.run(k, count, kLength, kSeen, softcap);
        bool right = true;
        for (size_t i = 0; i < count; ++i) {
          const Query query = clean.query(i, kLength, kSeen, nullptr);
          const auto position = static_cast<int32_t>(place);
          const bool hit =
              where == 'q' ? i == place : query.begin <= position && position < query.end;
          if (!hit)
            right = right && memcmp(&before[i * dim], &after[i * dim], 4 * dim) == 0;
          else if (where == 'v')
            right = right && std::isnan(after[i * dim + d]);
          else
            for (size_t c = 0; c < dim; ++c) right = right && std::isnan(after[i * dim + c]);
        }
        expect(right, std::string("attention with ") + where + " of " + std::to_string(bad) +
                          " on " + std::string(isa) + ", cache type " +
                          std::to_string(static_cast<int>(type)));
      }
    }
}

void test_nan() {
  for (size_t f = 0; f < kFormats; ++f) test_nan_linear(static_cast<Format>(f));
  test_nan_rows();
  for (const CacheType type : {CacheType::kF16, CacheType::kF32, CacheType::kQ8_0})
    for (const float bad : {kNan, kInf})
      for (const size_t dim : {20, 64}) test_nan_attention(type, dim, bad);
}

}  // namespace

void test_kernels() {
  test_nan();
  test_quantize();
  test_linear();
  test_taps();
  test_attention();
  test_norms();
  for (const size_t cols : {1, 15, 16, 100}) test_columns(cols);
  for (const Activation act : {Activation::kNone, Activation::kSilu, Activation::kGelu,
                               Activation::kGeluTanh, Activation::kQuickGelu, Activation::kRelu})
    for (const size_t n : {1, 7, 15, 16}) test_finish(act, n);
  test_rows();
}

}  // namespace squall::test
