// Every kernel, written once over sixteen lanes. Included by kernels_<isa>.cpp after that ISA's
// simd_<isa>.h.
//
// Bit-exactness: the operations on a row, and their order, depend on that row alone. Sums of codes
// are integers; float sums run over groups, columns or positions in ascending order, one
// accumulator a lane. No templates of the standard library here: the linker might keep this ISA's
// copy for the others.
#pragma once
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "half.h"
#include "kernels.h"

namespace {

using squall::Activation;
using squall::FineGroup;
using squall::FloatRows;
using squall::kFineRatio;
using squall::kGroup;
using squall::kLanes;
using squall::kSuper;
using squall::QuantGroup;

// to the second-level cache
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

inline const uint16_t* halves(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

template <class Fn>  // fn(offset, lanes) over [0, n)
inline void spans(size_t n, Fn fn) {
  for (size_t i = 0; i < n; i += kLanes) fn(i, n - i < kLanes ? n - i : kLanes);
}

inline void copy(const float* from, size_t n, float* to) {
  spans(n, [&](size_t i, size_t m) { store_first(to + i, load_first(from + i, m), m); });
}

// ---- codes ----

template <int kBits>
struct Planes;  // vector(p, j): the codes of columns 4j..4j+3 of a 32-column run at p

template <>
struct Planes<1> {
  template <int j>
  [[gnu::always_inline]] static inline U8x64 vector(const uint8_t* p) {
    return bits_of<j, 0>(load_codes(p), 1);
  }
};
template <>
struct Planes<8> {
  template <int j>
  [[gnu::always_inline]] static inline U8x64 vector(const uint8_t* p) {
    return load_codes(p + 64 * j);
  }
};
template <>
struct Planes<4> {
  template <int j>
  [[gnu::always_inline]] static inline U8x64 vector(const uint8_t* p) {
    return bits_of<4 * (j % 2), 0>(load_codes(p + 64 * (j / 2)), 15);
  }
};
template <>
struct Planes<2> {
  template <int j>
  [[gnu::always_inline]] static inline U8x64 vector(const uint8_t* p) {
    return bits_of<2 * (j % 4), 0>(load_codes(p + 64 * (j / 4)), 3);
  }
};
template <>
struct Planes<3> {
  template <int j>
  [[gnu::always_inline]] static inline U8x64 vector(const uint8_t* p) {
    const U8x64 high = bits_of<(j > 2 ? j - 2 : 0), (j < 2 ? 2 - j : 0)>(load_codes(p + 128), 4);
    return either(Planes<2>::vector<j>(p), high);
  }
};
template <>
struct Planes<5> {
  template <int j>
  [[gnu::always_inline]] static inline U8x64 vector(const uint8_t* p) {
    const U8x64 high = bits_of<(j > 4 ? j - 4 : 0), (j < 4 ? 4 - j : 0)>(load_codes(p + 256), 16);
    return either(Planes<4>::vector<j>(p), high);
  }
};
template <>
struct Planes<6> {
  template <int j>
  [[gnu::always_inline]] static inline U8x64 vector(const uint8_t* p) {
    constexpr int kAt = 2 * (j % 4);
    const U8x64 high = bits_of<(kAt > 4 ? kAt - 4 : 0), (kAt < 4 ? 4 - kAt : 0)>(
        load_codes(p + 256 + 64 * (j / 4)), 48);
    return either(Planes<4>::vector<j>(p), high);
  }
};

// ---- scales: `of(p, run)` gives those of the 32-column run `run` of a chunk at p ----

struct Scale {
  F32x16 scale[2];  // of the two halves when groups are 16 wide, else [0]
  F32x16 minimum[2];
};

struct Direct {  // f16 d a run
  static constexpr size_t kRuns = 2, kBytes = 64;
  static constexpr bool kHalves = false, kMinimum = false;
  [[gnu::always_inline]] static inline Scale of(const uint8_t* p, size_t run) {
    const F32x16 d = load(halves(p + 32 * run));
    return {{d, d}, {d, d}};
  }
};
struct DirectMinimum {  // f16 d, f16 m a run
  static constexpr size_t kRuns = 1, kBytes = 64;
  static constexpr bool kHalves = false, kMinimum = true;
  [[gnu::always_inline]] static inline Scale of(const uint8_t* p, size_t) {
    const F32x16 d = load(halves(p)), m = load(halves(p + 32));
    return {{d, d}, {m, m}};
  }
};
struct PairMinimum {  // f16 d, f16 m two runs
  static constexpr size_t kRuns = 2, kBytes = 64;
  static constexpr bool kHalves = false, kMinimum = true;
  [[gnu::always_inline]] static inline Scale of(const uint8_t* p, size_t) {
    return DirectMinimum::of(p, 0);
  }
};
template <int kMiddle>
struct ZeroCode {  // f16 d, f16 code of zero a block; kMiddle: what the kernel takes for zero
  static constexpr size_t kRuns = 0, kBytes = 64;  // blocks of any size
  static constexpr bool kHalves = false, kMinimum = true;
  [[gnu::always_inline]] static inline Scale of(const uint8_t* p, size_t) {
    const F32x16 d = load(halves(p));
    const F32x16 m = mul(d, ::sub(set1(static_cast<float>(kMiddle)), load(halves(p + 32))));
    return {{d, d}, {m, m}};
  }
};
struct Super4 {  // q4_k, q5_k: f16 d, f16 dmin a 256; u8 scale, u8 minimum a run
  static constexpr size_t kRuns = 8, kBytes = 64 + 8 * 32;
  static constexpr bool kHalves = false, kMinimum = true;
  [[gnu::always_inline]] static inline Scale of(const uint8_t* p, size_t run) {
    const uint8_t* sub = p + 64 + 32 * run;
    const F32x16 d = mul(load(halves(p)), load_u8(sub));
    const F32x16 m = mul(load(halves(p + 32)), load_u8(sub + 16));
    const F32x16 minus = sub_zero(m);
    return {{d, d}, {minus, minus}};
  }
  static inline F32x16 sub_zero(F32x16 m) { return ::sub(zero(), m); }
};
struct Super2 {  // q2_k: f16 d, f16 dmin a 256; nibbles (scale, minimum) a half run
  static constexpr size_t kRuns = 8, kBytes = 64 + 16 * 16;
  static constexpr bool kHalves = true, kMinimum = true;
  [[gnu::always_inline]] static inline Scale of(const uint8_t* p, size_t run) {
    const uint8_t* sub = p + 64 + 32 * run;
    const F32x16 d = load(halves(p)), m = ::sub(zero(), load(halves(p + 32)));
    return {{mul(d, load_nibbles(sub, false)), mul(d, load_nibbles(sub + 16, false))},
            {mul(m, load_nibbles(sub, true)), mul(m, load_nibbles(sub + 16, true))}};
  }
};
struct Super6 {  // q3_k, q6_k: f16 d a 256; i8 scale a half run
  static constexpr size_t kRuns = 8, kBytes = 32 + 16 * 16;
  static constexpr bool kHalves = true, kMinimum = false;
  [[gnu::always_inline]] static inline Scale of(const uint8_t* p, size_t run) {
    const uint8_t* sub = p + 32 + 32 * run;
    const F32x16 d = load(halves(p));
    const F32x16 a = mul(d, load_i8(sub)), b = mul(d, load_i8(sub + 16));
    return {{a, b}, {a, b}};
  }
};
struct Super8 {  // q8_k: f32 d a 256
  static constexpr size_t kRuns = 8, kBytes = 64;
  static constexpr bool kHalves = false, kMinimum = false;
  [[gnu::always_inline]] static inline Scale of(const uint8_t* p, size_t) {
    const F32x16 d = load(reinterpret_cast<const float*>(p));
    return {{d, d}, {d, d}};
  }
};

template <bool kHalves_, bool kMinimum_>
struct ExpandedScales {  // f32 scales, f32 minima a run
  static constexpr bool kHalves = kHalves_, kMinimum = kMinimum_;
  static constexpr size_t kParts = kHalves ? 2 : 1;
  static constexpr size_t kRuns = 1, kBytes = 64 * kParts * (kMinimum ? 2 : 1);
  [[gnu::always_inline]] static inline Scale of(const uint8_t* p, size_t) {
    const auto* f = reinterpret_cast<const float*>(p);
    const F32x16 a = load(f), b = load(f + 16 * (kParts - 1));
    if constexpr (!kMinimum) return {{a, b}, {a, b}};
    return {{a, b}, {load(f + 16 * kParts), load(f + 16 * (2 * kParts - 1))}};
  }
  static inline void put(const Scale& s, uint8_t* p) {
    auto* f = reinterpret_cast<float*>(p);
    for (size_t i = 0; i < kParts; ++i) {
      store(f + 16 * i, s.scale[i]);
      if constexpr (kMinimum) store(f + 16 * (kParts + i), s.minimum[i]);
    }
  }
};

// ---- integer matmul ----

// Runs of four codes whose pairs of products, added up, fit 16 bits where dot() adds to those
// first: each is at most 2 * 127 * code.
template <int kBits>
constexpr int kPairRun = !kDotAddsPairs ? 0
                         : kBits <= 4   ? 8
                         : kBits == 5   ? 4
                         : kBits == 6   ? 2
                                        : 1;

// The most bits of codes that are multiplied as these are.
constexpr int pair_bits(int bits) {
  constexpr int kRuns[] = {0, 0, 0, 0, kPairRun<4>, kPairRun<5>, kPairRun<6>, kPairRun<7>};
  int most = bits;
  while (most < 7 && kRuns[most + 1] == kRuns[bits < 4 ? 4 : bits]) ++most;
  return most;
}

// kBits: range of the codes; kZero: log2 of the code that means zero, or -1; kStored: bits a code
// takes in memory
template <int kBits_, class Scales_, int kZero_, int kStored_ = kBits_>
struct IntegerTile {
  static constexpr int kBits = kBits_, kStored = kStored_;
  static constexpr int kZero = kBits_ == 8 && kSignedDot8 ? -1 : kZero_;
  using Scales = Scales_;
  // The same tile taken apart for many rows: a byte a code, floats for scales. Tiles that are then
  // alike share kernels.
  using Expanded =
      IntegerTile<pair_bits(kBits_), ExpandedScales<Scales::kHalves, Scales::kMinimum>, kZero_, 8>;
};

template <class Tile>
[[gnu::always_inline]] inline I32x16 start(const int32_t* minus_q) {
  if constexpr (Tile::kZero >= 0)
    return splat_shifted<Tile::kZero>(minus_q);
  else
    return izero();
}

// Sums of kTiles tiles and kRows rows: [tile][row].
template <class T, int kTiles, int kRows>
using Block = T[kTiles][kRows];

// acc += codes [j, kTo) . the rows' int8, in runs of four; rows(r) is where they are
template <class Tile, int kTo, int j, int kTiles, int kRows, class Acc, class Rows>
[[gnu::always_inline]] inline void dots(Block<Acc, kTiles, kRows>& acc, const uint8_t* const* codes,
                                        Rows rows) {
  if constexpr (j < kTo) {
    U8x64 w[kTiles];
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) w[t] = Planes<Tile::kStored>::template vector<j>(codes[t]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) acc[t][r] = dot<Tile::kBits, j>(acc[t][r], w[t], rows(r));
    dots<Tile, kTo, j + 1>(acc, codes, rows);
  }
}

// The same of one tile and row: where that is a lot of code, all scales share it.
template <int kBits, int kStored, int kTo, int j>
[[gnu::noinline]] I32x16 shared_dots(I32x16 start, const uint8_t* codes, const int8_t* x) {
  Block<I32x16, 1, 1> acc = {{start}};
  dots<IntegerTile<kBits, Direct, -1, kStored>, kTo, j>(acc, &codes, [=](int) { return x; });
  return acc[0][0];
}

// The same; where an ISA adds up pairs of products first, as many as surely fit 16 bits.
template <class Tile, int kTo, int j, int kTiles, int kRows, class Rows>
[[gnu::always_inline]] inline void all_dots(Block<I32x16, kTiles, kRows>& acc,
                                            const uint8_t* const* codes, Rows rows) {
  constexpr int kRun = kPairRun<Tile::kBits>, kEnd = j + kRun < kTo ? j + kRun : kTo;
  if constexpr (kRowBlock == 1) {
    acc[0][0] = shared_dots<Tile::kBits, Tile::kStored, kTo, j>(acc[0][0], codes[0], rows(0));
  } else if constexpr (kRun == 0) {
    dots<Tile, kTo, j>(acc, codes, rows);
  } else if constexpr (j < kTo) {
    Block<I16x32, kTiles, kRows> pairs = {};
    dots<Tile, kEnd, j>(pairs, codes, rows);
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[t][r] = add_pairs(acc[t][r], pairs[t][r]);
    all_dots<Tile, kTo, kEnd>(acc, codes, rows);
  }
}

// One group of every row: where it is, and its finer digits.
template <int kRows>
struct Groups {
  const QuantGroup* x;
  size_t stride, groups;  // of a row
  int32_t fine = 0;       // some row's group is

