#include "platform.h"

#if defined(_WIN32)
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <sys/mman.h>
#endif
#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <initializer_list>
#include <new>
#include <sstream>
#include <thread>

namespace squall {

// ---- memory ----

#if defined(_WIN32)
uint8_t* take_pages(size_t bytes) {
  void* const p = VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
  if (p == nullptr) throw std::bad_alloc();
  return static_cast<uint8_t*>(p);
}

void give_back_pages(uint8_t* pages, size_t) { VirtualFree(pages, 0, MEM_RELEASE); }
#else
uint8_t* take_pages(size_t bytes) {
  void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  constexpr size_t kHuge = size_t{2} << 20;
  if (bytes >= 4 * kHuge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return static_cast<uint8_t*>(p);
}

void give_back_pages(uint8_t* pages, size_t bytes) { munmap(pages, bytes); }
#endif

// ---- CPUs ----

#if defined(__linux__)
namespace {

// CPUs of the cgroup's quota, or infinity. v2: "max 100000" or "150000 100000"; v1: two files.
double quota_of(const std::string& folder) {
  std::string quota;
  double period = 0;
  if (std::ifstream both(folder + "/cpu.max"); both >> quota >> period && quota != "max")
    if (const double used = std::strtod(quota.c_str(), nullptr); used > 0 && period > 0)
      return used / period;
  double limit = 0;
  std::ifstream first(folder + "/cpu.cfs_quota_us"), second(folder + "/cpu.cfs_period_us");
  if (first >> limit && second >> period && limit > 0 && period > 0) return limit / period;
  return INFINITY;
}

// The least quota of this process's cgroups and their parents.
double cgroup_quota(const std::string& root) {
  double least = INFINITY;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && controllers.find("cpu") == std::string::npos) continue;
    const std::string mount =
        root + (controllers.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/" + controllers);
    std::string path = line.substr(second + 1);
    for (size_t end = path.size(); end != std::string::npos && end > 0; end = path.rfind('/')) {
      path.resize(end);
      least = std::min(least, quota_of(mount + path));
    }
    least = std::min(least, quota_of(mount));
  }
  return least;
}

}  // namespace
#endif

ThreadLimit default_threads([[maybe_unused]] const std::string& root) {
  size_t allowed = std::max(1u, std::thread::hardware_concurrency());
  std::string why = "hardware threads";
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    allowed = static_cast<size_t>(CPU_COUNT(&set));
    why = "CPU affinity";
  }
  const double quota = cgroup_quota(root);
  if (quota < static_cast<double>(allowed)) {
    allowed = std::max(size_t{1}, static_cast<size_t>(quota));
    std::ostringstream text;
    text << "cgroup CPU quota of " << quota;
    why = text.str();
  }
#elif defined(__APPLE__)
  // Those for work that wants speed: stages wait for their slowest thread.
  int fast = 0;
  size_t size = sizeof fast;
  if (sysctlbyname("hw.perflevel0.logicalcpu", &fast, &size, nullptr, 0) == 0 && fast > 0) {
    allowed = static_cast<size_t>(fast);
    why = "performance cores";
  }
#elif defined(_WIN32)
  DWORD_PTR own = 0, all = 0;
  if (GetProcessAffinityMask(GetCurrentProcess(), &own, &all) != 0 && own != 0) {
    allowed = static_cast<size_t>(__builtin_popcountll(own));
    why = "CPU affinity";
  }
#endif
  return {allowed, why};
}

// ---- instructions ----

#if defined(__x86_64__)
namespace {

struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Cpuid(unsigned leaf, unsigned part) { __get_cpuid_count(leaf, part, &a, &b, &c, &d); }
};

constexpr bool all_of(unsigned bits, std::initializer_list<int> numbers) {
  return std::ranges::all_of(numbers, [&](int n) { return (bits >> n & 1) != 0; });
}

// Whether the system keeps these registers, by the bits of XCR0.
bool keeps(unsigned registers) {
  if (!all_of(Cpuid(1, 0).c, {27})) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & registers) == registers;
}

}  // namespace

// Not by __builtin_cpu_supports: which names it knows differs, and some linkers lack its library.
bool cpu_has(Cpu instructions) {
  const Cpuid old(1, 0), more(7, 0);
  const bool avx2 = all_of(old.c, {12, 29}) && all_of(more.b, {5}) && keeps(0x6);
#ifdef SQUALL_SIMDE  // which makes the others of it
  return avx2;
#endif
  const bool avx512 = avx2 && all_of(more.b, {16, 17, 30, 31}) && keeps(0xe6);
  switch (instructions) {
    case Cpu::kAvx2:
      return avx2;
    case Cpu::kAvxVnni:
      return avx2 && all_of(Cpuid(7, 1).a, {4});
    case Cpu::kAvx512Bw:
      return avx512;
    case Cpu::kAvx512Vnni:
      return avx512 && all_of(more.c, {11});
    default:
      return false;
  }
}
#elif defined(__aarch64__) && defined(__linux__)
bool cpu_has(Cpu instructions) {
  return instructions == Cpu::kDotprod && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}
#elif defined(__aarch64__) && defined(__APPLE__)
bool cpu_has(Cpu instructions) {
  int value = 0;
  size_t size = sizeof value;
  return instructions == Cpu::kDotprod &&
         sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value != 0;
}
#else
bool cpu_has(Cpu) { return false; }
#endif

}  // namespace squall
