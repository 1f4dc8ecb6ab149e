#include "tile.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "half.h"

namespace squall {

Memory::Memory(size_t bytes) : bytes_(std::max(bytes, size_t{64})) {
  constexpr size_t kHuge = size_t{2} << 20;
  void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(p);
#ifdef MADV_HUGEPAGE
  if (bytes >= 4 * kHuge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
}

Memory::~Memory() { munmap(data_, bytes_); }

std::shared_ptr<uint8_t> Arena::take(size_t bytes) {
  constexpr size_t kChunk = size_t{64} << 20, kAlign = 4096;
  bytes = (bytes + kAlign - 1) / kAlign * kAlign;
  if (memory_ == nullptr || memory_->bytes() - used_ < bytes) {
    memory_ = std::make_shared<Memory>(std::max(bytes, kChunk));
    used_ = 0;
  }
  used_ += bytes;
  return {memory_, memory_->data() + used_ - bytes};
}

namespace {

// ---- one block of the file, taken apart: codes in column order ----

constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0full;

void split_nibbles(const uint8_t* p, uint8_t* low, uint8_t* high, size_t n) {  // n a multiple of 8
  for (size_t i = 0; i < n; i += 8) {
    uint64_t v;
    memcpy(&v, p + i, 8);
    const uint64_t a = v & kLow, b = v >> 4 & kLow;
    memcpy(low + i, &a, 8);
    memcpy(high + i, &b, 8);
  }
}

void add_fifth_bits(const uint8_t* p, uint8_t* codes) {  // 32 codes, bit i of the word for code i
  uint32_t bits;
  memcpy(&bits, p, 4);
  for (size_t i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(codes[i] | (bits >> i & 1) << 4);
}

void codes_8(const uint8_t* p, uint8_t* codes, size_t n) {  // int8 to code = value + 128
  for (size_t i = 0; i < n; ++i) codes[i] = p[i] ^ 0x80;
}

void codes_q2k(const uint8_t* qs, uint8_t* codes) {
  for (size_t part = 0; part < 8; ++part)
    for (size_t i = 0; i < 32; ++i)
      codes[32 * part + i] = qs[32 * (part / 4) + i] >> (2 * (part % 4)) & 3;
}

void codes_q3k(const uint8_t* hmask, const uint8_t* qs, uint8_t* codes) {
  codes_q2k(qs, codes);
  for (size_t part = 0; part < 8; ++part)
    for (size_t i = 0; i < 32; ++i)
      codes[32 * part + i] =
          static_cast<uint8_t>(codes[32 * part + i] | (hmask[i] >> part & 1) << 2);
}

void codes_q4k(const uint8_t* qs, uint8_t* codes) {
  for (size_t part = 0; part < 4; ++part)
    split_nibbles(qs + 32 * part, codes + 64 * part, codes + 64 * part + 32, 32);
}

void codes_q5k(const uint8_t* qh, const uint8_t* qs, uint8_t* codes) {
  codes_q4k(qs, codes);
  for (size_t part = 0; part < 8; ++part)
    for (size_t i = 0; i < 32; ++i)
      codes[32 * part + i] = static_cast<uint8_t>(codes[32 * part + i] | (qh[i] >> part & 1) << 4);
}

void codes_q6k(const uint8_t* ql, const uint8_t* qh, uint8_t* codes) {
  for (size_t half = 0; half < 2; ++half, ql += 64, qh += 32, codes += 128)
    for (size_t i = 0; i < 32; ++i) {
      const int h = qh[i];
      codes[i] = static_cast<uint8_t>((ql[i] & 15) | (h & 3) << 4);
      codes[32 + i] = static_cast<uint8_t>((ql[32 + i] & 15) | (h >> 2 & 3) << 4);
      codes[64 + i] = static_cast<uint8_t>(ql[i] >> 4 | (h >> 4 & 3) << 4);
      codes[96 + i] = static_cast<uint8_t>(ql[32 + i] >> 4 | (h >> 6 & 3) << 4);
    }
}

// 8 six-bit scales and 8 six-bit minima in 12 bytes
void scales_q4k(const uint8_t* p, uint8_t* scale, uint8_t* minimum) {
  for (size_t i = 0; i < 4; ++i) {
    scale[i] = p[i] & 63;
    minimum[i] = p[4 + i] & 63;
    scale[4 + i] = static_cast<uint8_t>((p[8 + i] & 15) | (p[i] >> 6) << 4);
    minimum[4 + i] = static_cast<uint8_t>(p[8 + i] >> 4 | (p[4 + i] >> 6) << 4);
  }
}

// 16 six-bit scales in 12 bytes, less 32
void scales_q3k(const uint8_t* p, uint8_t* scale) {
  for (size_t i = 0; i < 16; ++i) {
    const int low = i < 8 ? p[i] & 15 : p[i - 8] >> 4;
    const int high = p[8 + i % 4] >> (2 * (i / 4)) & 3;
    scale[i] = static_cast<uint8_t>((low | high << 4) - 32);
  }
}

// ---- where things go in a tile ----

uint32_t four(const uint8_t* codes) {
  uint32_t v;
  memcpy(&v, codes, 4);
  return v;
}

void put(uint8_t* plane, size_t vector, size_t lane, uint32_t v) {
  memcpy(plane + 64 * vector + 4 * lane, &v, 4);
}

void put_plane_4(const uint8_t* c, size_t lane, uint8_t* plane) {
  for (size_t v = 0; v < 4; ++v)
    put(plane, v, lane, (four(c + 8 * v) & 0x0f0f0f0fu) | (four(c + 8 * v + 4) & 0x0f0f0f0fu) << 4);
}

void put_plane_2(const uint8_t* c, size_t lane, int shift, uint8_t* plane) {
  for (size_t v = 0; v < 2; ++v) {
    uint32_t word = 0;
    for (size_t k = 0; k < 4; ++k)
      word |= (four(c + 16 * v + 4 * k) >> shift & 0x03030303u) << (2 * k);
    put(plane, v, lane, word);
  }
}

void put_plane_1(const uint8_t* c, size_t lane, int shift, uint8_t* plane) {
  uint32_t word = 0;
  for (size_t k = 0; k < 8; ++k) word |= (four(c + 4 * k) >> shift & 0x01010101u) << k;
  put(plane, 0, lane, word);
}

void put_codes(size_t bits, const uint8_t* c, size_t lane, uint8_t* run) {  // 32 codes of one row
  switch (bits) {
    case 2:
      return put_plane_2(c, lane, 0, run);
    case 3:
      put_plane_2(c, lane, 0, run);
      return put_plane_1(c, lane, 2, run + 128);
    case 4:
      return put_plane_4(c, lane, run);
    case 5:
      put_plane_4(c, lane, run);
      return put_plane_1(c, lane, 4, run + 256);
    case 6:
      put_plane_4(c, lane, run);
      return put_plane_2(c, lane, 4, run + 256);
    default:
      for (size_t v = 0; v < 8; ++v) put(run, v, lane, four(c + 4 * v));
  }
}

uint8_t get_code(size_t bits, const uint8_t* run, size_t lane, size_t column) {  // column < 32
  const auto at = [&](size_t vector) { return run[64 * vector + 4 * lane + column % 4]; };
  const size_t k = column / 4;  // which run of 4 columns
  const int low4 = at(k / 2) >> (4 * (k % 2)) & 15, low2 = at(k / 4) >> (2 * (k % 4)) & 3;
  switch (bits) {
    case 2:
      return static_cast<uint8_t>(low2);
    case 3:
      return static_cast<uint8_t>(low2 | (at(2) >> k & 1) << 2);
    case 4:
      return static_cast<uint8_t>(low4);
    case 5:
      return static_cast<uint8_t>(low4 | (at(4) >> k & 1) << 4);
    case 6:
      return static_cast<uint8_t>(low4 | (at(4 + k / 4) >> (2 * (k % 4)) & 3) << 4);
    default:
      return at(k);
  }
}

// ---- a block of one row into a tile ----

struct Target {
  size_t lane;
  uint8_t* scales;  // the block's, for all lanes
  void half(size_t at, const uint8_t* from) const { memcpy(scales + at + 2 * lane, from, 2); }
  void byte(size_t at, uint8_t v) const { scales[at + lane] = v; }
};

void q2k_scales(const uint8_t* b, const Target& t) {
  t.half(0, b + 80);
  t.half(32, b + 82);
  for (size_t i = 0; i < 16; ++i) t.byte(64 + 16 * i, b[i]);
}
void q3k_scales(const uint8_t* b, const Target& t) {
  uint8_t scale[16];
  scales_q3k(b + 96, scale);
  t.half(0, b + 108);
  for (size_t i = 0; i < 16; ++i) t.byte(32 + 16 * i, scale[i]);
}
void q4k_scales(const uint8_t* b, const Target& t) {
  uint8_t scale[8], minimum[8];
  scales_q4k(b + 4, scale, minimum);
  t.half(0, b);
  t.half(32, b + 2);
  for (size_t i = 0; i < 8; ++i) {
    t.byte(64 + 32 * i, scale[i]);
    t.byte(64 + 32 * i + 16, minimum[i]);
  }
}
void q6k_scales(const uint8_t* b, const Target& t) {
  t.half(0, b + 208);
  for (size_t i = 0; i < 16; ++i) t.byte(32 + 16 * i, b[192 + i]);
}

// Takes apart one block: codes[block], and its scales into the tile.
void unpack_block(Format format, const uint8_t* b, uint8_t* codes, const Target& t) {
  switch (format) {
    case Format::kQ4_0:
      split_nibbles(b + 2, codes, codes + 16, 16);
      return t.half(0, b);
    case Format::kQ4_1:
      split_nibbles(b + 4, codes, codes + 16, 16);
      t.half(0, b);
      return t.half(32, b + 2);
    case Format::kQ5_0:
      split_nibbles(b + 6, codes, codes + 16, 16);
      add_fifth_bits(b + 2, codes);
      return t.half(0, b);
    case Format::kQ5_1:
      split_nibbles(b + 8, codes, codes + 16, 16);
      add_fifth_bits(b + 4, codes);
      t.half(0, b);
      return t.half(32, b + 2);
    case Format::kQ8_0:
      codes_8(b + 2, codes, 32);
      return t.half(0, b);
    case Format::kQ8_1:
      codes_8(b + 4, codes, 32);
      return t.half(0, b);
    case Format::kQ2K:
      codes_q2k(b + 16, codes);
      return q2k_scales(b, t);
    case Format::kQ3K:
      codes_q3k(b, b + 32, codes);
      return q3k_scales(b, t);
    case Format::kQ4K:
      codes_q4k(b + 16, codes);
      return q4k_scales(b, t);
    case Format::kQ5K:
      codes_q5k(b + 16, b + 48, codes);
      return q4k_scales(b, t);
    case Format::kQ6K:
      codes_q6k(b, b + 128, codes);
      return q6k_scales(b, t);
    case Format::kQ8K:
      codes_8(b + 4, codes, 256);
      memcpy(t.scales + 4 * t.lane, b, 4);
      return;
    case Format::kF32:
    case Format::kF16:
    case Format::kBF16:
      return;
  }
}

float half_at(const uint8_t* p, size_t lane) {
  uint16_t h;
  memcpy(&h, p + 2 * lane, 2);
  return half_to_float(h);
}

// The value of a code of column `column` of a scale block, in the formats' own order of operations.
float value_of(Format format, const uint8_t* s, size_t lane, size_t column, int code) {
  const float d = half_at(s, lane), q = static_cast<float>(code);
  const size_t run = column / 32, half = column / 16;
  switch (format) {
    case Format::kQ4_0:
      return d * (q - 8.0f);
    case Format::kQ5_0:
      return d * (q - 16.0f);
    case Format::kQ8_0:
    case Format::kQ8_1:
      return d * (q - 128.0f);
    case Format::kQ4_1:
    case Format::kQ5_1:
      return d * q + half_at(s + 32, lane);
    case Format::kQ2K: {
      const uint8_t sub = s[64 + 16 * half + lane];
      const float scale = d * static_cast<float>(sub & 15);
      return scale * q - half_at(s + 32, lane) * static_cast<float>(sub >> 4);
    }
    case Format::kQ4K:
    case Format::kQ5K: {
      const uint8_t* sub = s + 64 + 32 * run + lane;
      const float scale = d * static_cast<float>(sub[0]);
      return scale * q - half_at(s + 32, lane) * static_cast<float>(sub[16]);
    }
    case Format::kQ3K:
    case Format::kQ6K: {
      const float scale = d * static_cast<float>(static_cast<int8_t>(s[32 + 16 * half + lane]));
      return scale * (q - (format == Format::kQ3K ? 4.0f : 32.0f));
    }
    case Format::kQ8K: {
      float wide;
      memcpy(&wide, s + 4 * lane, 4);
      return wide * (q - 128.0f);
    }
    case Format::kF32:
    case Format::kF16:
    case Format::kBF16:
      break;
  }
  return 0.0f;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

Tile::Tile(Format format, std::span<const uint8_t> data, size_t rows, size_t cols, ThreadPool& pool,
           Arena& arena)
    : format_(format), rows_(rows), cols_(cols), tiles_((rows + kLanes - 1) / kLanes) {
  const FormatInfo& f = info(format);
  constexpr size_t kLimit = size_t{1} << 31;
  if (rows == 0 || cols == 0 || rows > kLimit || cols > kLimit || cols % f.block != 0)
    throw std::invalid_argument("a " + std::string(f.name) + " weight of " + std::to_string(rows) +
                                " x " + std::to_string(cols) + ": columns must be a multiple of " +
                                std::to_string(f.block));
  const size_t row_bytes = cols / f.block * f.block_bytes;
  if (data.size() != rows * row_bytes)
    throw std::invalid_argument("a " + std::string(f.name) + " weight of " + std::to_string(rows) +
                                " x " + std::to_string(cols) + " takes " +
                                std::to_string(rows * row_bytes) + " bytes, not " +
                                std::to_string(data.size()));
  tile_bytes_ = f.bits == 0 ? cols * kLanes * f.block_bytes
                            : (cols + f.chunk - 1) / f.chunk * f.chunk_bytes();
  tile_bytes_ = round_up(tile_bytes_, 64);
  data_ = arena.take(tiles_ * tile_bytes_);
  pool.run({&tiles_, 1}, [&](size_t, size_t tile) { pack_tile(tile, data.data(), row_bytes); });
}

void Tile::pack_tile(size_t tile, const uint8_t* data, size_t row_bytes) {
  const FormatInfo& f = info(format_);
  uint8_t* const to = data_.get() + tile * tile_bytes_;
  const size_t count = std::min(kLanes, rows_ - tile * kLanes);
  const uint8_t* const first = data + tile * kLanes * row_bytes;
  if (f.bits == 0) {
    for (size_t c = 0; c < cols_; ++c)
      for (size_t lane = 0; lane < count; ++lane)
        memcpy(to + (c * kLanes + lane) * f.block_bytes,
               first + lane * row_bytes + c * f.block_bytes, f.block_bytes);
    return;
  }
  uint8_t block[kSuper];
  const size_t runs = f.block / kGroup, blocks = f.chunk / f.block;
  for (size_t b = 0; b < cols_ / f.block; ++b) {
    uint8_t* const chunk = to + b / blocks * f.chunk_bytes();
    uint8_t* const codes = chunk + f.chunk_scales() + b % blocks * runs * 64 * f.bits;
    for (size_t lane = 0; lane < count; ++lane) {
      unpack_block(format_, first + lane * row_bytes + b * f.block_bytes, block,
                   {lane, chunk + b % blocks * f.scale_bytes});
      for (size_t run = 0; run < runs; ++run)
        put_codes(f.bits, block + kGroup * run, lane, codes + run * 64 * f.bits);
    }
  }
}

void Tile::dequantize_row(size_t row, float* out) const {
  const FormatInfo& f = info(format_);
  const size_t lane = row % kLanes;
  const uint8_t* const from = tile(row / kLanes);
  for (size_t k = 0; k < cols_; ++k) {
    if (f.bits != 0) {
      const uint8_t* const chunk = from + k / f.chunk * f.chunk_bytes();
      const uint8_t* const run = chunk + f.chunk_scales() + k % f.chunk / kGroup * 64 * f.bits;
      const uint8_t* const scales = chunk + k % f.chunk / f.block * f.scale_bytes;
      const int code = get_code(f.bits, run, lane, k % kGroup);
      out[k] = value_of(format_, scales, lane, k % f.block, code);
    } else if (format_ == Format::kF32) {
      memcpy(out + k, from + (k * kLanes + lane) * 4, 4);
    } else {
      uint16_t h;
      memcpy(&h, from + (k * kLanes + lane) * 2, 2);
      out[k] = format_ == Format::kF16 ? half_to_float(h) : bf16_to_float(h);
    }
  }
}

}  // namespace squall