  [[gnu::always_inline]] inline const QuantGroup& group(int r) const {
    return x[static_cast<size_t>(r) * stride];
  }
  [[gnu::always_inline]] inline const FineGroup& digits(int r) const {  // of a fine group
    return *reinterpret_cast<const FineGroup*>(&group(r) + groups);
  }
};

// Keeps the compiler from holding in registers what it read through p before.
[[gnu::always_inline]] inline const uint8_t* afresh(const uint8_t* p) {
  asm("" : "+r"(p));
  return p;
}

// The dot products of one half of a group (kParts 2) or of all of it.
template <class Tile, int kParts, int kPart, int kTiles, int kRows>
[[gnu::always_inline]] inline void part_dots(Block<F32x16, kTiles, kRows>& sum,
                                             const uint8_t* const* codes, const Groups<kRows>& at) {
  constexpr int kFrom = 8 / kParts * kPart, kTo = kFrom + 8 / kParts;
  Block<I32x16, kTiles, kRows> acc;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const QuantGroup& g = at.group(r);
    const I32x16 zero_point = start<Tile>(kParts == 2 ? g.minus_half_q + kPart : &g.minus_q);
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) acc[t][r] = zero_point;
  }
  all_dots<Tile, kTo, kFrom>(acc, codes, [&](int r) { return at.group(r).q; });
  if (at.fine == 0) [[likely]] {
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[t][r] = to_float(acc[t][r]);
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (at.group(r).fine == 0) {
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) sum[t][r] = to_float(acc[t][r]);
      continue;
    }
    const FineGroup& digits = at.digits(r);
    const I32x16 zero_point =
        start<Tile>(kParts == 2 ? digits.minus_half_r + kPart : &digits.minus_r);
    Block<I32x16, kTiles, 1> both;
    const uint8_t* again[kTiles];
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
      both[t][0] = add(shift_left<8>(acc[t][r]), zero_point);
      again[t] = afresh(codes[t]);
    }
    all_dots<Tile, kTo, kFrom>(both, again, [&](int) { return digits.r; });
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) sum[t][r] = mul(to_float(both[t][0]), set1(1.0f / 256.0f));
  }
}

