#include "thread_pool.h"

#include <chrono>
#include <exception>
#include <stdexcept>
#include <utility>

#include "profile.h"

namespace squall {
namespace {

#if defined(__x86_64__)
constexpr uint64_t kDefaultFloats = 0x1f80;
uint64_t float_rules() { return __builtin_ia32_stmxcsr(); }
void set_float_rules(uint64_t rules) { __builtin_ia32_ldmxcsr(static_cast<uint32_t>(rules)); }
#elif defined(__aarch64__)
constexpr uint64_t kDefaultFloats = 0;
uint64_t float_rules() {
  uint64_t rules;
  asm volatile("mrs %0, fpcr" : "=r"(rules) : : "memory");
  return rules;
}
void set_float_rules(uint64_t rules) { asm volatile("msr fpcr, %0" : : "r"(rules) : "memory"); }
#else
constexpr uint64_t kDefaultFloats = 0;
uint64_t float_rules() { return 0; }
void set_float_rules(uint64_t) {}
#endif

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Until `value` is no longer `old`: spins for more than a stage takes, and than Python takes
// between two steps of one answer, then sleeps. By the clock, as processors differ tenfold in how
// long they pause.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  constexpr int kPauses = 32;  // between looks at the clock
  if (value.load(std::memory_order_acquire) != old) return;
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(250);
  do
    for (int i = 0; i < kPauses; ++i) {
      relax();
      if (value.load(std::memory_order_acquire) != old) return;
    }
  while (std::chrono::steady_clock::now() < end);
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

DefaultFloats::DefaultFloats() : before_(float_rules()) { set_float_rules(kDefaultFloats); }
DefaultFloats::~DefaultFloats() { set_float_rules(before_); }

// Owned by every thread that works on it, so a late one finds its counters, all spent, and leaves.
// A later run uses it again when nobody is late.
struct ThreadPool::Job {
  struct alignas(64) Counter {
    std::atomic<size_t> value{0};
  };
  const size_t parts, capacity;  // threads, and stages at most
  size_t stages = 0;
  std::atomic<size_t> users{0};
  std::vector<size_t> totals;
  const size_t stride = capacity + 7;     // of a part's counters: no two parts share a cache line
  std::vector<std::atomic<size_t>> next;  // [parts][stages], from each part's beginning
  std::vector<Counter> done;
  std::vector<std::atomic<uint32_t>> complete;
  const std::function<void(size_t, size_t)>* task = nullptr;  // alive while a task is left
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const std::atomic<uint32_t>* first = nullptr;  // of a patient run: how many go first
  std::atomic<int64_t> turn_end{0};

  Job(size_t threads, size_t most)
      : parts(threads),
        capacity(most),
        totals(most),
        next(parts * stride),
        done(most),
        complete(most) {}

  void reset(std::span<const size_t> sizes, const std::function<void(size_t, size_t)>& fn) {
    stages = sizes.size();
    task = &fn;
    failed = false;
    for (size_t s = 0; s < stages; ++s) {
      totals[s] = sizes[s];
      done[s].value.store(0, std::memory_order_relaxed);
      complete[s].store(0, std::memory_order_relaxed);
      for (size_t p = 0; p < parts; ++p) next[p * stride + s].store(0, std::memory_order_relaxed);
    }
  }

  bool gives_way() const {
    return first != nullptr && first->load(std::memory_order_relaxed) != 0 && now_ns() >= turn_end;
  }

  // False: it gave way, and what is left can be taken up again.
  bool work(size_t thread) {
    for (size_t stage = 0; stage < stages; ++stage) {
      if (totals[stage] == 0) continue;
      for (size_t p = 0; p < parts && complete[stage].load(std::memory_order_acquire) == 0; ++p)
        if (!work(stage, (thread + p) % parts)) return false;
      wait_for_change(complete[stage], 0);
    }
    return true;
  }

  bool work(size_t stage, size_t part) {
    const size_t total = totals[stage], begin = total * part / parts;
    const size_t count = total * (part + 1) / parts - begin;
    std::atomic<size_t>& counter = next[part * stride + stage];
    size_t finished = 0;
    bool stays = true;
    // Looks before it adds: to add would take the line from those who still need it.
    while (counter.load(std::memory_order_relaxed) < count && (stays = !gives_way())) {
      const size_t i = counter.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) break;
      run(stage, begin + i);
      ++finished;
    }
    if (finished > 0 &&
        done[stage].value.fetch_add(finished, std::memory_order_acq_rel) + finished == total) {
      complete[stage].store(1, std::memory_order_release);
      complete[stage].notify_all();
    }
    return stays;
  }

  void run(size_t stage, size_t i) {
    if (failed.load(std::memory_order_relaxed)) return;
    try {
      (*task)(stage, i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

ThreadPool::ThreadPool(size_t threads) {
  constexpr size_t kMost = 4096;
  if (threads > kMost)
    throw std::invalid_argument(std::to_string(threads) + " threads; at most " +
                                std::to_string(kMost) + " are allowed");
  try {
    for (size_t i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::exception& error) {
    const std::string text = "only " + std::to_string(workers_.size() + 1) + " of " +
                             std::to_string(threads) + " threads could be had: " + error.what();
    stop();
    throw std::runtime_error(text);
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stop_.store(true);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::work(size_t thread) {
  const DefaultFloats floats;
  for (uint32_t seen = 0;;) {
    wait_for_change(round_, seen);
    seen = round_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    std::shared_ptr<Job> job;
    {
      const std::lock_guard lock(mutex_);
      job = job_;
      if (job) ++job->users;
    }
    if (!job) continue;
    job->work(thread);
    job->users.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadPool::run(std::span<const size_t> totals,
                     const std::function<void(size_t, size_t)>& task, Turn turn) {
  const DefaultFloats floats;
  struct Guard {
    ThreadPool* pool;
    ~Guard() {
      if (pool == nullptr) return;
      pool->first_.fetch_sub(1);
      pool->gone_.fetch_add(1);
      pool->gone_.notify_all();
    }
  } const guard{turn == Turn::kFirst ? this : nullptr};
  if (turn == Turn::kFirst) first_.fetch_add(1);
  if (workers_.empty() && turn != Turn::kPatient) {
    for (size_t stage = 0; stage < totals.size(); ++stage)
      for (size_t i = 0; i < totals[stage]; ++i) task(stage, i);
    return;
  }
  run_job(totals, task, turn == Turn::kPatient);
}

void ThreadPool::publish(const std::shared_ptr<Job>& job) {
  job_ = job;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
}

void ThreadPool::run_job(std::span<const size_t> totals,
                         const std::function<void(size_t, size_t)>& task, bool patient) {
  std::shared_ptr<Job> job;
  {
    const std::lock_guard lock(mutex_);
    job = job_;
    if (!job || job->users.load(std::memory_order_acquire) != 0 || job->capacity < totals.size())
      job = std::make_shared<Job>(threads(), totals.size());
    job->reset(totals, task);
    job->first = patient ? &first_ : nullptr;
    job->turn_end = 0;
    ++job->users;
    publish(job);
  }
  while (!job->work(0)) {
    // Until one of those that go first is done: others may follow it without end.
    const uint32_t gone = gone_.load();
    if (first_.load() != 0) gone_.wait(gone);
    job->turn_end = now_ns() + kTurnNs;
    const std::lock_guard lock(mutex_);
    publish(job);
  }
  const std::exception_ptr error = std::exchange(job->error, nullptr);
  job->users.fetch_sub(1, std::memory_order_release);
  if (error) std::rethrow_exception(error);
}

}  // namespace squall
