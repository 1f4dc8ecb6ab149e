// Attention over a paged cache of keys and values. Included by kernels_impl.h.
//
// A query walks its context in segments of kSegment positions, and a segment in tiles of 64, all
// aligned to 0. A segment's sums are made by themselves and merged in order, so it does not matter
// who makes them. Positions that a query does not see never enter a sum, so what lies in their
// slots does not matter.
#pragma once

namespace {

using squall::AttendArgs;
using squall::CacheType;
using squall::kMaxHeadDim;
using squall::kMaxQueries;
using squall::kSegment;
using squall::padded;
using squall::Query;

constexpr size_t kTilePositions = 64;

// ---- what the cache holds; key(...) gives 16 positions' keys at a dimension, value(...) a
// position's values at 16 of them ----

template <class Element>
struct CacheOf {
  using Type = typename Element::Type;
  static constexpr size_t kBytes = sizeof(Type);  // of a value
  static inline void put_key(const float* k, size_t dim, size_t block_size, uint8_t* block,
                             size_t offset) {
    auto* to = reinterpret_cast<Type*>(block) + offset;
    spans(dim, [&](size_t i, size_t n) {
      Type row[kLanes];
      Element::write(row, load_first(k + i, n));
      for (size_t d = 0; d < n; ++d) to[(i + d) * block_size] = row[d];
    });
  }
  static inline void put_value(const float* v, size_t dim, uint8_t* row) {
    auto* to = reinterpret_cast<Type*>(row);
    spans(dim, [&](size_t i, size_t n) { Element::write(to + i, load_first(v + i, n)); });
  }
  static inline F32x16 key(const AttendArgs& a, const uint8_t* block, size_t offset, size_t d) {
    return load(reinterpret_cast<const Type*>(block) + d * a.block_size + offset);
  }
  static inline F32x16 value(const AttendArgs&, const uint8_t* row, size_t i) {
    return load(reinterpret_cast<const Type*>(row) + i);
  }
};

struct Half {
  using Type = uint16_t;
  // Saturates, as infinities would become NaN in sums; infinities themselves become NaN here.
  static inline void write(Type* p, F32x16 x) {
    const F32x16 near = max(set1(-65504.0f), min(set1(65504.0f), x));
    store(p, fma(x, zero(), near));
  }
};
struct Single {
  using Type = float;
  static inline void write(Type* p, F32x16 x) { store(p, x); }
};

// 32 dimensions of a position share a float scale. A block of keys is int8 [head_dim][block_size],
// then scales [groups][block_size]; a row of values int8 [padded head_dim], then scales [groups].
struct CacheQ8 {
  static constexpr size_t kBytes = 1;
  // Quantizes up to 32 floats; returns the scale.
  static inline float group(const float* x, size_t n, int8_t* q) {
    const size_t half = n < kLanes ? n : kLanes;
    const F32x16 part[2] = {load_first(x, half), load_first(x + half, n - half)};
    const float scale = max_of(max(abs(part[0]), abs(part[1]))) / 127.0f;
    const F32x16 step = set1(scale > 0.0f ? scale : 1.0f);
    for (size_t h = 0; h < 2; ++h) store_i8(q + kLanes * h, to_int8(div(part[h], step)));
    return scale + unless_finite(part[0], part[1]);
  }
  static inline void put_key(const float* k, size_t dim, size_t block_size, uint8_t* block,
                             size_t offset) {
    auto* scales = reinterpret_cast<float*>(block + dim * block_size);
    for (size_t i = 0; i < dim; i += kGroup, scales += block_size) {
      int8_t q[kGroup];
      const size_t n = dim - i < kGroup ? dim - i : kGroup;
      scales[offset] = group(k + i, n, q);
      for (size_t d = 0; d < n; ++d)
        block[(i + d) * block_size + offset] = static_cast<uint8_t>(q[d]);
    }
  }
  static inline void put_value(const float* v, size_t dim, uint8_t* row) {
    auto* scales = reinterpret_cast<float*>(row + padded(dim));
    for (size_t i = 0; i < dim; i += kGroup, ++scales) {
      int8_t q[kGroup];
      const size_t n = dim - i < kGroup ? dim - i : kGroup;
      *scales = group(v + i, n, q);
      __builtin_memcpy(row + i, q, n);
    }
  }
  static inline F32x16 key(const AttendArgs& a, const uint8_t* block, size_t offset, size_t d) {
    const auto* scales = reinterpret_cast<const float*>(block + a.head_dim * a.block_size);
    return mul(load_i8(block + d * a.block_size + offset),
               load(scales + d / kGroup * a.block_size + offset));
  }
  static inline F32x16 value(const AttendArgs& a, const uint8_t* row, size_t i) {
    const auto* scales = reinterpret_cast<const float*>(row + padded(a.head_dim));
    return mul(load_i8(row + i), set1(scales[i / kGroup]));
  }
};

// ---- sums of a query over some positions ----

struct Sums {
  float total[kLanes];  // of the weights, lane by lane
  float peak[kLanes];   // [0]: the largest score, in powers of 2; the weights are relative to it
  float mix[kMaxHeadDim];

