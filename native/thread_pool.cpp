#include "thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

namespace squall {
namespace {

constexpr int kBarrierSpins = 20000;  // a phase takes microseconds
constexpr int kIdleSpins = 4000;      // about 50 us between two steps

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Until `value` is no longer `old`: spins, then sleeps.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

void Barrier::wait() {
  const uint32_t round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    round_.notify_all();
  } else {
    wait_for_change(round_, round, kBarrierSpins);
  }
}

ThreadPool::ThreadPool(size_t threads) : done_(threads) {
  for (size_t i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::work(size_t thread) {
  for (uint32_t seen = 0;;) {
    wait_for_change(round_, seen, kIdleSpins);
    ++seen;
    if (stop_.load()) return;
    (*job_)(thread);
    done_.wait();
  }
}

void ThreadPool::run_all(const std::function<void(size_t)>& job) {
  if (workers_.empty()) return job(0);
  job_ = &job;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  job(0);
  done_.wait();
}

void ThreadPool::run(size_t tasks, const std::function<void(size_t, size_t)>& task) {
  std::atomic<size_t> next{0};
  run_all([&](size_t thread) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i, thread);
  });
}

namespace {

// CPUs of the cgroup's quota, or infinity. v2: "max 100000" or "150000 100000"; v1: two files.
double quota_of(const std::string& folder) {
  std::string quota;
  double period = 0;
  if (std::ifstream both(folder + "/cpu.max"); both >> quota >> period && quota != "max")
    return std::stod(quota) / period;
  double limit = 0;
  std::ifstream first(folder + "/cpu.cfs_quota_us"), second(folder + "/cpu.cfs_period_us");
  if (first >> limit && second >> period && limit > 0 && period > 0) return limit / period;
  return INFINITY;
}

// The least quota of this process's cgroups and their parents.
double cgroup_quota() {
  double least = INFINITY;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && controllers.find("cpu") == std::string::npos) continue;
    const std::string root =
        controllers.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/" + controllers;
    for (std::string path = line.substr(second + 1);; path = path.substr(0, path.rfind('/'))) {
      least = std::min(least, quota_of(root + path));
      if (path.empty() || path == "/") break;
    }
    least = std::min(least, quota_of(root));
  }
  return least;
}

}  // namespace

ThreadLimit default_threads() {
  size_t allowed = std::max(1u, std::thread::hardware_concurrency());
  std::string why = "hardware threads";
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    allowed = static_cast<size_t>(CPU_COUNT(&set));
    why = "CPU affinity";
  }
  const double quota = cgroup_quota();
  if (quota < static_cast<double>(allowed)) {
    allowed = std::max(size_t{1}, static_cast<size_t>(quota));
    std::ostringstream text;
    text << "cgroup CPU quota of " << quota;
    why = text.str();
  }
#endif
  return {allowed, why};
}

}  // namespace squall
