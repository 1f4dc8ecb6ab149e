// Where the time of steps goes. Off by default: a step then asks once whether it is on.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

namespace squall {

// What a phase cannot do without, however it is done.
struct Work {
  uint64_t bytes = 0;           // of weights and KV cache, each read once
  uint64_t dots = 0, fmas = 0;  // multiply-accumulates of int8 and of f32

  Work& operator+=(const Work& more) {
    bytes += more.bytes;
    dots += more.dots;
    fmas += more.fmas;
    return *this;
  }
  Work times(uint64_t count) const { return {bytes * count, dots * count, fmas * count}; }
};

inline int64_t now_ns() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct PhaseProfile {
  std::string name;
  double seconds = 0;  // elapsed
  double waiting = 0;  // of these: for tasks of other threads, and between groups
  Work work;
};

// A phase's part of the running step: nanoseconds that threads spent on it, and when the last of
// its tasks ended.
struct Timing {
  std::atomic<int64_t> busy{0}, last{0};
  PhaseProfile sum;  // of the steps before

  void add(int64_t begin, int64_t end) {
    busy.fetch_add(end - begin, std::memory_order_relaxed);
    for (int64_t seen = last.load(std::memory_order_relaxed);
         seen < end && !last.compare_exchange_weak(seen, end, std::memory_order_relaxed);) {
    }
  }
};

}  // namespace squall
