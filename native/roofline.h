// What this machine does at most, measured: what every other rate is held against.
#pragma once
#include "kernels.h"
#include "thread_pool.h"

namespace squall {

// Each with all threads of the pool, the best of several passes, a second.
double read_bandwidth(ThreadPool& pool);                     // bytes read from memory
double peak_dots(const Kernels& kernels, ThreadPool& pool);  // int8 multiply-accumulates
double peak_fmas(const Kernels& kernels, ThreadPool& pool);  // f32 multiply-accumulates

}  // namespace squall