  void clear(size_t width) {
    store(total, zero());
    peak[0] = -FLT_MAX;
    for (size_t i = 0; i < width; i += kLanes) store(mix + i, zero());
  }
  void scale(float by, size_t width) {
    store(total, mul(load(total), set1(by)));
    for (size_t i = 0; i < width; i += kLanes) store(mix + i, mul(load(mix + i), set1(by)));
  }
};
static_assert(sizeof(Sums) == squall::part_floats(kMaxHeadDim) * sizeof(float));

constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x <= 0, within 2 ulp down to 2^-126, which stands for all below: Taylor's series.
inline F32x16 exp2(F32x16 x) {
  x = max(set1(-126.0f), x);
  const F32x16 n = round_even(x), r = sub(x, n);
  F32x16 p = set1(1.5403530e-4f);
  p = fma(p, r, set1(1.3333558e-3f));
  p = fma(p, r, set1(9.6181291e-3f));
  p = fma(p, r, set1(5.5504109e-2f));
  p = fma(p, r, set1(2.4022651e-1f));
  p = fma(p, r, set1(6.9314718e-1f));
  return scale_exponent(fma(p, r, set1(1.0f)), n);
}
inline float exp2_of(float x) {
  float e[kLanes];
  store(e, exp2(set1(x)));
  return e[0];
}

// The sums of earlier positions and of later ones become those of both.
inline void merge(Sums& sums, const Sums& later, size_t width) {
  const float peak = sums.peak[0] > later.peak[0] ? sums.peak[0] : later.peak[0];
  const F32x16 a = set1(exp2_of(sums.peak[0] - peak)), b = set1(exp2_of(later.peak[0] - peak));
  const auto both = [&](float* x, const float* y) { store(x, fma(load(y), b, mul(load(x), a))); };
  sums.peak[0] = peak;
  both(sums.total, later.total);
  for (size_t i = 0; i < width; i += kLanes) both(sums.mix + i, later.mix + i);
}

inline void write_out(const Query& query, const Sums& sums, size_t head_dim) {
  // Where no score is above -infinity, there is nothing to mix; where none is seen, zeros.
  const bool blind = query.begin >= query.end, none = !(sums.peak[0] > -FLT_MAX);
  const F32x16 total = set1(blind ? 1.0f : sum(load(sums.total)) + (none ? NAN : 0.0f));
  spans(head_dim,
        [&](size_t i, size_t n) { store_first(query.out + i, div(load(sums.mix + i), total), n); });
}

struct Seen {  // lanes of a tile
  size_t from, to;
  Seen(size_t tile, int32_t begin, int32_t end) : from(lane(tile, begin)), to(lane(tile, end)) {
    if (from >= to) from = to = 0;
  }
  static size_t lane(size_t tile, int32_t position) {
    const size_t at = static_cast<size_t>(position);
    return at < tile ? 0 : (at - tile < kTilePositions ? at - tile : kTilePositions);
  }
  Mask mask(size_t lane) const {
    const size_t first = from > lane ? from - lane : 0, last = to > lane ? to - lane : 0;
    return lanes(first < kLanes ? first : kLanes, last < kLanes ? last : kLanes);
  }
  bool whole(size_t lane) const { return from <= lane && to >= lane + kLanes; }
};

// Calls fn.operator()<n>(first) for blocks of n <= kBlock that make up [at, count).
template <int kBlock, class Fn>
inline void blocks(size_t count, const Fn& fn, size_t at = 0) {
  for (; count - at >= kBlock; at += kBlock) fn.template operator()<kBlock>(at);
  if constexpr (kBlock > 1) blocks<kBlock - 1>(count, fn, at);
}

// Where the keys and values of a tile are: in the cache, or copied from it as floats. rows(lane)
// reaches to the next multiple of 16.
struct Copied {
  const float* data;  // keys [head_dim][64] or values [64][width]
  size_t stride;

