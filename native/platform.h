// What differs between operating systems, and which instructions a processor has.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace squall {

// Zeros, from the system and in its pages; a page takes memory when it is first touched. Throws
// std::bad_alloc.
uint8_t* take_pages(size_t bytes);
void give_back_pages(uint8_t* pages, size_t bytes);

// Threads that affinity and the cgroup's CPU quota allow, and which of them decided.
struct ThreadLimit {
  size_t threads;
  std::string why;
};
ThreadLimit default_threads(const std::string& root = "");  // where /proc and /sys are

enum class Cpu : uint8_t { kAvx2, kAvxVnni, kAvx512Bw, kAvx512Vnni, kDotprod };
// Here, with the system keeping its registers. kAvx2: with FMA and F16C; kAvx512Bw: with F, VL, DQ.
bool cpu_has(Cpu instructions);

}  // namespace squall
