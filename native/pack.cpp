#include "pack.h"

#include <array>
#include <cstring>
#include <utility>

namespace squall {
namespace {

// ---- vectors of 16 bytes: what every x86-64 and every aarch64 has ----

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(16)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr size_t kElements = 16 / sizeof(T);

template <class T>
Vector<T> load(const uint8_t* from) {
  Vector<T> v;
  memcpy(&v, from, 16);
  return v;
}

template <class T>
void store(uint8_t* to, const Vector<T>& v) {
  memcpy(to, &v, 16);
}

// a[first], b[first], a[first + 1], b[first + 1], ...
template <class T, size_t kFirst, size_t... I>
Vector<T> interleave(const Vector<T>& a, const Vector<T>& b, std::index_sequence<I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (kFirst + I / 2 + I % 2 * kElements<T>)...);
#else
  return __builtin_shuffle(a, b, Vector<T>{(kFirst + I / 2 + I % 2 * kElements<T>)...});
#endif
}

// A square: element j of vector i becomes element i of vector j.
template <class T>
void transpose(Vector<T> (&m)[kElements<T>]) {
  constexpr size_t n = kElements<T>;
  constexpr std::make_index_sequence<n> all;
  for (size_t round = 1; round < n; round *= 2) {
    Vector<T> next[n];
    for (size_t i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<T, 0>(m[i], m[i + n / 2], all);
      next[2 * i + 1] = interleave<T, n / 2>(m[i], m[i + n / 2], all);
    }
    memcpy(m, next, sizeof m);
  }
}

// ---- codes: a vector is one word, four columns, of four rows ----

using Rows = const uint8_t* const*;  // where the block begins in each row
using Word = Vector<uint32_t>;

template <size_t kWords>
struct Table {
  Word word[kWords];
  Word operator[](size_t i) const { return word[i]; }
};
using Codes = Table<8>;  // 32 columns, a code a byte

constexpr uint32_t kBytes = 0x01010101u;

Word load_word(Rows rows, size_t at) {
  uint32_t words[4];
  for (size_t row = 0; row < 4; ++row) memcpy(words + row, rows[row] + at, 4);
  Word word;
  memcpy(&word, words, sizeof word);
  return word;
}

template <size_t kWords>
Table<kWords> load_words(Rows rows, size_t at) {
  Table<kWords> t;
  for (size_t w = 0; w < kWords; w += 4) {
    Word m[4];
    for (size_t row = 0; row < 4; ++row) m[row] = load<uint32_t>(rows[row] + at + 4 * w);
    transpose<uint32_t>(m);
    memcpy(t.word + w, m, sizeof m);
  }
  return t;
}

template <class Make>
Codes make_codes(const Make& make) {
  Codes codes;
#pragma GCC unroll 8
  for (size_t k = 0; k < 8; ++k) codes.word[k] = make(k);
  return codes;
}

// The plane of bits [shift, shift + kBits) of the codes.
template <size_t kBits>
void put_plane(const Codes& codes, size_t shift, uint8_t* to) {
  constexpr size_t n = 8 / kBits;
  for (size_t v = 0; v < kBits; ++v) {
    Word word = {};
#pragma GCC unroll 8
    for (size_t k = 0; k < n; ++k)
      word |= (codes[n * v + k] >> shift & ((1u << kBits) - 1) * kBytes) << kBits * k;
    store<uint32_t>(to + 64 * v, word);
  }
}

template <size_t kBits>
void put_codes(const Codes& codes, uint8_t* to) {
  constexpr size_t low = kBits == 8 || kBits == 1 ? kBits : kBits < 4 ? 2 : 4, high = kBits - low;
  put_plane<low>(codes, 0, to);
  if constexpr (high != 0) put_plane<high>(codes, low, to + 64 * low);
}

template <size_t kAt>
Codes nibbles_32(Rows rows) {  // byte i: columns i and 16 + i
  const auto t = load_words<4>(rows, kAt);
  return make_codes([&](size_t k) { return t[k % 4] >> (k < 4 ? 0u : 4u) & 15 * kBytes; });
}

template <size_t kAt>
struct FourBits {
  template <class Put>
  static void codes(Rows rows, const Put& put) {
    put(0, nibbles_32<kAt>(rows));
  }
};

template <size_t kBitsAt>
struct FiveBits {  // bit i of the word at kBitsAt is column i's fifth
  template <class Put>
  static void codes(Rows rows, const Put& put) {
    const Codes low = nibbles_32<kBitsAt + 4>(rows);
    const Word bits = load_word(rows, kBitsAt);
    put(0, make_codes([&](size_t k) {
          const Word four = bits >> static_cast<uint32_t>(4 * k) & 15;
          return low[k] | ((four | four << 7 | four << 14 | four << 21) & kBytes) << 4;
        }));
  }
};

template <size_t kAt, size_t kRuns, uint32_t kFlip = 128>
struct EightBits {  // int8 to code = value + 128; kFlip 0: a code a byte
  template <class Put>
  static void codes(Rows rows, const Put& put) {
    for (size_t run = 0; run < kRuns; ++run) {
      const auto t = load_words<8>(rows, kAt + 32 * run);
      put(run, make_codes([&](size_t k) { return t[k] ^ kFlip * kBytes; }));
    }
  }
};

template <size_t kAt>
struct TwoBits {
  template <class Put>
  static void codes(Rows rows, const Put& put) {
    for (uint32_t run = 0; run < 8; ++run) {
      const auto t = load_words<8>(rows, kAt + run / 4 * 32);
      put(run, make_codes([&](size_t k) { return t[k] >> (2 * (run % 4)) & 3 * kBytes; }));
    }
  }
};

template <size_t kAt, size_t kParts = 4>
struct Nibbles {  // byte i of 32: columns i and 32 + i
  template <class Put>
  static void codes(Rows rows, const Put& put) {
    for (size_t part = 0; part < kParts; ++part) {
      const auto t = load_words<8>(rows, kAt + 32 * part);
      put(2 * part, make_codes([&](size_t k) { return t[k] & 15 * kBytes; }));
      put(2 * part + 1, make_codes([&](size_t k) { return t[k] >> 4 & 15 * kBytes; }));
    }
  }
};

// Word k of run `run` of 64 columns, a bit each in 8 bytes: bit r is that of columns 8r..8r+7.
struct BitPlane {
  Word word[2];