template <class Tile, int kTiles, int kRows>
[[gnu::always_inline]] inline void accumulate(Block<F32x16, kTiles, kRows>& out,
                                              const uint8_t* const* codes, const Scale* s,
                                              const Groups<kRows>& at) {
  using Scales = typename Tile::Scales;
  constexpr int kParts = Scales::kHalves ? 2 : 1;
  Block<F32x16, kTiles, kRows> sum, part;
  part_dots<Tile, kParts, 0>(sum, codes, at);
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[t][r] = mul(sum[t][r], s[t].scale[0]);
  if constexpr (kParts == 2) {
    part_dots<Tile, 2, 1>(part, codes, at);
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[t][r] = fma(part[t][r], s[t].scale[1], sum[t][r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const QuantGroup& g = at.group(r);
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
      out[t][r] = fma(sum[t][r], set1(g.scale), out[t][r]);
      if constexpr (Scales::kMinimum && kParts == 2) {
        out[t][r] = fma(s[t].minimum[0], set1(g.half_sum[0]), out[t][r]);
        out[t][r] = fma(s[t].minimum[1], set1(g.half_sum[1]), out[t][r]);
      } else if constexpr (Scales::kMinimum) {
        out[t][r] = fma(s[t].minimum[0], set1(g.sum), out[t][r]);
      }
    }
  }
}

constexpr size_t kPrefetch = 2048;  // bytes ahead

template <class Tile, int j = 0>
inline void expand(const uint8_t* codes, uint8_t* to) {
  if constexpr (j < 8) {
    store_codes(to + 64 * j, Planes<Tile::kStored>::template vector<j>(codes));
    expand<Tile, j + 1>(codes, to);
  }
}

// Walks the runs of a tile; `chunk` is the chunk of the next run and `run` its number there.
template <class Tile>
struct Cursor {
  using Scales = typename Tile::Scales;
  static constexpr size_t kRunBytes = 64 * Tile::kStored;
  const uint8_t* chunk = nullptr;
  size_t runs = 0;  // of a chunk, where Scales leave it open
  size_t run = 0;
  const uint8_t* codes = chunk + Scales::kBytes;

  [[gnu::always_inline]] inline Scale scale() const { return Scales::of(chunk, run); }
  [[gnu::always_inline]] inline void advance() {
    codes += kRunBytes;
    if (++run == (Scales::kRuns != 0 ? Scales::kRuns : runs)) {
      run = 0;
      chunk = codes;
      codes += Scales::kBytes;
    }
  }
};

// Columns of `count` groups from x on, of rows that have `groups`; `more` continues the sums in
// out.
struct Columns {
  size_t count, groups;
  const QuantGroup* x;
  size_t stride;
  bool more;
};

// Tiles that lie `bytes` apart, and their sums [tile][rows][16].
struct Tiles {
  const uint8_t* data;
  size_t bytes;
  float* out;
  size_t rows;
  size_t runs = 0;  // of a chunk

  const uint8_t* tile(int t) const { return data + static_cast<size_t>(t) * bytes; }
  float* at(int t, size_t row) const {
    return out + (static_cast<size_t>(t) * rows + row) * kLanes;
  }
};

template <class Tile, int kTiles, int kRows>
void matmul_rows(const Tiles& tiles, const Columns& c, size_t row) {
  Block<F32x16, kTiles, kRows> acc;
  Cursor<Tile> at[kTiles];
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t) {
    at[t] = {tiles.tile(t), tiles.runs};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      acc[t][r] = c.more ? load(tiles.at(t, row + static_cast<size_t>(r))) : zero();
  }
  Groups<kRows> groups{c.x + row * c.stride, c.stride, c.groups};
  for (size_t group = 0; group < c.count; ++group, ++groups.x) {
    const uint8_t* codes[kTiles];
    Scale scales[kTiles];
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
      codes[t] = at[t].codes;
      scales[t] = at[t].scale();
      if constexpr (kRows <= 2) {  // few rows wait for memory; the processor foresees the rest
        for (size_t i = 0; i < (kFetchAll ? Cursor<Tile>::kRunBytes : 1); i += 64)
          prefetch(codes[t] + kPrefetch + i);
      } else if (row == kRows) {  // the next tiles come while these are multiplied
        for (size_t i = 0; i < Cursor<Tile>::kRunBytes; i += 64)
          prefetch(codes[t] + kTiles * tiles.bytes + i);
      }
      at[t].advance();
    }
    groups.fine = 0;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) groups.fine |= groups.group(r).fine;
    accumulate<Tile, kTiles, kRows>(acc, codes, scales, groups);
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) store(tiles.at(t, row + static_cast<size_t>(r)), acc[t][r]);
}

