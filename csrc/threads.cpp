#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#define USMLITE_POSIX 1
#endif

namespace usmlite {
namespace {

struct Job {
  size_t tasks;
  void (*work)(void*, size_t, int);
  void* context;
  std::atomic<size_t> next{0};
  std::atomic<int> workers{0};

  void help() {
    const int worker = workers.fetch_add(1);
    for (size_t task; (task = next.fetch_add(1)) < tasks;) work(context, task, worker);
  }
};

// Threads that sleep until there is a job. One job at a time: who finds the pool taken works alone, so
// that many callers do not make many times as many threads.
class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  bool try_run(Job& job, int helpers) {
    std::unique_lock<std::mutex> taken(owner_, std::try_to_lock);
    if (!taken) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (static_cast<int>(threads_.size()) < helpers) threads_.emplace_back([this] { serve(); });
      } catch (...) {  // no more threads to be had: fewer will do
        helpers = static_cast<int>(threads_.size());
      }
      job_ = &job;
      wanted_ = helpers;
    }
    wake_.notify_all();
    job.help();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || wanted_ > 0; });
      if (stop_) return;
      --wanted_;
      ++running_;
      Job* job = job_;
      lock.unlock();
      job->help();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int wanted_ = 0, running_ = 0;
  bool stop_ = false;
};

// Never destroyed at exit, when its threads may be gone; replaced after fork, where they are.
std::atomic<Pool*> pool{nullptr};

Pool& own_pool() {
  Pool* found = pool.load();
  if (found != nullptr) return *found;
  auto made = std::make_unique<Pool>();
  if (pool.compare_exchange_strong(found, made.get())) {
#ifdef USMLITE_POSIX
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
#endif
    return *made.release();
  }
  return *found;
}

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The entry of an OpenMP runtime that is loaded already: GNU's, or LLVM's and Intel's, which have it as well.
Parallel openmp() {
#ifdef USMLITE_POSIX
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

}  // namespace

void parallel(size_t tasks, int threads, void (*work)(void*, size_t, int), void* context) {
  threads = static_cast<int>(std::min<size_t>(static_cast<size_t>(std::max(threads, 1)), tasks));
  if (threads <= 1) {
    for (size_t task = 0; task < tasks; ++task) work(context, task, 0);
    return;
  }
  Job job{tasks, work, context};
  if (const Parallel run = openmp()) {
    run([](void* data) { static_cast<Job*>(data)->help(); }, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  if (!own_pool().try_run(job, threads - 1)) job.help();
}

int threads_for(double products, int threads) {
  constexpr double kWorth = 400e3;  // products
  return std::max(1, std::min(threads, static_cast<int>(std::min(products / kWorth, 1024.0))));
}

const char* thread_source() { return openmp() ? "openmp" : "own"; }

}  // namespace usmlite