  BitPlane(Rows rows, size_t at) : word{load_word(rows, at), load_word(rows, at + 4)} {}
  Word of(size_t run, size_t k) const {
    return word[k % 2] >> static_cast<uint32_t>(4 * run + k / 2) & kBytes;
  }
};

template <size_t kAt, bool kBit>
struct QuarterBytes {  // byte i of 16: columns i, 16 + i, 32 + i, 48 + i; then bits above them
  template <class Put>
  static void codes(Rows rows, const Put& put) {
    const auto t = load_words<4>(rows, kAt);
    for (size_t run = 0; run < 2; ++run)
      put(run, make_codes([&](size_t k) {
            const auto shift = static_cast<uint32_t>(4 * run + k / 4 * 2);
            const Word low = t[k % 4] >> shift & 3 * kBytes;
            if constexpr (kBit) return low | BitPlane(rows, kAt + 16).of(run, k) << 2;
            return low;
          }));
  }
};

template <size_t kAt>
struct OneBit {
  template <class Put>
  static void codes(Rows rows, const Put& put) {
    const BitPlane plane(rows, kAt);
    for (size_t run = 0; run < 2; ++run)
      put(run, make_codes([&](size_t k) { return plane.of(run, k); }));
  }
};

// The codes of `Low`, and above them a bit of each byte of a mask: bit r for the columns of run r.
template <class Low, size_t kMaskAt, uint32_t kShift>
struct WithMask {
  template <class Put>
  static void codes(Rows rows, const Put& put) {
    const auto mask = load_words<8>(rows, kMaskAt);
    Low::codes(rows, [&](size_t run, const Codes& low) {
      const uint32_t bit = static_cast<uint32_t>(run);
      put(run, make_codes([&](size_t k) { return low[k] | (mask[k] >> bit & kBytes) << kShift; }));
    });
  }
};

struct SixBits {
  template <class Put>
  static void codes(Rows rows, const Put& put) {
    for (size_t half = 0; half < 2; ++half) {
      const auto low = load_words<16>(rows, 64 * half);
      const auto high = load_words<8>(rows, 128 + 32 * half);
      for (uint32_t run = 0; run < 4; ++run)
        put(4 * half + run, make_codes([&](size_t k) {
              return (low[run % 2 * 8 + k] >> run / 2 * 4 & 15 * kBytes) |
                     (high[k] >> 2 * run & 3 * kBytes) << 4;
            }));
    }
  }
};

// ---- scales, of all 16 rows ----

// A column of 2 or 4 bytes.
template <size_t kBytesEach = 2>
void put_column(Rows rows, size_t at, uint8_t* to) {
  for (size_t row = 0; row < kLanes; ++row)
    memcpy(to + kBytesEach * row, rows[row] + at, kBytesEach);
}

// Columns of bytes: the 16 that `words` gives of each row, `order(column)` vectors from `to`.
template <class Words, class Order>
void put_bytes(Rows rows, const Words& words, const Order& order, uint8_t* to) {
  Vector<uint8_t> m[kLanes];
  for (size_t row = 0; row < kLanes; ++row) {
    const std::array<uint32_t, 4> four = words(rows[row]);
    memcpy(&m[row], four.data(), 16);
  }
  transpose<uint8_t>(m);
  for (size_t column = 0; column < kLanes; ++column)
    store<uint8_t>(to + 16 * order(column), m[column]);
}

size_t as_it_is(size_t column) { return column; }

template <class T, size_t kWords>
std::array<T, kWords> read(const uint8_t* p) {
  std::array<T, kWords> words;
  memcpy(words.data(), p, sizeof words);
  return words;
}

template <size_t kAt>
void bytes_scales(Rows rows, uint8_t* to) {
  put_bytes(rows, [](const uint8_t* b) { return read<uint32_t, 4>(b + kAt); }, as_it_is, to);
}

// 16 six-bit scales in 12 bytes, less 32
void q3k_scales(Rows rows, uint8_t* to) {
  const auto words = [](const uint8_t* b) {
    const auto [first, second, high] = read<uint32_t, 3>(b + 96);
    std::array<uint32_t, 4> found = {first, second, first >> 4, second >> 4};
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t scale = (found[i] & 15 * kBytes) | (high >> 2 * i & 3 * kBytes) << 4;
      found[i] = ((scale | 128 * kBytes) - 32 * kBytes) ^ 128 * kBytes;  // byte by byte
    }
    return found;
  };
  put_column(rows, 108, to);
  put_bytes(rows, words, as_it_is, to + 32);
}