template <class Tile, int kTiles, size_t kBlock = kTiles < kTileBlock ? kRowBlock / 2 : kRowBlock>
void matmul_blocks(const Tiles& tiles, const Columns& c, size_t row = 0) {
  for (; tiles.rows - row >= kBlock; row += kBlock)
    matmul_rows<Tile, kTiles, kBlock>(tiles, c, row);
  if constexpr (kBlock > 1) matmul_blocks<Tile, kTiles, kBlock / 2>(tiles, c, row);
}

constexpr size_t kSlice = 16;  // groups expanded at a time: they stay in the first-level cache

template <class Tile, int kTiles>
void matmul_expanded(const Tiles& tiles, Columns c) {
  using To = typename Tile::Expanded;
  constexpr size_t kBytes = To::Scales::kBytes + 64 * 8;
  alignas(64) uint8_t slice[kTiles][kSlice * kBytes];
  Cursor<Tile> from[kTiles];
  for (int t = 0; t < kTiles; ++t) from[t] = {tiles.tile(t), tiles.runs};
  for (size_t begin = 0; begin < c.groups; begin += kSlice, c.x += kSlice, c.more = true) {
    c.count = c.groups - begin < kSlice ? c.groups - begin : kSlice;
    for (int t = 0; t < kTiles; ++t)
      for (size_t g = 0; g < c.count; ++g, from[t].advance()) {
        uint8_t* const to = slice[t] + g * kBytes;
        To::Scales::put(from[t].scale(), to);
        expand<Tile>(from[t].codes, to + To::Scales::kBytes);
      }
    matmul_blocks<To, kTiles>({slice[0], sizeof slice[0], tiles.out, tiles.rows}, c);
  }
}

// 4-bit codes cost less to unpack again than to read back.
template <int kStored>
constexpr bool kExpand = kStored != 8 && kStored != 4 && kRowBlock > 1;

template <class Tile, int kTiles = kTileBlock>
void matmul_integer(const uint8_t* data, size_t count, size_t bytes, size_t cols,
                    const QuantGroup* x, size_t stride, size_t rows, float* out) {
  const size_t groups = cols / kGroup, scales = bytes - groups * Cursor<Tile>::kRunBytes;
  const size_t runs = groups * Tile::Scales::kBytes / scales;
  const Columns all{groups, groups, x, stride, false};
  if (kTiles > 1 && rows <= 2)  // memory gives most when it is read as one stream
    return matmul_integer<Tile, 1>(data, count, bytes, cols, x, stride, rows, out);
  for (; count >= kTiles; count -= kTiles, data += kTiles * bytes, out += kTiles * rows * kLanes) {
    const Tiles tiles{data, bytes, out, rows, runs};
    if (kExpand<Tile::kStored> && rows >= kRowsToExpand)
      matmul_expanded<Tile, kTiles>(tiles, all);
    else
      matmul_blocks<Tile, kTiles>(tiles, all);
  }
  if constexpr (kTiles > 1)
    if (count > 0) matmul_integer<Tile, 1>(data, count, bytes, cols, x, stride, rows, out);
}

// ---- float matmul ----

