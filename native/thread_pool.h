// Threads that live as long as the pool, spin briefly for work, then sleep. The caller works too.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace squall {

// While it lives this thread computes as threads do by default: rounding to nearest, with
// subnormal numbers, without traps. The caller's rules must not reach results.
class DefaultFloats {
 public:
  DefaultFloats();
  ~DefaultFloats();
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  const uint64_t before_;
};

// Whose turn it is where runs share a pool. A step goes first: patient runs give way to it, a while
// after their own turn began, between two tasks, and go on when it is done. Others just run.
enum class Turn : uint8_t { kAny, kFirst, kPatient };

class ThreadPool {
 public:
  static constexpr int64_t kTurnNs =
      60'000'000;  // that a patient run has before it gives way again

  // Throws std::runtime_error where the system gives no such number.
  explicit ThreadPool(size_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  size_t threads() const { return workers_.size() + 1; }

  // task(stage, index) for every index in [0, totals[stage]); a stage begins when the one before it
  // is done. Each thread begins with its own part of the indices, so that it finds in its cache
  // what it made there a stage before, and then helps with the others'. Waits for tasks, not for
  // threads: one that the system has put aside holds up nobody. All compute by DefaultFloats. What
  // the first failing task throws comes out of here, and the tasks left are not run.
  void run(std::span<const size_t> totals,
           const std::function<void(size_t stage, size_t index)>& task, Turn turn = Turn::kAny);

 private:
  struct Job;
  void work(size_t thread);
  void stop();
  void run_job(std::span<const size_t> totals, const std::function<void(size_t, size_t)>& task,
               bool patient);
  void publish(const std::shared_ptr<Job>& job);

  std::mutex mutex_;
  std::shared_ptr<Job> job_;  // the latest; guarded by mutex_
  std::atomic<uint32_t> round_{0};
  std::atomic<bool> stop_{false};
  std::atomic<uint32_t> first_{0}, gone_{0};  // runs that go first: there now, and done
  std::vector<std::thread> workers_;
};

}  // namespace squall
