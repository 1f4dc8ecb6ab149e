// What must not happen, and what must happen then: strange callers, failing tasks, no memory.
#if __has_include(<pthread.h>)
#include <pthread.h>
#endif

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "sampler.h"

namespace {

std::atomic<int64_t> allocations_left{INT64_MAX};

}  // namespace

// Where it inlines some of these, GCC 12 takes them for mismatched.
[[gnu::noinline]] void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return allocations_left.fetch_sub(1) <= 0 ? nullptr : std::malloc(bytes);
}
[[gnu::noinline]] void* operator new(size_t bytes) {
  if (void* const p = operator new(bytes, std::nothrow)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace squall::test {
namespace {

using Floats = std::vector<float>;

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

// ---- rules of floats ----

#if defined(__x86_64__)
uint64_t rules() { return __builtin_ia32_stmxcsr() & ~0x3full; }  // without what has happened
void set_rules(uint64_t r) { __builtin_ia32_ldmxcsr(static_cast<uint32_t>(r)); }
constexpr uint64_t kStrange = 0x1f80 | 0x8040 | 0x4000;  // no subnormals, rounding up
#elif defined(__aarch64__)
uint64_t rules() {
  uint64_t r;
  asm volatile("mrs %0, fpcr" : "=r"(r) : : "memory");
  return r;
}
void set_rules(uint64_t r) { asm volatile("msr fpcr, %0" : : "r"(r) : "memory"); }
constexpr uint64_t kStrange = 1u << 24 | 1u << 22;
#else
uint64_t rules() { return 0; }
void set_rules(uint64_t) {}
constexpr uint64_t kStrange = 0;
#endif

// fn's result, called by a thread with strange rules.
template <class Fn>
auto strangely(Fn fn) {
  const uint64_t before = rules();
  set_rules(kStrange);
  auto result = fn();
  expect(rules() == kStrange, "the caller's rules are as they were");
  set_rules(before);
  return result;
}

// Values and weights of all sizes: sums are rounded, products below 2^-126.
Floats linear_by(const Floats& values, const Floats& x, size_t threads, Format format) {
  ThreadPool pool(threads);
  Arena arena;
  Floats out(3 * 32);
  const RowReader from{
      32, 256, [&](size_t row, float* to) { std::copy_n(values.data() + row * 256, 256, to); }};
  const Tile tile(format, from, pool, arena);
  linear_alone(*find_kernels(isas().front(), CacheType::kF16), pool, tile, x, 3, out.data());
  return out;
}

void test_rules() {
  const Floats values = floats(32 * 256);
  Floats x = floats(3 * 256);
  for (size_t i = 0; i < x.size(); i += 2) x[i] *= 1e-38f;
  for (const Format format : {Format::kF32, Format::kQ4K, Format::kQ8_0, Format::kHqq4})
    for (const size_t threads : {1, 3}) {
      const auto run = [&] { return linear_by(values, x, threads, format); };
      const Floats plain = run();
      expect(same_bits(strangely(run), plain),
             "the caller's rules change no linear of " + std::string(info(format).name));
    }
  const SamplerState state({.temperature = 0.8, .top_p = 0.9, .seed = 3}, 0);
  const Floats logits = floats(1000, 3.0f);
  const auto choice = [&] { return choose({state, logits, {}, {}, {}, 5}); };
  const Choice a = choice(), b = strangely(choice);
  expect(a.token == b.token && a.logprob == b.logprob && a.top == b.top,
         "the caller's rules change no choice");
}

// ---- the pool ----

void test_failing_tasks() {
  for (size_t threads = 1; threads <= 4; ++threads) {
    ThreadPool pool(threads);
    const std::vector<size_t> totals{7, 40, 3};
    for (size_t failing = 0; failing < 40; ++failing) {
      std::atomic<size_t> last{0};
      std::string caught;
      try {
        pool.run(totals, [&](size_t stage, size_t i) {
          if (stage == 1 && i >= failing) throw std::runtime_error("task " + std::to_string(i));
          if (stage == 2) ++last;
        });
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
      expect(caught.starts_with("task "), "what a task throws reaches the caller");
      expect(last == 0, "after a failure nothing is begun");
      std::atomic<size_t> done{0};
      pool.run(totals, [&](size_t, size_t) { ++done; });
      expect(done == 50, "the pool works after a failure");
    }
  }
}

// The caller's tasks wait until a worker's has failed.
void test_failing_worker() {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    const std::thread::id caller = std::this_thread::get_id();
    std::atomic<bool> failed{false};
    bool caught = false;
    try {
      const size_t total = 30;
      pool.run({&total, 1}, [&](size_t, size_t) {
        if (std::this_thread::get_id() != caller) {
          failed = true;
          throw std::bad_alloc();
        }
        while (!failed) std::this_thread::yield();
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    expect(caught, "what a worker's task throws reaches the caller");
  }
}

void test_several_callers() {
  ThreadPool pool(3);
  const auto call = [&pool](size_t seed, Turn turn) {
    for (size_t round = 0; round < 300; ++round) {
      std::vector<size_t> totals(1 + (round * seed) % 5, round % 9);
      std::vector<std::atomic<size_t>> sums(totals.size());
      pool.run(totals, [&](size_t stage, size_t i) { sums[stage] += i + 1; }, turn);
      for (const auto& sum : sums)
        expect(sum == round % 9 * (round % 9 + 1) / 2, "two callers share a pool");
    }
  };
  std::thread other(call, 3, Turn::kPatient), another(call, 5, Turn::kPatient);
  std::thread step(call, 4, Turn::kFirst);
  call(7, Turn::kAny);
  for (std::thread* thread : {&other, &another, &step}) thread->join();
}

// A run that goes first waits inside its only task until patient tasks begin no more, however many
// there are; once it is done they go on.
void test_patient_run() {
  for (size_t threads = 1; threads <= 3; ++threads) {
    ThreadPool pool(threads);
    std::atomic<size_t> begun{0}, after{0};
    std::atomic<bool> done{false};
    std::thread tower([&] {
      const std::vector<size_t> totals{3, 200000, 5};
      pool.run(
          totals,
          [&](size_t, size_t) {
            ++(done ? after : begun);
            if (!done) std::this_thread::sleep_for(std::chrono::microseconds(100));
          },
          Turn::kPatient);
    });
    while (begun == 0) std::this_thread::yield();
    bool stood_still = false;
    const size_t one = 1;
    pool.run(
        {&one, 1},
        [&](size_t, size_t) {
          for (int look = 0; look < 100 && !stood_still; ++look) {
            const size_t before = begun;
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            stood_still = begun == before;
          }
          done = true;
        },
        Turn::kFirst);
    tower.join();
    expect(stood_still, "a patient run gives way");
    expect(begun + after == 200008 && after > 0, "and is done whole afterwards");
  }
}

// ---- programs ----

constexpr size_t kHidden = 64, kHeads = 4, kDim = 16, kVocab = 40, kBlock = 16, kContext = 700;

// One attention, or two that do not depend on each other.
struct Twins {
  std::unique_ptr<Executor> e;
  std::vector<size_t> seen;

  Twins(bool first, bool second, size_t threads) {
    rng.seed(11);
    const TilePtr table = tile(Format::kQ8_0, kVocab, kHidden);
    std::vector<TilePtr> weights;
    for (int i = 0; i < 6; ++i)
      weights.push_back(tile(Format::kQ8_0, i % 3 == 0 ? kHeads * kDim : 2 * kDim, kHidden));
    e = std::make_unique<Executor>("scalar", std::make_shared<ThreadPool>(threads),
                                   Limits{{kContext, 1}, 44, kBlock, kContext, CacheType::kF32});
    const auto value = [&](size_t width) { return e->add_value(width, 0, false); };
    const size_t tokens = e->add_index(0, 1), spans = e->add_index(0, 2);
    const size_t outputs = e->add_index(1, 1);
    const size_t x = value(kHidden);
    e->embed(x, tokens, table, 1.0f, {});
    std::vector<AttendOp> ops;
    for (size_t i = first ? 0 : 1; i < (second ? 2u : 1u); ++i) {
      e->add_cache(2, kDim);
      const size_t q = value(kHeads * kDim), k = value(2 * kDim), v = value(2 * kDim);
      const auto project = [&](size_t out, size_t weight) {
        e->linear({out, x, weights[3 * i + weight], {}, Activation::kNone, 1.0f, kNone});
      };
      project(q, 0);
      project(k, 1);
      project(v, 2);
      seen.push_back(e->add_value(kHeads * kDim, 0, true));
      ops.push_back({seen.back(), q, k, v, spans, ops.size(), kHeads, 2, kDim, 0.2f, 0, 0.0f});
    }
    for (const AttendOp& op : ops) e->attend(op);
    const size_t wanted = e->add_value(kHidden, 1, false);
    const size_t logits = e->add_value(kVocab, 1, false);
    e->gather_rows(wanted, seen.front(), outputs);
    e->linear({logits, wanted, table, {}, Activation::kNone, 1.0f, kNone});
    e->plan({logits});
  }

  Floats step(size_t begin, size_t end) {
    std::vector<int32_t> tokens, positions, table(44), bounds{0, static_cast<int32_t>(end - begin)};
    std::iota(table.begin(), table.end(), 0);
    for (size_t p = begin; p < end; ++p) {
      tokens.push_back(static_cast<int32_t>(p * 7 % kVocab));
      positions.push_back(static_cast<int32_t>(p));
    }
    std::vector<int32_t> spans(positions.size());
    for (const int32_t p : positions) spans.push_back(p + 1);
    const std::vector<int32_t> outputs{bounds[1] - 1};
    Floats logits(kVocab);
    e->run({{tokens.size(), 1}, {tokens, spans, outputs}, {}, positions, bounds, table, 44},
           {logits.data()});
    return logits;
  }
  Floats value(size_t i) const {
    size_t rows = 0;
    return e->value(seen[i], &rows);
  }
};

void test_independent_attends() {
  const size_t past = brief ? 270 : 600;
  Twins both(true, true, 3), one(true, false, 1), two(false, true, 1);
  for (Twins* twins : {&both, &one, &two}) twins->step(0, past);
  one.step(past, past + 1);
  two.step(past, past + 1);
  bool same = true;
  for (int round = 0; round < (brief ? 20 : 200); ++round) {
    both.step(past, past + 1);
    same = same && same_bits(both.value(0), one.value(0)) && same_bits(both.value(1), two.value(0));
  }
  expect(same, "independent attentions keep apart");
}

void test_no_memory() {
  const size_t past = brief ? 270 : 600;
  Twins twins(true, true, 2);
  twins.step(0, past);
  const Floats expected = twins.step(past, past + 1), seen = twins.value(1);
  int64_t allowed = 0;
  for (bool failed = true; failed && allowed < 1000; allowed += brief ? 9 : 1) {
    failed = false;
    try {
      allocations_left = allowed + 8;  // the caller's own arrays
      twins.step(past, past + 1);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    allocations_left = INT64_MAX;
    expect(same_bits(twins.step(past, past + 1), expected) && same_bits(twins.value(1), seen),
           "a step is right after one without memory");
  }
  expect(allowed > 1, "a step without memory fails");
}

}  // namespace

void test_callers() {
  test_failing_tasks();
  test_failing_worker();
  test_several_callers();
  test_patient_run();
}

void test_faults() {
  test_rules();
  test_callers();
  test_independent_attends();
  test_no_memory();
}

void on_small_stack(const std::function<void()>& fn) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(SQUALL_SIMDE) || \
    !__has_include(<pthread.h>)
  fn();  // these need larger ones, or have no such call
#else
  pthread_attr_t attributes;
  pthread_t thread;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, size_t{128} << 10);
  const auto call = [](void* p) -> void* {
    (*static_cast<const std::function<void()>*>(p))();
    return nullptr;
  };
  void* const argument = const_cast<std::function<void()>*>(&fn);
  expect(pthread_create(&thread, &attributes, call, argument) == 0, "a thread of 128 KB starts");
  pthread_join(thread, nullptr);
  pthread_attr_destroy(&attributes);
#endif
}

}  // namespace squall::test
