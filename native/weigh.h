// The softmax's exponentials, by our own arithmetic: those of C libraries differ between versions
// and processors.
#pragma once
#include <cfloat>
#include <cstddef>
#include <span>

namespace squall {

// NaN stays NaN, which no comparison finds; an infinite logit is a very large one.
inline float capped(float x) { return x > FLT_MAX ? FLT_MAX : x; }

// out[i] = exp((capped(x[i]) - top) * scale), to 3e-7, for x <= top; 0 where that is below 1e-37,
// and for NaN.
using Weigh = void (*)(const float* x, size_t n, float top, float scale, float* out);

// Variants that this machine runs, the fastest last. All give the same bits.
std::span<const Weigh> weigh_variants();
extern const Weigh weigh;

}  // namespace squall