  struct Keys {
    const float* at;
    size_t stride;
    F32x16 get(size_t d, int v) const { return load(at + d * stride + 16 * v); }
  };
  template <int kVectors>
  Keys keys(size_t lane) const {
    return {data + lane, stride};
  }
  struct Rows {
    const float* at;
    size_t stride;
    F32x16 get(size_t i, size_t column) const { return load(at + i * stride + column); }
  };
  Rows rows(size_t lane) const { return {data + lane * stride, stride}; }
};

// While keys are read, the values of the same positions come into the second-level cache, and with
// values the keys of the next tile, up to `end`: otherwise memory would rest while there is
// something to compute. (The first-level cache has no room for a second tile.)
template <class Cache>
struct Cached {
  const AttendArgs& a;
  size_t tile, end;

  const uint8_t* block(size_t position) const {
    return a.keys.block(static_cast<size_t>(a.table[position / a.block_size]));
  }
  const uint8_t* row(size_t position) const {
    const uint8_t* rows = a.values.block(static_cast<size_t>(a.table[position / a.block_size]));
    return rows + position % a.block_size * a.value_bytes;
  }
  const uint8_t* next_keys(size_t position) const {
    const size_t next = position + kTilePositions < end ? position + kTilePositions : position;
    return block(next) + next % a.block_size * (a.keys.block_bytes / a.block_size);
  }

