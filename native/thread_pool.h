// Threads that live as long as the pool, spin briefly for work, then sleep. The caller is thread 0.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace squall {

// All threads wait for the last; may be used again at once. Spins, then sleeps.
class Barrier {
 public:
  explicit Barrier(size_t threads) : threads_(static_cast<uint32_t>(threads)) {}
  void wait();

 private:
  const uint32_t threads_;
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

class ThreadPool {
 public:
  explicit ThreadPool(size_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  size_t threads() const { return workers_.size() + 1; }
  // job(thread) on every thread; returns when all are done. One caller at a time. The job must not
  // throw.
  void run_all(const std::function<void(size_t thread)>& job);
  // task(index, thread) for every index in [0, tasks), taken in order by whichever thread is free.
  void run(size_t tasks, const std::function<void(size_t task, size_t thread)>& task);

 private:
  void work(size_t thread);

  const std::function<void(size_t)>* job_ = nullptr;
  std::atomic<uint32_t> round_{0};
  std::atomic<bool> stop_{false};
  Barrier done_;
  std::vector<std::thread> workers_;
};

// Threads that affinity and the cgroup's CPU quota allow, and which of them decided.
struct ThreadLimit {
  size_t threads;
  std::string why;
};
ThreadLimit default_threads();

}  // namespace squall
