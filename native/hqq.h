// Half-quadratic quantization: codes around a zero point that is fitted to what rounding leaves.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "quantize.h"

namespace squall {

constexpr int kHqqSteps = 10;

// The zero points of all groups of 64 columns, row by row.
std::vector<float> fit_hqq_zeros(size_t bits, const RowReader& from, ThreadPool& pool);

// One row, with the zero points of its groups.
void quantize_hqq(size_t bits, const float* x, const float* zeros, size_t cols, uint8_t* blocks);

}  // namespace squall
