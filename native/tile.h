// A weight in memory: the rows of a matrix as tiles (format.h), packed from a file's blocks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>

#include "format.h"
#include "quantize.h"
#include "thread_pool.h"

namespace squall {

// Throws std::invalid_argument where memory could not have so many bytes.
size_t product(std::initializer_list<size_t> factors);

// Page-aligned, zeroed memory that asks for huge pages; freed with its last owner.
class Memory {
 public:
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  uint8_t* data_;
};

// Hands out parts of large memory, so that small weights lie on huge pages too: with 4 KiB pages
// decode waits for the address translation. Parts keep their memory alive. Not thread-safe.
class Arena {
 public:
  // chunk: bytes that it asks for at a time, at least.
  explicit Arena(size_t chunk = size_t{64} << 20) : chunk_(chunk) {}
  std::shared_ptr<uint8_t> take(size_t bytes);

 private:
  size_t chunk_;
  std::shared_ptr<Memory> memory_;
  size_t used_ = 0;
};

class Tile {
 public:
  // `data` holds rows * row_bytes of the file's blocks. Throws std::invalid_argument on a size
  // that does not fit. `factors` multiply the rows of an 8-bit float; empty means 1.
  Tile(Format format, std::span<const uint8_t> data, size_t rows, size_t cols, ThreadPool& pool,
       Arena& arena, std::span<const float> factors = {});
  // Quantizes rows as they are read. Throws std::invalid_argument on what has no such form.
  Tile(Format format, const RowReader& from, ThreadPool& pool, Arena& arena);

  Format format() const { return format_; }
  size_t rows() const { return rows_; }
  size_t cols() const { return cols_; }
  size_t tiles() const { return tiles_; }
  size_t tile_bytes() const { return tile_bytes_; }
  size_t nbytes() const { return tiles_ * tile_bytes_; }
  bool is_integer() const { return info(format_).bits != 0; }
  const uint8_t* tile(size_t index) const { return data_.get() + index * tile_bytes_; }
  void dequantize_row(size_t row, float* out) const;

 private:
  Tile(Format format, size_t rows, size_t cols, Arena& arena);
  void pack(size_t tile, const uint8_t* const* lanes, const float* factors, const uint8_t* next);

  Format format_;
  size_t rows_, cols_, tiles_, tile_bytes_;
  std::shared_ptr<uint8_t> data_;
};

}  // namespace squall
