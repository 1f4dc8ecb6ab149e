// From float32 to the blocks of a file (format.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "format.h"
#include "thread_pool.h"

namespace squall {

// A matrix that is read a row at a time, from several threads, perhaps more than once.
struct RowReader {
  size_t rows, cols;
  std::function<void(size_t row, float* out)> read;
};

// Values of f32, f16 or bf16.
void read_floats(Format format, const uint8_t* from, size_t n, float* out);

// Every block but q8_k's holds float16 numbers, one of them as large as a weight.
constexpr float kLargestWeight = 65504.0f;

// Formats of 32 columns get the bytes of ggml's reference. Those of 256 are fitted by least
// squares, `importance` being the weights of the columns' squared errors, or null. HQQ is fitted to
// the whole matrix first.
class Quantizer {
 public:
  Quantizer(Format format, const RowReader& from, const float* importance, ThreadPool& pool);

  // Row `row`, whose values are x. `factor` is set for formats that have one a row. False, and
  // nothing written, if a value is NaN or above kLargestWeight.
  bool row(size_t row, const float* x, uint8_t* blocks, float* factor) const;

 private:
  Format format_;
  size_t cols_;
  const float* importance_;
  std::vector<float> zeros_;  // HQQ's, of each group
};

}  // namespace squall
