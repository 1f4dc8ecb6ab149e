#include "roofline.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "tile.h"

namespace squall {
namespace {

template <class Fn>
double seconds_of(Fn fn) {
  const auto start = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double peak(ThreadPool& pool, uint64_t (*loop)(size_t turns, float* out)) {
  // Short enough that some are not interrupted on a busy machine.
  constexpr double kPassSeconds = 0.5e-3;
  constexpr int kPasses = 100;
  const size_t threads = pool.threads();
  std::atomic<uint64_t> done;
  const auto pass = [&](size_t turns) {
    done = 0;
    return seconds_of([&] {
      pool.run({&threads, 1}, [&](size_t, size_t) {
        float keep;
        done += loop(turns, &keep);
        asm volatile("" : : "r"(&keep) : "memory");
      });
    });
  };
  size_t turns = 256;
  while (pass(turns) < kPassSeconds) turns *= 2;
  double best = 0;
  for (int i = 0; i < kPasses; ++i) {
    const double seconds = pass(turns);
    best = std::max(best, static_cast<double>(done.load()) / seconds);
  }
  return best;
}

}  // namespace

double read_bandwidth(ThreadPool& pool) {
  constexpr int kPasses = 7;
  constexpr size_t kBytes = size_t{256} << 20, kPart = size_t{1} << 20;
  const Memory memory(kBytes);
  std::memset(memory.data(), 1, kBytes);
  std::atomic<uint64_t> keep{0};
  const size_t parts = kBytes / kPart;
  double best = 0;
  for (int i = 0; i < kPasses; ++i) {
    const double seconds = seconds_of([&] {
      pool.run({&parts, 1}, [&](size_t, size_t part) {
        const auto* p = reinterpret_cast<const uint64_t*>(memory.data() + part * kPart);
        uint64_t sums[8] = {};
        for (size_t at = 0; at < kPart / 8; at += 8)
          for (size_t j = 0; j < 8; ++j) sums[j] += p[at + j];
        for (const uint64_t s : sums) keep += s;
      });
    });
    best = std::max(best, static_cast<double>(kBytes) / seconds);
  }
  return best;
}

double peak_dots(const Kernels& kernels, ThreadPool& pool) { return peak(pool, kernels.peak_dots); }
double peak_fmas(const Kernels& kernels, ThreadPool& pool) { return peak(pool, kernels.peak_fmas); }

}  // namespace squall