// 8 six-bit scales and 8 six-bit minima in 12 bytes; a minimum lies behind its scale
void q4k_scales(Rows rows, uint8_t* to) {
  const auto words = [](const uint8_t* b) -> std::array<uint32_t, 4> {
    const auto [scale, minimum, both] = read<uint32_t, 3>(b + 4);
    return {scale & 63 * kBytes, (both & 15 * kBytes) | (scale >> 6 & 3 * kBytes) << 4,
            minimum & 63 * kBytes, (both >> 4 & 15 * kBytes) | (minimum >> 6 & 3 * kBytes) << 4};
  };
  put_column(rows, 0, to);
  put_column(rows, 2, to + 32);
  put_bytes(rows, words, [](size_t column) { return column % 8 * 2 + column / 8; }, to + 64);
}

// ---- formats ----

template <size_t kAt>
struct Scale {
  static void scales(Rows rows, uint8_t* to) { put_column(rows, kAt, to); }
};
struct ScaleAndMinimum {
  static void scales(Rows rows, uint8_t* to) {
    put_column(rows, 0, to);
    put_column(rows, 2, to + 32);
  }
};
struct Q4_0 : FourBits<2>, Scale<0> {};
struct Q4_1 : FourBits<4>, ScaleAndMinimum {};
struct Q5_0 : FiveBits<2>, Scale<0> {};
struct Q5_1 : FiveBits<4>, ScaleAndMinimum {};
struct Q8_0 : EightBits<2, 1>, Scale<0> {};
struct Q8_1 : EightBits<4, 1>, Scale<0> {};
struct Q2K : TwoBits<16> {
  static void scales(Rows rows, uint8_t* to) {
    put_column(rows, 80, to);
    put_column(rows, 82, to + 32);
    bytes_scales<0>(rows, to + 64);
  }
};
struct Q3K : WithMask<TwoBits<32>, 0, 2> {
  static void scales(Rows rows, uint8_t* to) { q3k_scales(rows, to); }
};
struct Q4K : Nibbles<16> {
  static void scales(Rows rows, uint8_t* to) { q4k_scales(rows, to); }
};
struct Q5K : WithMask<Nibbles<48>, 16, 4> {
  static void scales(Rows rows, uint8_t* to) { q4k_scales(rows, to); }
};
struct Q6K : SixBits {
  static void scales(Rows rows, uint8_t* to) {
    put_column(rows, 208, to);
    bytes_scales<192>(rows, to + 32);
  }
};
struct Q8K : EightBits<4, 8> {
  static void scales(Rows rows, uint8_t* to) { put_column<4>(rows, 0, to); }
};

struct Hqq8 : EightBits<4, 2>, ScaleAndMinimum {};
struct Hqq4 : Nibbles<4, 1>, ScaleAndMinimum {};
struct Hqq3 : QuarterBytes<4, true>, ScaleAndMinimum {};
struct Hqq2 : QuarterBytes<4, false>, ScaleAndMinimum {};
struct Hqq1 : OneBit<4>, ScaleAndMinimum {};