// kHead: bytes of factors of the rows, which come first.
struct Float32 {
  static constexpr size_t kBytes = 4, kHead = 0;
  static inline F32x16 of(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
};
struct Float16 {
  static constexpr size_t kBytes = 2, kHead = 0;
  static inline F32x16 of(const uint8_t* p) { return load(halves(p)); }
};
struct BFloat16 {
  static constexpr size_t kBytes = 2, kHead = 0;
  static inline F32x16 of(const uint8_t* p) { return load_bf16(halves(p)); }
};
struct Float8 {
  static constexpr size_t kBytes = 1, kHead = squall::head_bytes(squall::Format::kF8);
  static inline F32x16 of(const uint8_t* p) {
    alignas(32) uint16_t half[kLanes];
    for (size_t i = 0; i < kLanes; ++i) half[i] = squall::f8_to_half(p[i]);
    return load(half);
  }
};

struct FloatColumns {
  size_t count;
  const float* x;
  size_t stride;
  bool more;                      // add to what is there
  const uint8_t* next = nullptr;  // weights that are multiplied afterwards
  size_t next_bytes = 0;          // of a column of them
  size_t next_apart = 0;          // from tile to tile
};

// Each block of rows has a part of what is multiplied afterwards come nearer.
template <int kTiles>
inline void prefetch_next(const FloatColumns& c, size_t block, size_t blocks) {
  const size_t all = c.count * c.next_bytes, share = (all / blocks + 63) / 64 * 64;
  for (size_t i = block * share; i < (block + 1) * share && i < all; i += 64)
    for (size_t t = 0; t < kTiles; ++t) prefetch(c.next + t * c.next_apart + i);
}

// kStride: of the rows of x, where it is known.
template <class Element, int kTiles, int kRows, size_t kStride>
void matmul_float_rows(const Tiles& tiles, const FloatColumns& c, size_t row) {
  if (c.next != nullptr) prefetch_next<kTiles>(c, row / kRows, tiles.rows / kRows);
  const size_t stride = kStride != 0 ? kStride : c.stride;
  Block<F32x16, kTiles, kRows> acc;
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      acc[t][r] = c.more ? load(tiles.at(t, row + static_cast<size_t>(r))) : zero();
  const float* const x = c.x + row * stride;
  for (size_t k = 0; k < c.count; ++k) {
    F32x16 w[kTiles];
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
      const uint8_t* const p = tiles.tile(t) + Element::kHead + k * kLanes * Element::kBytes;
      if constexpr (kRows <= 2 && kFetchAll) prefetch(p + kPrefetch);
      w[t] = Element::of(p);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F32x16 value = set1(x[static_cast<size_t>(r) * stride + k]);
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) acc[t][r] = fma(w[t], value, acc[t][r]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) store(tiles.at(t, row + static_cast<size_t>(r)), acc[t][r]);
}

template <class Element, int kTiles, size_t kStride = 0, size_t kBlock = kFloatRowBlock>
void matmul_float_blocks(const Tiles& tiles, const FloatColumns& c, size_t row = 0) {
  for (; tiles.rows - row >= kBlock; row += kBlock)
    matmul_float_rows<Element, kTiles, kBlock, kStride>(tiles, c, row);
  constexpr size_t kNext = kBlock > 8 ? 8 : kBlock > 4 ? 4 : kBlock / 2;
  if constexpr (kBlock > 1) matmul_float_blocks<Element, kTiles, kStride, kNext>(tiles, c, row);
}

// Columns at a time, of all tiles: those of two tiles stay in the first-level cache while all rows
// are multiplied with them, those of the rows in the second until all tiles are.
constexpr size_t kFloatSlice = squall::kPanelCols;

// Columns `begin` on of some tiles, made float32 once for all rows. The same of the tiles after
// them come nearer meanwhile; after the last of `all`, the next columns of the first.
template <class Element, int kTiles>
void matmul_float_slice(const Tiles& tiles, FloatColumns c, size_t begin, const uint8_t* all,
                        size_t count) {
  const size_t at = Element::kHead + begin * kLanes * Element::kBytes;
  const uint8_t* const after = tiles.data + kTiles * tiles.bytes;
  const size_t slice = kFloatSlice * kLanes * Element::kBytes;
  c.next = after < all + count * tiles.bytes ? after + at : all + at + slice;
  c.next_bytes = kLanes * Element::kBytes;
  c.next_apart = tiles.bytes;
  const auto multiply = [&](const uint8_t* data, size_t bytes) {
    const Tiles all{data, bytes, tiles.out, tiles.rows};
    if (c.stride == squall::kPanelStride)
      matmul_float_blocks<Float32, kTiles, squall::kPanelStride>(all, c);
    else
      matmul_float_blocks<Float32, kTiles>(all, c);
  };
  if constexpr (std::is_same_v<Element, Float32>) {
    multiply(tiles.data + at, tiles.bytes);
  } else {
    alignas(64) float slice[kTiles][kFloatSlice * kLanes];
    for (int t = 0; t < kTiles; ++t)
      for (size_t k = 0; k < c.count; ++k)
        store(slice[t] + k * kLanes,
              Element::of(tiles.tile(t) + at + k * kLanes * Element::kBytes));
    multiply(reinterpret_cast<const uint8_t*>(slice[0]), sizeof slice[0]);
  }
}

// fn.operator()<n>(tiles) for all tiles, as many at once as the registers hold.
template <int kTiles = kTileBlock, class Fn>
inline void each_tiles(Tiles tiles, size_t count, const Fn& fn) {
  for (; count >= kTiles; count -= kTiles) {
    fn.template operator()<kTiles>(tiles);
    tiles.data += kTiles * tiles.bytes;
    tiles.out += kTiles * tiles.rows * kLanes;
  }
  if constexpr (kTiles > 1) each_tiles<kTiles / 2>(tiles, count, fn);
}

// Columns of the rows that taps name, to the panel.
inline void gather_taps(const FloatRows& x, size_t begin, size_t count, size_t rows) {
  for (size_t done = 0, n; done < count; done += n) {
    const size_t tap = (begin + done) / x.width, column = (begin + done) % x.width;
    n = x.width - column < count - done ? x.width - column : count - done;
    const int32_t* const named = x.taps + tap * x.apart;
    for (size_t r = 0; r < rows; ++r) {
      float* const to = x.panel + r * squall::kPanelStride + done;
      if (named[r] < 0)
        spans(n, [&](size_t i, size_t m) { store_first(to + i, zero(), m); });
      else
        copy(x.x + static_cast<size_t>(named[r]) * x.stride + column, n, to);
    }
  }
}

template <class Element>
void matmul_float(const uint8_t* data, size_t count, size_t bytes, size_t cols, const FloatRows& x,
                  size_t rows, float* out) {
  const Tiles all{data, bytes, out, rows};
  const bool taps = x.taps != nullptr;
  const size_t slice = taps || rows > kFloatRowBlock ? kFloatSlice : cols;
  for (size_t begin = 0; begin < cols; begin += slice) {
    FloatColumns c{cols - begin < slice ? cols - begin : slice, x.x + begin, x.stride, begin > 0};
    if (taps) {
      gather_taps(x, begin, c.count, rows);
      c.x = x.panel, c.stride = squall::kPanelStride;
    }
    each_tiles(all, count, [&]<int kTiles>(const Tiles& tiles) {
      if (slice == cols)
        matmul_float_blocks<Element, kTiles>(tiles, c);
      else
        matmul_float_slice<Element, kTiles>(tiles, c, begin, data, count);
    });
  }
  if constexpr (Element::kHead != 0)
    each_tiles<1>(all, count, [&]<int>(const Tiles& tile) {
      const F32x16 factor = load(reinterpret_cast<const float*>(tile.data));
      for (size_t row = 0; row < rows; ++row)
        store(tile.at(0, row), mul(load(tile.at(0, row)), factor));
    });
}

// ---- activations to int8 ----

// NaN if one of 32 values is NaN or infinite, else 0.
inline float unless_finite(F32x16 a, F32x16 b) { return sum(add(sub(a, a), sub(b, b))); }

inline F32x16 to_int8(F32x16 x) { return max(min(round_even(x), set1(127.0f)), set1(-127.0f)); }

// Rounds to int8, stores, and returns the sum (exact: floats hold integers up to 2^24).
inline int32_t store_rounded(int8_t* to, F32x16 x) {
  const F32x16 whole = to_int8(x);
  store_i8(to, whole);
  return static_cast<int32_t>(sum(whole));
}

// `digits` is left as it is unless the group is fine.
inline void quantize_group(const float* x, float fine_above, QuantGroup* out, FineGroup* digits) {
  const F32x16 part[2] = {load(x), load(x + 16)};
  const float peak = max_of(max(abs(part[0]), abs(part[1])));
  const float scale = peak / 127.0f;
  const F32x16 step = set1(scale > 0.0f ? scale : 1.0f);
  int32_t q[2], r[2] = {0, 0};
  out->fine = peak > fine_above;
  out->scale = scale;
  for (int h = 0; h < 2; ++h) {
    const F32x16 steps = div(part[h], step);
    q[h] = store_rounded(out->q + 16 * h, steps);
    if (out->fine == 0) continue;
    const F32x16 rest = sub(steps, to_int8(steps));
    r[h] = store_rounded(digits->r + 16 * h, mul(rest, set1(256.0f)));
    digits->minus_half_r[h] = -r[h];
  }
  if (out->fine != 0) digits->minus_r = -(r[0] + r[1]);
  out->minus_q = -(q[0] + q[1]);
  const float unit = scale * (1.0f / 256.0f);
  out->sum = unit * static_cast<float>(256 * (q[0] + q[1]) + r[0] + r[1]);
  for (int h = 0; h < 2; ++h) {
    out->minus_half_q[h] = -q[h];
    out->half_sum[h] = unit * static_cast<float>(256 * q[h] + r[h]);
  }
}

void quantize(const float* x, size_t cols, QuantGroup* out, FineGroup* digits) {
  F32x16 squares = zero();
  for (size_t c = 0; c < cols; c += kLanes) {
    const F32x16 v = load(x + c);
    squares = fma(v, v, squares);
  }
  const float total = sum(squares);
  const float above = kFineRatio * __builtin_sqrtf(total / static_cast<float>(cols));
  for (size_t c = 0; c < cols; c += kGroup) quantize_group(x + c, above, out++, digits++);
  if (total <= FLT_MAX) [[likely]]
    return;
  // No code stands for NaN, but a scale of NaN makes every product NaN.
  for (; cols > 0; cols -= kGroup)
    (--out)->scale += unless_finite(load(x + cols - kGroup), load(x + cols - kLanes));
}

// ---- functions of a lane ----

// max() and min() give their second operand where one is NaN: what may be NaN comes second.

// e^x within 2 ulp on [-87, 88]; 0 below, e^88 above. Cephes' expf polynomial.
inline F32x16 exp(F32x16 x) {
  const Mask tiny = less(x, set1(-87.0f));
  x = max(set1(-87.0f), min(set1(88.0f), x));
  const F32x16 n = round_even(mul(x, set1(1.44269504088896341f)));
  F32x16 r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  F32x16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return select(tiny, zero(), scale_exponent(p, n));
}

inline F32x16 sigmoid(F32x16 x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

inline F32x16 tanh(F32x16 x) {
  const F32x16 square = mul(x, x);  // near 0 the exponential form cancels: Taylor's series there
  F32x16 p = set1(62.0f / 2835.0f);
  p = fma(p, square, set1(-17.0f / 315.0f));
  p = fma(p, square, set1(2.0f / 15.0f));
  p = fma(p, square, set1(-1.0f / 3.0f));
  const F32x16 near = fma(mul(p, square), x, x);
  const F32x16 far = sub(set1(1.0f), div(set1(2.0f), add(exp(add(x, x)), set1(1.0f))));
  return select(less(abs(x), set1(0.3f)), near, far);
}

constexpr float kErfEnd = 3.92f;  // from where on erf rounds to 1

// erf within 4e-7 on [-kErfEnd, kErfEnd]: a quotient of polynomials, fitted for the least error.
inline F32x16 erf(F32x16 x) {
  const F32x16 y = mul(x, x);
  F32x16 p = set1(2.0353466e-6f), q = set1(3.80768543e-5f);
  p = fma(p, y, set1(2.87477684e-4f));
  q = fma(q, y, set1(1.18785922e-3f));
  p = fma(p, y, set1(3.86707322e-3f));
  q = fma(q, y, set1(1.51697798e-2f));
  p = fma(p, y, set1(5.30567467e-2f));
  q = fma(q, y, set1(1.15071632e-1f));
  p = fma(p, y, set1(1.92731336e-1f));
  q = fma(q, y, set1(5.0413537e-1f));
  p = fma(p, y, set1(1.12837899f));
  q = fma(q, y, set1(1.0f));
  return div(mul(x, p), q);
}

inline F32x16 gelu_exact(F32x16 x) {
  const F32x16 z = mul(x, set1(0.70710678118654752f)), half = mul(x, set1(0.5f));
  return select(less(abs(z), set1(kErfEnd)), fma(half, erf(z), half), max(zero(), x));
}

inline F32x16 activate(Activation act, F32x16 x) {
  switch (act) {
    case Activation::kSilu:
      return mul(x, sigmoid(x));
    case Activation::kGelu:
      return gelu_exact(x);
    case Activation::kGeluTanh: {
      const F32x16 inner = fma(mul(mul(x, x), x), set1(0.044715f), x);
      return mul(x, sigmoid(mul(inner, set1(2.0f * 0.79788456080286536f))));
    }
    case Activation::kQuickGelu:
      return mul(x, sigmoid(mul(x, set1(1.702f))));
    case Activation::kRelu:
      return add(max(zero(), x), zero());  // -0 becomes 0
    case Activation::kNone:
      break;
  }
  return x;
}

// ---- rows ----

inline void rms_norm_group(const float* x, size_t n, const float* weight, float eps, float* out) {
  F32x16 squares = zero();
  spans(n, [&](size_t i, size_t m) {
    const F32x16 v = load_first(x + i, m);
    squares = fma(v, v, squares);
  });
  const F32x16 factor = set1(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps));
  spans(n, [&](size_t i, size_t m) {
    store_first(out + i, mul(mul(load_first(x + i, m), factor), load_first(weight + i, m)), m);
  });
}

void rms_norm(const float* x, size_t cols, size_t group, const float* weight, float eps,
              float* out) {
  for (size_t c = 0; c < cols; c += group) rms_norm_group(x + c, group, weight, eps, out + c);
}

void layer_norm(const float* x, size_t cols, size_t group, const float* weight, const float* bias,
                float eps, float* out) {
  for (size_t c = 0; c < cols; c += group) {
    F32x16 total = zero(), squares = zero();
    spans(group, [&](size_t i, size_t m) { total = add(total, load_first(x + c + i, m)); });
    const float mean = sum(total) / static_cast<float>(group);
    spans(group, [&](size_t i, size_t m) {
      const F32x16 v = select(lanes(0, m), sub(load_first(x + c + i, m), set1(mean)), zero());
      squares = fma(v, v, squares);
    });
    const float variance = sum(squares) / static_cast<float>(group);
    const F32x16 factor = set1(1.0f / __builtin_sqrtf(variance + eps));
    spans(group, [&](size_t i, size_t m) {
      const F32x16 v = mul(sub(load_first(x + c + i, m), set1(mean)), factor);
      const F32x16 b = bias != nullptr ? load_first(bias + i, m) : zero();
      store_first(out + c + i, fma(v, load_first(weight + i, m), b), m);
    });
  }
}

void moments(const float* x, size_t stride, size_t rows, size_t cols, float* mean, float* squares) {
  const F32x16 share = set1(1.0f / static_cast<float>(rows));
  spans(cols, [&](size_t i, size_t m) {
    store_first(mean + i, zero(), m);
    store_first(squares + i, zero(), m);
  });
  for (size_t r = 0; r < rows; ++r)
    spans(cols, [&](size_t i, size_t m) {
      const F32x16 v = load_first(x + r * stride + i, m);
      store_first(mean + i, add(load_first(mean + i, m), v), m);
    });
  spans(cols,
        [&](size_t i, size_t m) { store_first(mean + i, mul(load_first(mean + i, m), share), m); });
  for (size_t r = 0; r < rows; ++r)
    spans(cols, [&](size_t i, size_t m) {
      const F32x16 v = sub(load_first(x + r * stride + i, m), load_first(mean + i, m));
      store_first(squares + i, fma(v, v, load_first(squares + i, m)), m);
    });
}

void scale_columns(const float* x, const float* mean, const float* factor, const float* bias,
                   Activation act, size_t n, float* out) {
  spans(n, [&](size_t i, size_t m) {
    const F32x16 v = sub(load_first(x + i, m), load_first(mean + i, m));
    const F32x16 y = fma(v, load_first(factor + i, m), load_first(bias + i, m));
    store_first(out + i, activate(act, y), m);
  });
}

inline F32x16 biased(const float* acc, const float* bias, size_t n) {
  const F32x16 x = load(acc);
  return bias != nullptr ? add(x, load_first(bias, n)) : x;
}

void finish(const float* acc, size_t rows, const float* bias, Activation act, float scale,
            const float* residual, float* out, size_t stride, size_t n) {
  for (size_t r = 0; r < rows; ++r, acc += kLanes, out += stride) {
    F32x16 x = activate(act, biased(acc, bias, n));
    if (residual != nullptr)
      x = fma(x, set1(scale), load_first(residual + r * stride, n));
    else if (scale != 1.0f)
      x = mul(x, set1(scale));
    store_first(out, x, n);
  }
}

void finish_gated(const float* gate, const float* up, size_t rows, const float* gate_bias,
                  const float* up_bias, Activation act, float* out, size_t stride, size_t n) {
  for (size_t r = 0; r < rows; ++r, gate += kLanes, up += kLanes, out += stride)
    store_first(out, mul(activate(act, biased(gate, gate_bias, n)), biased(up, up_bias, n)), n);
}

void add_gated(const float* a, const float* b, float scale, const float* gate, Activation act,
               size_t n, float* out) {
  spans(n, [&](size_t i, size_t m) {
    const F32x16 by = gate != nullptr ? mul(load_first(gate + i, m), set1(scale)) : set1(scale);
    store_first(out + i, activate(act, fma(load_first(b + i, m), by, load_first(a + i, m))), m);
  });
}

void add_scaled(const float* a, const float* b, float scale, size_t n, float* out) {
  add_gated(a, b, scale, nullptr, Activation::kNone, n, out);
}

void softcap(const float* x, float cap, size_t n, float* out) {
  spans(n, [&](size_t i, size_t m) {
    store_first(out + i, mul(tanh(div(load_first(x + i, m), set1(cap))), set1(cap)), m);
  });
}

void softmax(float* x, size_t n) {
  F32x16 peak = set1(-FLT_MAX), total = zero();
  spans(n, [&](size_t i, size_t m) {
    peak = max(peak, select(lanes(0, m), load_first(x + i, m), set1(-FLT_MAX)));
  });
  const F32x16 top = set1(max_of(peak));
  spans(n, [&](size_t i, size_t m) {
    const F32x16 e = exp(sub(load_first(x + i, m), top));
    store_first(x + i, e, m);
    total = add(total, select(lanes(0, m), e, zero()));
  });
  const F32x16 all = set1(sum(total));
  spans(n, [&](size_t i, size_t m) { store_first(x + i, div(load_first(x + i, m), all), m); });
}

}  // namespace

