// The table of kernels: one per ISA, all with the same results for a row whatever the other rows
// are.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "format.h"

namespace squall {

enum class Activation : uint8_t { kNone, kSilu, kGelu, kGeluTanh, kQuickGelu, kRelu };

// out[tiles][rows][16] = x[rows] . `tiles` tiles, which lie tile_bytes apart
using MatmulQuantized = void (*)(const uint8_t* tile, size_t tiles, size_t tile_bytes, size_t cols,
                                 const QuantGroup* x, size_t x_stride, size_t rows, float* out);
// Rows `stride` apart; or, where there are taps, the rows of x that they name side by side.
struct FloatRows {
  const float* x;
  size_t stride;
  // [cols / width][apart]: numbers of rows, zeros where negative. panel: kPanelStride floats for
  // each of the rows that are multiplied.
  const int32_t* taps = nullptr;
  size_t apart = 0, width = 0;
  float* panel = nullptr;
};
constexpr size_t kPanelCols = 128, kPanelStride = kPanelCols + kLanes;
using MatmulFloat = void (*)(const uint8_t* tile, size_t tiles, size_t tile_bytes, size_t cols,
                             const FloatRows& x, size_t rows, float* out);

// One query head at one position.
struct Query {
  const float* q;  // [head_dim]
  float* out;      // [head_dim]
  int32_t begin;   // first position it sees
  int32_t end;     // one past the last; where it is not above begin, zeros are mixed
  // Added to scores by distance from `own`, from -reach - kLanes to reach + kLanes; null: nothing.
  const float* relative = nullptr;
  int32_t own = 0;
};

enum class CacheType : uint8_t { kF16, kF32, kQ8_0 };
constexpr size_t kCacheTypes = 3;

// The keys or values of a head of a layer in the KV cache, which lies in regions of blocks: a
// region has a run for each layer's keys and values of each head, so that a head is read as a
// stream and regions that were never used take no memory.
struct Plane {
  static constexpr size_t kRegion = 32;  // blocks
  uint8_t* data;                         // of the first region
  size_t block_bytes, region_bytes;

  uint8_t* block(size_t i) const {
    return data + i / kRegion * region_bytes + i % kRegion * block_bytes;
  }
};

struct AttendArgs {
  const Query* queries;
  size_t count;          // at most kMaxQueries
  Plane keys;            // blocks [head_dim][block_size]
  Plane values;          // rows [padded head_dim], block_size a block
  const int32_t* table;  // block of each run of block_size positions
  size_t block_size, head_dim, value_bytes;
  float scale, softcap;  // softcap 0: none
  int32_t reach = 0;     // of the queries' `relative`, which all have, or none
};
constexpr size_t kMaxQueries = 64;
constexpr size_t kMaxHeadDim = 512;
constexpr size_t kSegment = 256;  // positions whose sums are made apart

constexpr size_t padded(size_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }
// Floats of a query's sums over a segment.
constexpr size_t part_floats(size_t head_dim) { return 2 * kLanes + padded(head_dim); }
constexpr size_t element_bytes(CacheType type) {
  return type == CacheType::kF32 ? 4 : type == CacheType::kF16 ? 2 : 1;
}
// Bytes of the scales of a position's keys, or values.
constexpr size_t scale_bytes(CacheType type, size_t head_dim) {
  return type == CacheType::kQ8_0 ? (head_dim + kGroup - 1) / kGroup * sizeof(float) : 0;
}
constexpr size_t key_bytes(CacheType type, size_t head_dim) {
  return head_dim * element_bytes(type) + scale_bytes(type, head_dim);
}
constexpr size_t value_bytes(CacheType type, size_t head_dim) {
  return padded(head_dim) * element_bytes(type) + scale_bytes(type, head_dim);
}

// Memory of this thread, 64-byte aligned, until it calls again.
void* thread_memory(size_t bytes);

// What an ISA with dot products of its own does otherwise than the one before it.
struct IntegerKernels {
  std::string_view isa;
  MatmulQuantized matmul_quantized[kFormats];  // null for float formats
  // The matmul's inner loop alone, on ones in the first-level cache: how many multiply-accumulates
  // of int8 `turns` of it were. `out` is their sum.
  uint64_t (*peak_dots)(size_t turns, float* out);
};

struct Kernels : IntegerKernels {
  MatmulFloat matmul_float[kFormats];  // null for the others
  // One span of a row; cols a multiple of 32. Groups are fine by the span's root mean square.
  void (*quantize)(const float* x, size_t cols, QuantGroup* out, FineGroup* digits);
  // Each run of `group` of the `cols` columns by itself; bias may be null.
  void (*rms_norm)(const float* x, size_t cols, size_t group, const float* weight, float eps,
                   float* out);
  void (*layer_norm)(const float* x, size_t cols, size_t group, const float* weight,
                     const float* bias, float eps, float* out);
  // Of each column its mean, and the sum of squared distances from it.
  void (*moments)(const float* x, size_t stride, size_t rows, size_t cols, float* mean,
                  float* squares);
  // out = act((x - mean) * factor + bias), of columns
  void (*scale_columns)(const float* x, const float* mean, const float* factor, const float* bias,
                        Activation act, size_t n, float* out);
  // out = residual + scale * act(acc[rows][16] + bias) for n <= 16 columns; rows of out and of
  // residual are `stride` apart; bias and residual may be null
  void (*finish)(const float* acc, size_t rows, const float* bias, Activation act, float scale,
                 const float* residual, float* out, size_t stride, size_t n);
  // out = act(gate + gate_bias) * (up + up_bias), likewise
  void (*finish_gated)(const float* gate, const float* up, size_t rows, const float* gate_bias,
                       const float* up_bias, Activation act, float* out, size_t stride, size_t n);
  void (*add_scaled)(const float* a, const float* b, float scale, size_t n, float* out);
  // out = act(a + scale * gate * b); gate may be null
  void (*add_gated)(const float* a, const float* b, float scale, const float* gate, Activation act,
                    size_t n, float* out);
  void (*softcap)(const float* x, float cap, size_t n, float* out);
  void (*softmax)(float* x, size_t n);
  CacheType cache;
  void (*store_key)(const float* k, size_t head_dim, size_t block_size, uint8_t* block,
                    size_t offset);
  void (*store_value)(const float* v, size_t head_dim, uint8_t* row);
  void (*attend)(const AttendArgs& args);
  // The same in pieces: the sums of one segment to parts[query][part_floats], and all of them.
  void (*attend_segment)(const AttendArgs& args, size_t segment, float* parts);
  void (*merge_segments)(const AttendArgs& args, const float* const* parts, size_t segments);
  uint64_t (*peak_fmas)(size_t turns, float* out);  // as peak_dots, of f32
};

// Tables by CacheType, and integers that go with the rest of another ISA's.
extern const Kernels kScalar[kCacheTypes];
#if defined(__x86_64__)
extern const Kernels kAvx2[kCacheTypes];
extern const Kernels kAvx512Bw[kCacheTypes];
extern const IntegerKernels kAvxVnni, kAvx512;
#elif defined(__aarch64__)
extern const Kernels kNeon[kCacheTypes];
extern const IntegerKernels kDotprod;
#endif

// The ISAs this machine can run, the best first.
std::vector<std::string_view> isas();

// The kernels of an ISA by name, or null when this machine cannot run them.
const Kernels* find_kernels(std::string_view isa, CacheType cache);

}  // namespace squall