template <size_t kBlock>
struct Integers : EightBits<4, kBlock / kGroup, 0>, ScaleAndMinimum {};

template <Format kFormat, class Layout>
void pack_blocks(Rows rows, size_t cols, uint8_t* to, const uint8_t* next) {
  constexpr FormatInfo f = kFormatInfo[static_cast<size_t>(kFormat)];
  constexpr size_t blocks = f.chunk / f.block, run_bytes = 64 * f.bits;
  std::array<const uint8_t*, kLanes> at;
  memcpy(at.data(), rows, sizeof at);
  for (size_t b = 0; b < cols / f.block; ++b) {
    uint8_t* const chunk = to + b / blocks * f.chunk_bytes();
    uint8_t* const codes = chunk + f.chunk_scales() + b % blocks * (f.block / kGroup) * run_bytes;
    Layout::scales(at.data(), chunk + b % blocks * f.scale_bytes);
    for (size_t four = 0; four < 4; ++four) {
      for (size_t i = 0; i < 4 * f.block_bytes; i += 64)
        __builtin_prefetch(next + (4 * b + four) * 4 * f.block_bytes + i);
      Layout::codes(at.data() + 4 * four, [&](size_t run, const Codes& c) {
        put_codes<f.bits>(c, codes + run * run_bytes + 16 * four);
      });
    }
    for (const uint8_t*& row : at) row += f.block_bytes;
  }
}

template <class T>
void pack_floats(Rows rows, size_t cols, uint8_t* to, const uint8_t* /*next*/) {
  constexpr size_t n = kElements<T>;
  size_t c = 0;
  for (; c + n <= cols; c += n)
    for (size_t first = 0; first < kLanes; first += n) {
      Vector<T> m[n];
      for (size_t i = 0; i < n; ++i) m[i] = load<T>(rows[first + i] + sizeof(T) * c);
      transpose<T>(m);
      for (size_t i = 0; i < n; ++i) store<T>(to + sizeof(T) * ((c + i) * kLanes + first), m[i]);
    }
  for (; c < cols; ++c) put_column<sizeof(T)>(rows, sizeof(T) * c, to + sizeof(T) * c * kLanes);
}

using Pack = void (*)(Rows rows, size_t cols, uint8_t* to, const uint8_t* next);
constexpr std::array<Pack, kFormats> kPack = {
    pack_floats<uint32_t>,
    pack_floats<uint16_t>,
    pack_floats<uint16_t>,
    pack_blocks<Format::kQ4_0, Q4_0>,
    pack_blocks<Format::kQ4_1, Q4_1>,
    pack_blocks<Format::kQ5_0, Q5_0>,
    pack_blocks<Format::kQ5_1, Q5_1>,
    pack_blocks<Format::kQ8_0, Q8_0>,
    pack_blocks<Format::kQ8_1, Q8_1>,
    pack_blocks<Format::kQ2K, Q2K>,
    pack_blocks<Format::kQ3K, Q3K>,
    pack_blocks<Format::kQ4K, Q4K>,
    pack_blocks<Format::kQ5K, Q5K>,
    pack_blocks<Format::kQ6K, Q6K>,
    pack_blocks<Format::kQ8K, Q8K>,
    pack_blocks<Format::kHqq8, Hqq8>,
    pack_blocks<Format::kHqq4, Hqq4>,
    pack_blocks<Format::kHqq3, Hqq3>,
    pack_blocks<Format::kHqq2, Hqq2>,
    pack_blocks<Format::kHqq1, Hqq1>,
    pack_floats<uint8_t>,
    pack_blocks<Format::kInt8G32, Integers<32>>,
    pack_blocks<Format::kInt8G64, Integers<64>>,
    pack_blocks<Format::kInt8G128, Integers<128>>,
    pack_blocks<Format::kInt4G32, Integers<32>>,
    pack_blocks<Format::kInt4G64, Integers<64>>,
    pack_blocks<Format::kInt4G128, Integers<128>>,
    pack_blocks<Format::kInt3G32, Integers<32>>,
    pack_blocks<Format::kInt3G64, Integers<64>>,
    pack_blocks<Format::kInt3G128, Integers<128>>,
    pack_blocks<Format::kInt2G32, Integers<32>>,
    pack_blocks<Format::kInt2G64, Integers<64>>,
    pack_blocks<Format::kInt2G128, Integers<128>>,
};

}  // namespace

void pack_tile(Format format, const uint8_t* const* rows, size_t cols, uint8_t* to,
               const uint8_t* next) {
  kPack[static_cast<size_t>(format)](rows, cols, to, next);
}

}  // namespace squall
