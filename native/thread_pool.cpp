#include "thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>

namespace squall {
namespace {

// About 250 us: more than a stage takes, and what Python takes between two steps of one answer.
constexpr int kSpins = 20000;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Until `value` is no longer `old`: spins, then sleeps.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

// Owned by every thread that works on it, so a late one finds its counters, all spent, and leaves.
struct ThreadPool::Job {
  struct alignas(64) Counter {
    std::atomic<size_t> value{0};
  };
  const size_t parts;  // as many as threads
  const std::vector<size_t> totals;
  std::vector<Counter> next, done;  // next: [stages][parts]
  std::vector<std::atomic<uint32_t>> complete;
  const std::function<void(size_t, size_t)>& task;  // alive while a task is left

  Job(size_t threads, std::span<const size_t> sizes, const std::function<void(size_t, size_t)>& fn)
      : parts(threads),
        totals(sizes.begin(), sizes.end()),
        next(sizes.size() * threads),
        done(sizes.size()),
        complete(sizes.size()),
        task(fn) {}

  void work(size_t thread) {
    for (size_t stage = 0; stage < totals.size(); ++stage) {
      for (size_t p = 0; p < parts; ++p) work(stage, (thread + p) % parts);
      if (totals[stage] > 0) wait_for_change(complete[stage], 0);
    }
  }

  void work(size_t stage, size_t part) {
    const size_t total = totals[stage], end = total * (part + 1) / parts;
    size_t finished = 0;
    for (std::atomic<size_t>& counter = next[stage * parts + part].value;; ++finished) {
      const size_t i = total * part / parts + counter.fetch_add(1, std::memory_order_relaxed);
      if (i >= end) break;
      task(stage, i);
    }
    if (finished == 0) return;
    if (done[stage].value.fetch_add(finished, std::memory_order_acq_rel) + finished == total) {
      complete[stage].store(1, std::memory_order_release);
      complete[stage].notify_all();
    }
  }
};

ThreadPool::ThreadPool(size_t threads) {
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
    wait_for_change(round_, seen);
    seen = round_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    std::shared_ptr<Job> job;
    {
      const std::lock_guard lock(mutex_);
      job = job_;
    }
    if (job) job->work(thread);
  }
}

void ThreadPool::run(std::span<const size_t> totals,
                     const std::function<void(size_t, size_t)>& task) {
  const auto job = std::make_shared<Job>(threads(), totals, task);
  if (!workers_.empty()) {
    const std::lock_guard lock(mutex_);
    job_ = job;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }
  job->work(0);
}

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

ThreadLimit default_threads(const std::string& root) {
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
#endif
  return {allowed, why};
}

}  // namespace squall
