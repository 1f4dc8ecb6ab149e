#include "tile.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "pack.h"
#include "platform.h"

namespace squall {

size_t product(std::initializer_list<size_t> factors) {
  constexpr size_t kMost = size_t{1} << 48;  // sums of some such do not wrap either
  size_t all = 1;
  for (const size_t factor : factors)
    if (__builtin_mul_overflow(all, factor, &all) || all > kMost)
      throw std::invalid_argument("sizes are too large: their product is beyond any memory");
  return all;
}

Memory::Memory(size_t bytes) : bytes_(std::max(bytes, size_t{64})), data_(take_pages(bytes_)) {}

Memory::~Memory() { give_back_pages(data_, bytes_); }

void* thread_memory(size_t bytes) {
  thread_local std::unique_ptr<Memory> memory;
  if (memory == nullptr || memory->bytes() < bytes) memory = std::make_unique<Memory>(bytes);
  return memory->data();
}

std::shared_ptr<uint8_t> Arena::take(size_t bytes) {
  constexpr size_t kAlign = 4096;
  bytes = (bytes + kAlign - 1) / kAlign * kAlign;
  if (memory_ == nullptr || memory_->bytes() - used_ < bytes) {
    memory_ = std::make_shared<Memory>(std::max(bytes, chunk_));
    used_ = 0;
  }
  used_ += bytes;
  return {memory_, memory_->data() + used_ - bytes};
}

namespace {

uint8_t get_code(size_t bits, const uint8_t* run, size_t lane, size_t column) {  // column < 32
  const auto at = [&](size_t vector) { return run[64 * vector + 4 * lane + column % 4]; };
  const size_t k = column / 4;  // which run of 4 columns
  const int low4 = at(k / 2) >> (4 * (k % 2)) & 15, low2 = at(k / 4) >> (2 * (k % 4)) & 3;
  switch (bits) {
    case 1:
      return at(0) >> k & 1;
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

float half_at(const uint8_t* p, size_t lane) {
  uint16_t h;
  memcpy(&h, p + 2 * lane, 2);
  return half_to_float(h);
}

// The value of a code of column `column` of a scale block, in the formats' own order of operations.
float value_of(Format format, const uint8_t* s, size_t lane, size_t column, int code) {
  const float d = half_at(s, lane), q = static_cast<float>(code);
  const size_t run = column / 32, half = column / 16;
  if (has_zero_code(format)) return d * (q - half_at(s + 32, lane));
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
    case Format::kHqq4:
    case Format::kHqq3:
    case Format::kHqq2:
    case Format::kHqq1:
      return d * q + half_at(s + 32, lane);
    case Format::kHqq8:
      return d * (q - 128.0f) + half_at(s + 32, lane);
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
    default:  // floats
      break;
  }
  return 0.0f;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

std::string described(Format format, size_t rows, size_t cols) {
  return "a " + std::string(info(format).name) + " weight of " + std::to_string(rows) + " x " +
         std::to_string(cols);
}

bool has_nan(std::span<const uint8_t> f8) {
  bool found = false;
  for (const uint8_t f : f8) found |= (f & 0x7f) == 0x7f;
  return found;
}

}  // namespace

Tile::Tile(Format format, size_t rows, size_t cols, Arena& arena)
    : format_(format), rows_(rows), cols_(cols), tiles_((rows + kLanes - 1) / kLanes) {
  const FormatInfo& f = info(format);
  constexpr size_t kLimit = size_t{1} << 31;
  if (rows == 0 || cols == 0 || rows > kLimit || cols > kLimit || cols % f.block != 0)
    throw std::invalid_argument(described(format, rows, cols) + ": columns must be a multiple of " +
                                std::to_string(f.block));
  tile_bytes_ = f.bits == 0 ? head_bytes(format) + cols * kLanes * f.block_bytes
                            : (cols + f.chunk - 1) / f.chunk * f.chunk_bytes();
  tile_bytes_ = round_up(tile_bytes_, 64);
  data_ = arena.take(product({tiles_, tile_bytes_}));
}

void Tile::pack(size_t tile, const uint8_t* const* lanes, const float* factors,
                const uint8_t* next) {
  uint8_t* const to = data_.get() + tile * tile_bytes_;
  if (head_bytes(format_) != 0)
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const float factor = kF8Unit * factors[lane];
      memcpy(to + 4 * lane, &factor, 4);
    }
  pack_tile(format_, lanes, cols_, to + head_bytes(format_), next);
}

Tile::Tile(Format format, std::span<const uint8_t> data, size_t rows, size_t cols, ThreadPool& pool,
           Arena& arena, std::span<const float> factors)
    : Tile(format, rows, cols, arena) {
  const FormatInfo& f = info(format);
  const size_t row_bytes = cols / f.block * f.block_bytes;
  if (data.size() != rows * row_bytes)
    throw std::invalid_argument(described(format, rows, cols) + " takes " +
                                std::to_string(rows * row_bytes) + " bytes, not " +
                                std::to_string(data.size()));
  if (!factors.empty() && (factors.size() != rows || format != Format::kF8))
    throw std::invalid_argument(described(format, rows, cols) + " has " +
                                std::to_string(factors.size()) + " factors of rows");
  if (format == Format::kF8 && has_nan(data))
    throw std::invalid_argument(described(format, rows, cols) + " holds NaN");
  const std::vector<uint8_t> nothing(rows % kLanes == 0 ? 0 : row_bytes);
  pool.run({&tiles_, 1}, [&](size_t, size_t tile) {
    std::array<const uint8_t*, kLanes> lanes;
    std::array<float, kLanes> scales;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const size_t row = tile * kLanes + lane;
      lanes[lane] = row < rows ? data.data() + row * row_bytes : nothing.data();
      scales[lane] = row < factors.size() ? factors[row] : 1.0f;
    }
    const uint8_t* const next = data.data() + std::min(rows, (tile + 1) * kLanes) * row_bytes;
    pack(tile, lanes.data(), scales.data(), next);
  });
}

Tile::Tile(Format format, const RowReader& from, ThreadPool& pool, Arena& arena)
    : Tile(format, from.rows, from.cols, arena) {
  const FormatInfo& f = info(format);
  const size_t row_bytes = cols_ / f.block * f.block_bytes;
  const Quantizer quantizer(format, from, nullptr, pool);
  std::atomic<size_t> refused{rows_};
  pool.run({&tiles_, 1}, [&](size_t, size_t tile) {
    std::vector<uint8_t> blocks(kLanes * row_bytes);
    std::vector<float> values(cols_);
    std::array<const uint8_t*, kLanes> lanes;
    std::array<float, kLanes> factors = {};
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const size_t row = tile * kLanes + lane;
      lanes[lane] = blocks.data() + lane * row_bytes;
      if (row >= rows_) continue;
      from.read(row, values.data());
      if (!quantizer.row(row, values.data(), blocks.data() + lane * row_bytes, &factors[lane]))
        refused = row;
    }
    pack(tile, lanes.data(), factors.data(), blocks.data());
  });
  if (refused != rows_)
    throw std::invalid_argument(described(format, rows_, cols_) + ": row " +
                                std::to_string(refused) +
                                " has a value that is NaN, infinite or "
                                "above " +
                                std::to_string(static_cast<int>(kLargestWeight)));
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
    } else if (format_ == Format::kF8) {
      float factor;
      memcpy(&factor, from + 4 * lane, 4);
      out[k] = factor * half_to_float(f8_to_half(from[head_bytes(format_) + k * kLanes + lane]));
    } else {
      uint16_t h;
      memcpy(&h, from + (k * kLanes + lane) * 2, 2);
      out[k] = format_ == Format::kF16 ? half_to_float(h) : bf16_to_float(h);
    }
  }
}

}  // namespace squall
