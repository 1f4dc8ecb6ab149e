// Number formats and how each lies in a tile.
//
// A tile is 16 rows of a weight, interleaved so that a SIMD lane is a row, and read from front to
// back. Integer formats are chunks of 32, 64 or 256 columns, each scales, then codes:
//   scales  direct: for every 32 columns (of HQQ and the integers of GPTQ: of a block) f16 d[16],
//           and f16 m[16] when there is a minimum, or the code that means zero. Super,
//   for 256 columns:
//           f16 d[16], f16 dmin[16], then 16 byte-sized sub-scales, and sub-minima, per group.
//   codes   for every 32 columns bit planes of 16 x 32 codes. A vector of 64 bytes is 16 rows x 4
//   columns; the 4-bit
//           plane holds columns 8v..8v+3 of vector v in its low nibbles and 8v+4..8v+7 in its high
//           ones, the 2-bit plane four such runs of 4 columns, the 1-bit plane eight. 8-bit codes
//           lie as they are.
// Float formats hold for every column the 16 rows' values; 8-bit ones begin with f32 factors of the
// 16 rows.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace squall {

constexpr size_t kLanes = 16;   // rows of a tile
constexpr size_t kGroup = 32;   // columns quantized together in an activation
constexpr size_t kSuper = 256;  // columns of a K-quant block
constexpr size_t kHqqGroup = 64;

enum class Format : uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ8_1,
  kQ2K,
  kQ3K,
  kQ4K,
  kQ5K,
  kQ6K,
  kQ8K,
  kHqq8,
  kHqq4,
  kHqq3,
  kHqq2,
  kHqq1,
  kF8,
  kInt8G32,
  kInt8G64,
  kInt8G128,
  kInt4G32,
  kInt4G64,
  kInt4G128,
  kInt3G32,
  kInt3G64,
  kInt3G128,
  kInt2G32,
  kInt2G64,
  kInt2G128,
};
constexpr size_t kFormats = 33;

struct FormatInfo {
  std::string_view name;
  size_t block;        // columns of a block in the file
  size_t block_bytes;  // its bytes
  size_t bits;         // of a code in the tile; 0: a float format
  size_t chunk;        // columns of a chunk of the tile, a multiple of the block
  size_t scale_bytes;  // bytes of 16 blocks' scales in a chunk

  size_t chunk_scales() const { return chunk / block * scale_bytes; }
  size_t chunk_bytes() const { return chunk_scales() + chunk * kLanes * bits / 8; }
};

constexpr std::array<FormatInfo, kFormats> kFormatInfo = {{
    {"f32", 1, 4, 0, 1, 0},
    {"f16", 1, 2, 0, 1, 0},
    {"bf16", 1, 2, 0, 1, 0},
    {"q4_0", 32, 18, 4, 64, 32},
    {"q4_1", 32, 20, 4, 32, 64},
    {"q5_0", 32, 22, 5, 64, 32},
    {"q5_1", 32, 24, 5, 32, 64},
    {"q8_0", 32, 34, 8, 64, 32},
    {"q8_1", 32, 36, 8, 64, 32},
    {"q2_k", 256, 84, 2, 256, 64 + 16 * 16},
    {"q3_k", 256, 110, 3, 256, 32 + 16 * 16},
    {"q4_k", 256, 144, 4, 256, 64 + 8 * 32},
    {"q5_k", 256, 176, 5, 256, 64 + 8 * 32},
    {"q6_k", 256, 210, 6, 256, 32 + 16 * 16},
    {"q8_k", 256, 292, 8, 256, 64},
    {"hqq8", 64, 68, 8, 64, 64},
    {"hqq4", 64, 36, 4, 64, 64},
    {"hqq3", 64, 28, 3, 64, 64},
    {"hqq2", 64, 20, 2, 64, 64},
    {"hqq1", 64, 12, 1, 64, 64},
    {"f8_e4m3", 1, 1, 0, 1, 0},
    {"int8_g32", 32, 36, 8, 32, 64},
    {"int8_g64", 64, 68, 8, 64, 64},
    {"int8_g128", 128, 132, 8, 128, 64},
    {"int4_g32", 32, 36, 4, 32, 64},
    {"int4_g64", 64, 68, 4, 64, 64},
    {"int4_g128", 128, 132, 4, 128, 64},
    {"int3_g32", 32, 36, 3, 32, 64},
    {"int3_g64", 64, 68, 3, 64, 64},
    {"int3_g128", 128, 132, 3, 128, 64},
    {"int2_g32", 32, 36, 2, 32, 64},
    {"int2_g64", 64, 68, 2, 64, 64},
    {"int2_g128", 128, 132, 2, 128, 64},
}};

inline const FormatInfo& info(Format format) { return kFormatInfo[static_cast<size_t>(format)]; }

constexpr bool has_zero_code(Format format) { return format >= Format::kInt8G32; }
constexpr bool is_hqq(Format format) { return format >= Format::kHqq8 && format <= Format::kHqq1; }
// Bytes in front of the codes of a float tile.
constexpr size_t head_bytes(Format format) { return format == Format::kF8 ? 4 * kLanes : 0; }

inline std::optional<Format> format_named(std::string_view name) {
  for (size_t i = 0; i < kFormats; ++i)
    if (kFormatInfo[i].name == name) return static_cast<Format>(i);
  return std::nullopt;
}

// 32 activations: x ~ scale * q, or scale * (q + r / 256) where `fine` is set. One cache line.
//
// A group is fine when its largest value is more than kFineRatio times the root mean square of its
// span (the row of a norm, the head of attention, the group itself elsewhere): there the step of
// int8 alone makes most of the error. On SmolLM2-135M that is one group in eight, and takes the
// divergence from float32 to a fifth.
struct alignas(64) QuantGroup {
  int8_t q[kGroup];
  float scale;
  float sum;          // of the 32 approximated values
  float half_sum[2];  // of each 16
  int32_t minus_q;    // -(sum of q): the zero points of unsigned codes
  int32_t minus_half_q[2];
  int32_t fine;
};
static_assert(sizeof(QuantGroup) == 64);

// The finer digits of a fine group; undefined for others. A quantized row is `groups` of
// QuantGroup, then as many of these.
struct alignas(64) FineGroup {
  int8_t r[kGroup];
  int32_t minus_r;
  int32_t minus_half_r[2];
};
static_assert(sizeof(FineGroup) == sizeof(QuantGroup));

constexpr float kFineRatio = 4.5f;

}  // namespace squall
