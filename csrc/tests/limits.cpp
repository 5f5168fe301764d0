// What this machine can do at most: products of bytes and of floats from registers alone, and reading memory.
// docs/performance.md holds the kernels against these.
//
// usage: usmlite_limits [THREADS]
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "threads.hpp"

namespace {

double seconds_of(int threads, void (*work)(void*, size_t, int), void* context) {
  double best = 1e9;
  for (int round = 0; round < 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    usmlite::parallel(static_cast<size_t>(threads), threads, work, context);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

#if defined(__x86_64__)

constexpr long kLoops = 4'000'000;

// 24 independent sums hide how long one instruction takes.
#define ONE(op, register) op " %%" register "30, %%" register "31, %%" register
#define ALL(op, r)                                                                                                 \
  ONE(op, r) "0\n" ONE(op, r) "1\n" ONE(op, r) "2\n" ONE(op, r) "3\n" ONE(op, r) "4\n" ONE(op, r) "5\n"            \
  ONE(op, r) "6\n" ONE(op, r) "7\n" ONE(op, r) "8\n" ONE(op, r) "9\n" ONE(op, r) "10\n" ONE(op, r) "11\n"          \
  ONE(op, r) "12\n" ONE(op, r) "13\n" ONE(op, r) "14\n" ONE(op, r) "15\n" ONE(op, r) "16\n" ONE(op, r) "17\n"      \
  ONE(op, r) "18\n" ONE(op, r) "19\n" ONE(op, r) "20\n" ONE(op, r) "21\n" ONE(op, r) "22\n" ONE(op, r) "23\n"
#define USED                                                                                                       \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",       \
      "xmm13", "xmm14", "xmm15"

__attribute__((target("avx512f,avx512vnni"))) void bytes(void*, size_t, int) {
  for (long i = 0; i < kLoops; ++i) asm volatile(ALL("vpdpbusd", "zmm")::: USED);
}

__attribute__((target("avx512f"))) void floats(void*, size_t, int) {
  asm volatile("vpxorq %%zmm30, %%zmm30, %%zmm30\nvpxorq %%zmm31, %%zmm31, %%zmm31\n" ::: "xmm0");
  for (long i = 0; i < kLoops; ++i) asm volatile(ALL("vfmadd231ps", "zmm")::: USED);
}

void arithmetic(int threads) {
  if (!__builtin_cpu_supports("avx512vnni")) {
    std::printf("arithmetic: only measured with AVX-512 VNNI\n");
    return;
  }
  const double work = static_cast<double>(kLoops) * 24 * 2 * threads / 1e9;
  std::printf("int8: %.0f G operations a second\n", work * 64 / seconds_of(threads, bytes, nullptr));
  std::printf("float32: %.0f G operations a second\n", work * 16 / seconds_of(threads, floats, nullptr));
}

#else

void arithmetic(int) { std::printf("arithmetic: only measured with AVX-512 VNNI\n"); }

#endif

struct Reading {
  std::vector<uint64_t> memory = std::vector<uint64_t>(size_t{1} << 25, 1);  // 256 MiB, more than any cache
  std::vector<uint64_t> sums;
  size_t threads;
};

void read_part(void* context, size_t task, int) {
  Reading& reading = *static_cast<Reading*>(context);
  const size_t part = reading.memory.size() / reading.threads;
  const uint64_t* from = reading.memory.data() + task * part;
  uint64_t sums[32] = {};
  for (size_t i = 0; i + 32 <= part; i += 32) {
    for (size_t k = 0; k < 32; ++k) sums[k] += from[i + k];
  }
  for (uint64_t sum : sums) reading.sums[task] += sum;
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::max(1, std::atoi(arguments[1])) : 1;
  std::printf("%d threads\n", threads);
  arithmetic(threads);
  Reading reading;
  reading.threads = static_cast<size_t>(threads);
  reading.sums.assign(reading.threads, 0);
  const double seconds = seconds_of(threads, read_part, &reading);
  std::printf("memory: %.1f GB a second read\n", static_cast<double>(reading.memory.size() * 8) / seconds / 1e9);
  return reading.sums[0] == 0;
}