  template <int kVectors>
  struct Keys {
    const AttendArgs& a;
    const uint8_t *block[kVectors], *values[kVectors];
    size_t offset[kVectors];
    F32x16 get(size_t d, int v) const {
      prefetch(values[v] + d * kLanes * Cache::kBytes);
      return Cache::key(a, block[v], offset[v], d);
    }
  };
  template <int kVectors>
  Keys<kVectors> keys(size_t lane) const {
    Keys<kVectors> found{a, {}, {}, {}};
    for (size_t v = 0; v < kVectors; ++v) {
      const size_t position = tile + lane + kLanes * v;
      found.block[v] = block(position);
      found.values[v] = row(position);
      found.offset[v] = position % a.block_size;
    }
    return found;
  }
  struct Rows {
    const AttendArgs& a;
    const uint8_t *at, *keys;
    F32x16 get(size_t i, size_t column) const {
      prefetch(keys + i * a.value_bytes + column * Cache::kBytes);
      return Cache::value(a, at + i * a.value_bytes, column);
    }
  };
  Rows rows(size_t lane) const { return {a, row(tile + lane), next_keys(tile + lane)}; }
};

// p[query][16 * kVectors] = q . keys from `lane` on
template <int kQueries, int kVectors, class Source>
inline void scores(const Query* queries, const Source& source, size_t head_dim,
                   float (*p)[kTilePositions], size_t lane) {
  F32x16 acc[kQueries][kVectors];
  for (auto& row : acc)
    for (F32x16& x : row) x = zero();
  const auto keys = source.template keys<kVectors>(lane);
  for (size_t d = 0; d < head_dim; ++d) {
    F32x16 k[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) k[v] = keys.get(d, v);
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      const F32x16 q = set1(queries[i].q[d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(k[v], q, acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store(p[i] + lane + kLanes * static_cast<size_t>(v), acc[i][v]);
}

// sums.mix[column ...] += p . values for lanes [from, to), in ascending order
template <int kQueries, int kVectors, class Source>
inline void mix(Sums* sums, const float (*p)[kTilePositions], const Source& source, size_t from,
                size_t to, size_t column) {
  F32x16 acc[kQueries][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      acc[i][v] = load(sums[i].mix + column + kLanes * static_cast<size_t>(v));
  while (from < to) {
    const auto rows = source.rows(from);
    const size_t end = from / kLanes * kLanes + kLanes, n = (end < to ? end : to) - from;
    for (size_t lane = 0; lane < n; ++lane) {
      F32x16 x[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        x[v] = rows.get(lane, column + kLanes * static_cast<size_t>(v));
#pragma GCC unroll 8
      for (int i = 0; i < kQueries; ++i) {
        const F32x16 weight = set1(p[i][from + lane]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(x[v], weight, acc[i][v]);
      }
    }
    from += n;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store(sums[i].mix + column + kLanes * static_cast<size_t>(v), acc[i][v]);
}

template <int kQueries, class Source>
inline void mix_columns(Sums* sums, const float (*p)[kTilePositions], const Source& source,
                        size_t width, size_t from, size_t to) {
  size_t column = 0;
  for (; column + kLanes * kVectorBlock <= width; column += kLanes * kVectorBlock)
    mix<kQueries, kVectorBlock>(sums, p, source, from, to, column);
  for (; column < width; column += kLanes) mix<kQueries, 1>(sums, p, source, from, to, column);
}

// p = scale * p + what the query adds by distance, for lanes [from, to)
inline void add_relative(const AttendArgs& a, const Query& query, size_t tile, size_t from,
                         size_t to, float* p) {
  constexpr auto kBefore = static_cast<ptrdiff_t>(kLanes);
  const auto reach = static_cast<ptrdiff_t>(a.reach);
  for (size_t lane = from / kLanes * kLanes; lane < to; lane += kLanes) {
    ptrdiff_t apart = static_cast<ptrdiff_t>(tile + lane) - query.own;
    apart = apart < -reach - kBefore ? -reach - kBefore : apart > reach ? reach : apart;
    store(p + lane, fma(load(p + lane), set1(a.scale), load(query.relative + apart)));
  }
}

// Scores to weights, which join the total; the sums so far are brought to the new maximum. kWhole:
// all lanes are seen.
template <bool kWhole>
inline void weigh(float scale, float softcap, const Seen& seen, float* p, Sums& sums,
                  size_t width) {
  const size_t first = kWhole ? 0 : seen.from / kLanes, last = kWhole ? 4 : (seen.to + 15) / kLanes;
  const auto visible = [&](size_t i, F32x16 x, F32x16 otherwise) {
    return kWhole ? x : select(seen.mask(i * kLanes), x, otherwise);
  };
  F32x16 s[4], peak = set1(-FLT_MAX);
#pragma GCC unroll 4
  for (size_t i = first; i < last; ++i) {
    s[i] = load(p + i * kLanes);
    if (softcap != 0.0f) s[i] = mul(tanh(mul(s[i], set1(scale / softcap))), set1(softcap));
    s[i] = mul(s[i], set1(softcap != 0.0f ? kLog2E : scale * kLog2E));
    s[i] = visible(i, s[i], set1(-FLT_MAX));
    peak = max(peak, s[i]);
  }
  const float top = max_of(peak);
  if (top > sums.peak[0]) {
    sums.scale(exp2_of(sums.peak[0] - top), width);
    sums.peak[0] = top;
  }
  F32x16 total = load(sums.total);
#pragma GCC unroll 4
  for (size_t i = first; i < last; ++i) {
    const F32x16 e = visible(i, exp2(sub(s[i], set1(sums.peak[0]))), zero());
    store(p + i * kLanes, e);
    total = add(total, e);
  }
  store(sums.total, total);
}

template <class Cache>
struct Attention {
  // Too large for the stacks that some systems give their threads.
  struct Work {
    Sums all[kMaxQueries], sums[kMaxQueries];
    float p[kMaxQueries][kTilePositions];
    float scratch[kTilePositions * kMaxHeadDim];  // the tile's keys, then its values
  };

  const AttendArgs& a;
  const size_t width = padded(a.head_dim);
  Work& work = *static_cast<Work*>(squall::thread_memory(sizeof(Work)));
  Sums* const sums = work.sums;
  float (*const p)[kTilePositions] = work.p;
  float* const scratch = work.scratch;

  explicit Attention(const AttendArgs& args) : a(args) {}

  // [begin, end) comes to hold what the query sees, too.
  static void widen(const Query& query, size_t& begin, size_t& end) {
    if (query.begin >= query.end) return;
    const size_t from = static_cast<size_t>(query.begin), to = static_cast<size_t>(query.end);
    begin = from < begin ? from : begin;
    end = to > end ? to : end;
  }

  void segment(size_t index) {
    size_t begin = SIZE_MAX, end = 0;
    for (size_t i = 0; i < a.count; ++i) {
      sums[i].clear(width);
      widen(a.queries[i], begin, end);
    }
    const size_t first = index * kSegment, last = first + kSegment;
    begin = begin > first ? begin / kTilePositions * kTilePositions : first;
    for (size_t tile = begin; tile < end && tile < last; tile += kTilePositions) step(tile, end);
  }

  void step(size_t tile, size_t end) {
    Seen all(tile, 0, 0);
    all.from = kTilePositions;
    for (size_t i = 0; i < a.count; ++i) {
      const Seen one = seen(i, tile);
      if (one.to == 0) continue;
      all.from = one.from < all.from ? one.from : all.from;
      all.to = one.to > all.to ? one.to : all.to;
    }
    if (all.to == 0) return;
    const Cached<Cache> cached{a, tile, end};
    if (a.count <= kQueryBlock) {  // read once anyway
      score_all(all, cached);
      weigh_all(tile, all);
      mix_all(tile, all, cached);
      return;
    }
    copy_keys(cached, all);
    score_all(all, Copied{scratch, kTilePositions});
    weigh_all(tile, all);
    copy_values(cached, all);
    mix_all(tile, all, Copied{scratch, width});
  }

  template <class Source>
  void score_all(const Seen& all, const Source& source) {
    blocks<kQueryBlock>(a.count, [&]<int kQueries>(size_t i) { score<kQueries>(i, all, source); });
  }
  void weigh_all(size_t tile, const Seen& all) {
    const bool relative = a.queries[0].relative != nullptr;
    const float scale = relative ? 1.0f : a.scale;
    for (size_t i = 0; relative && i < a.count; ++i)
      add_relative(a, a.queries[i], tile, all.from, all.to, p[i]);
    for (size_t i = 0; i < a.count; ++i)
      if (const Seen one = seen(i, tile); one.to - one.from == kTilePositions)
        weigh<true>(scale, a.softcap, one, p[i], sums[i], width);
      else if (one.to > 0)
        weigh<false>(scale, a.softcap, one, p[i], sums[i], width);
  }
  template <class Source>
  void mix_all(size_t tile, const Seen& all, const Source& source) {
    blocks<kQueryBlock>(a.count,
                        [&]<int kQueries>(size_t i) { mix_tile<kQueries>(i, tile, all, source); });
  }

  Seen seen(size_t i, size_t tile) const { return {tile, a.queries[i].begin, a.queries[i].end}; }

  void copy_keys(const Cached<Cache>& cached, const Seen& all) {
    for (size_t lane = all.from / kLanes * kLanes; lane < all.to; lane += kLanes) {
      const auto keys = cached.template keys<1>(lane);
      for (size_t d = 0; d < a.head_dim; ++d)
        store(scratch + d * kTilePositions + lane, keys.get(d, 0));
    }
  }
  void copy_values(const Cached<Cache>& cached, const Seen& all) {
    for (size_t first = all.from / kLanes * kLanes; first < all.to; first += kLanes) {
      const auto rows = cached.rows(first);
      for (size_t lane = 0; lane < kLanes; ++lane)
        for (size_t i = 0; i < width; i += kLanes)
          store(scratch + (first + lane) * width + i, rows.get(lane, i));
    }
  }

  template <int kQueries, class Source>
  void score(size_t i, const Seen& all, const Source& source) {
    constexpr size_t kWide = kLanes * kVectorBlock;
    size_t lane = all.from / kLanes * kLanes;
    for (; lane % kWide == 0 && lane + kWide < all.to + kLanes; lane += kWide)
      scores<kQueries, kVectorBlock>(a.queries + i, source, a.head_dim, p + i, lane);
    for (; lane < all.to; lane += kLanes)
      scores<kQueries, 1>(a.queries + i, source, a.head_dim, p + i, lane);
  }

  template <int kQueries, class Source>
  void mix_tile(size_t i, size_t tile, const Seen& all, const Source& source) {
    size_t from = all.from / kLanes * kLanes, to = from;
    const auto flush = [&] {
      if (from < to) mix_columns<kQueries>(sums + i, p + i, source, width, from, to);
    };
    for (size_t lane = from; lane < all.to; lane += kLanes) {
      bool whole = true;
      for (size_t n = 0; n < kQueries; ++n) whole = whole && seen(i + n, tile).whole(lane);
      if (whole) {
        to = lane + kLanes;
        continue;
      }
      flush();
      from = to = lane + kLanes;
      for (size_t n = i; n < i + kQueries; ++n) {
        const Seen one = seen(n, tile);
        const size_t begin = one.from > lane ? one.from : lane;
        const size_t end = one.to < lane + kLanes ? one.to : lane + kLanes;
        if (begin < end) mix_columns<1>(sums + n, p + n, source, width, begin, end);
      }
    }
    flush();
  }
};

template <class Cache>
void attend(const AttendArgs& a) {
  Attention<Cache> attention(a);
  Sums* const all = attention.work.all;
  size_t begin = SIZE_MAX, end = 0;
  for (size_t i = 0; i < a.count; ++i) {
    all[i].clear(attention.width);
    attention.widen(a.queries[i], begin, end);
  }
  for (size_t s = begin / kSegment; s * kSegment < end; ++s) {
    attention.segment(s);
    for (size_t i = 0; i < a.count; ++i) merge(all[i], attention.sums[i], attention.width);
  }
  for (size_t i = 0; i < a.count; ++i) write_out(a.queries[i], all[i], a.head_dim);
}

template <class Cache>
void attend_segment(const AttendArgs& a, size_t segment, float* parts) {
  Attention<Cache> attention(a);
  attention.segment(segment);
  const size_t size = squall::part_floats(a.head_dim);
  for (size_t i = 0; i < a.count; ++i)
    __builtin_memcpy(parts + i * size, &attention.sums[i], size * sizeof(float));
}

void merge_segments(const AttendArgs& a, const float* const* parts, size_t segments) {
  const size_t size = squall::part_floats(a.head_dim), width = padded(a.head_dim);
  for (size_t i = 0; i < a.count; ++i) {
    Sums all, part;
    all.clear(width);
    for (size_t s = 0; s < segments; ++s) {
      __builtin_memcpy(&part, parts[s] + i * size, size * sizeof(float));
      merge(all, part, width);
    }
    write_out(a.queries[i], all, a.head_dim);
  }
}

}  // namespace