#include "attention_impl.h"

namespace {

// ---- peak rates ----

// Sums enough to hide the latency of an instruction, few enough for the registers.
constexpr int kPeakRows = kRowBlock * 3 / 2;
constexpr size_t kPeakCols = kGroup;  // of a turn

uint64_t peak_dots(size_t turns, float* out) {
  using Codes = IntegerTile<4, Direct, -1, 8>;
  alignas(64) uint8_t codes[kTileBlock][kPeakCols * kLanes];
  alignas(64) int8_t x[kPeakRows][kPeakCols];
  __builtin_memset(codes, 1, sizeof codes);
  __builtin_memset(x, 1, sizeof x);
  const uint8_t* tiles[kTileBlock];
  Block<I32x16, kTileBlock, kPeakRows> acc;
  for (int t = 0; t < kTileBlock; ++t) {
    tiles[t] = codes[t];
    for (I32x16& a : acc[t]) a = izero();
  }
  for (size_t turn = 0; turn < turns; ++turn) {
    asm volatile("" : : "r"(codes), "r"(x) : "memory");  // read anew
    all_dots<Codes, 8, 0, kTileBlock, kPeakRows>(acc, tiles, [&](int r) { return x[r]; });
  }
  F32x16 total = zero();
  for (const auto& tile : acc)
    for (const I32x16& a : tile) total = add(total, to_float(a));
  *out = sum(total);
  return turns * kTileBlock * kPeakRows * kPeakCols * kLanes;
}

uint64_t peak_fmas(size_t turns, float* out) {
  alignas(64) float w[kTileBlock][kPeakCols * kLanes], x[kPeakRows][kPeakCols];
  for (auto& tile : w)
    for (float& value : tile) value = 1.0f;
  for (auto& row : x)
    for (float& value : row) value = 1.0f;
  Block<F32x16, kTileBlock, kPeakRows> acc;
  for (auto& tile : acc)
    for (F32x16& a : tile) a = zero();
  for (size_t turn = 0; turn < turns; ++turn) {
    asm volatile("" : : "r"(w), "r"(x) : "memory");
    for (size_t k = 0; k < kPeakCols; ++k) {
      F32x16 column[kTileBlock];
#pragma GCC unroll 4
      for (int t = 0; t < kTileBlock; ++t) column[t] = load(w[t] + k * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kPeakRows; ++r) {
        const F32x16 value = set1(x[r][k]);
#pragma GCC unroll 4
        for (int t = 0; t < kTileBlock; ++t) acc[t][r] = fma(column[t], value, acc[t][r]);
      }
    }
  }
  F32x16 total = zero();
  for (const auto& tile : acc)
    for (const F32x16& a : tile) total = add(total, a);
  *out = sum(total);
  return turns * kTileBlock * kPeakRows * kPeakCols * kLanes;
}

// ---- the table ----

constexpr squall::IntegerKernels integers(const char* isa) {
  return {isa,
          {nullptr,
           nullptr,
           nullptr,
           matmul_integer<IntegerTile<4, Direct, 3>>,
           matmul_integer<IntegerTile<4, DirectMinimum, -1>>,
           matmul_integer<IntegerTile<5, Direct, 4>>,
           matmul_integer<IntegerTile<5, DirectMinimum, -1>>,
           matmul_integer<IntegerTile<8, Direct, 7>>,
           matmul_integer<IntegerTile<8, Direct, 7>>,
           matmul_integer<IntegerTile<2, Super2, -1>>,
           matmul_integer<IntegerTile<3, Super6, 2>>,
           matmul_integer<IntegerTile<4, Super4, -1>>,
           matmul_integer<IntegerTile<5, Super4, -1>>,
           matmul_integer<IntegerTile<6, Super6, 5>>,
           matmul_integer<IntegerTile<8, Super8, 7>>,
           matmul_integer<IntegerTile<8, PairMinimum, 7>>,
           matmul_integer<IntegerTile<4, PairMinimum, -1>>,
           matmul_integer<IntegerTile<3, PairMinimum, -1>>,
           matmul_integer<IntegerTile<2, PairMinimum, -1>>,
           matmul_integer<IntegerTile<2, PairMinimum, -1, 1>>,
           nullptr,
           matmul_integer<IntegerTile<8, ZeroCode<128>, 7>>,
           matmul_integer<IntegerTile<8, ZeroCode<128>, 7>>,
           matmul_integer<IntegerTile<8, ZeroCode<128>, 7>>,
           matmul_integer<IntegerTile<4, ZeroCode<0>, -1>>,
           matmul_integer<IntegerTile<4, ZeroCode<0>, -1>>,
           matmul_integer<IntegerTile<4, ZeroCode<0>, -1>>,
           matmul_integer<IntegerTile<3, ZeroCode<0>, -1>>,
           matmul_integer<IntegerTile<3, ZeroCode<0>, -1>>,
           matmul_integer<IntegerTile<3, ZeroCode<0>, -1>>,
           matmul_integer<IntegerTile<2, ZeroCode<0>, -1>>,
           matmul_integer<IntegerTile<2, ZeroCode<0>, -1>>,
           matmul_integer<IntegerTile<2, ZeroCode<0>, -1>>},
          peak_dots};
}

template <class Cache>
constexpr squall::Kernels table(const char* isa, CacheType type) {
  return {
      integers(isa),
      {matmul_float<Float32>,
       matmul_float<Float16>,
       matmul_float<BFloat16>,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       matmul_float<Float8>},
      quantize,
      rms_norm,
      layer_norm,
      moments,
      scale_columns,
      finish,
      finish_gated,
      add_scaled,
      add_gated,
      softcap,
      softmax,
      type,
      Cache::put_key,
      Cache::put_value,
      attend<Cache>,
      attend_segment<Cache>,
      merge_segments,
      peak_fmas,
  };
}

// Tables of an ISA, one for each type of cache.
#define SQUALL_TABLES(isa)                                                                   \
  {table<CacheOf<Half>>(isa, CacheType::kF16), table<CacheOf<Single>>(isa, CacheType::kF32), \
   table<CacheQ8>(isa, CacheType::kQ8_0)}

}  // namespace
