// What the native tests share.
#pragma once
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "executor.h"

namespace squall::test {

extern int failures;
extern std::mt19937 rng;
extern bool brief;  // fewer sizes, as emulated processors are slow

void expect(bool ok, const std::string& what);
std::vector<float> floats(size_t n, float size = 1.0f);  // normally distributed
TilePtr tile(Format format, size_t rows, size_t cols);

void test_kernels();
void test_faults();
void test_callers();  // of a pool; test_faults has them
// Calls fn on a thread with as little stack as some systems give.
void on_small_stack(const std::function<void()>& fn);

}  // namespace squall::test
