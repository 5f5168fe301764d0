// Work for several threads: those that the process already has for the purpose, else a pool of our own.
#pragma once

#include <cstddef>

namespace usmlite {

// Calls work(context, task, worker) once for every task in 0 .. tasks - 1, on up to `threads` threads, the
// calling one among them; worker is in 0 .. threads - 1 and no two calls at a time have the same. Returns when all are done. `work` must not throw.
//
// Where an OpenMP runtime is loaded (torch brings one) its threads do the work: a second pool on the same
// cores would wait for the first one's threads, which keep spinning for a while after each parallel part.
void parallel(size_t tasks, int threads, void (*work)(void* context, size_t task, int worker), void* context);

// How many of `threads` threads so many products keep busy: waking one takes as long as some of them.
int threads_for(double products, int threads);

// "openmp" or "own".
const char* thread_source();

// The same for anything that can be called.
template <class Work>
void parallel(size_t tasks, int threads, Work& work) {
  parallel(
      tasks, threads,
      [](void* context, size_t task, int worker) { (*static_cast<Work*>(context))(task, worker); }, &work);
}

}  // namespace usmlite
