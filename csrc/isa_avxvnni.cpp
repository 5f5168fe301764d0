// AVX-VNNI: 32 products of bytes in one instruction, on processors without AVX-512.
#include <cpuid.h>
#include <immintrin.h>

#include "isa.hpp"

namespace usmlite {
namespace {

#include "isa_common.inl"

#include "isa_rows.inl"

#include "isa_avx256.inl"

bool available() {
  // Bit 4 of EAX of leaf 7, subleaf 1; older compilers do not know its name.
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1) && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

struct Sum {
  static __m256i add(__m256i sum, __m256i codes, __m256i levels) {
    return _mm256_dpbusd_avx_epi32(sum, codes, levels);
  }
};

template <int kWide>
void multiply_of(const int8_t* levels, const uint8_t* x, size_t stride, size_t count, int32_t* sums) {
  for (int half = 0; half < kRows; half += 16) {
    __m256i sum[kWide][2];
    UNROLL for (int c = 0; c < kWide; ++c) sum[c][0] = sum[c][1] = _mm256_setzero_si256();
    for (size_t k = 0; k < count; k += 4) {
      const __m256i first = load(levels + k * kRows + 4 * half), second = load(levels + k * kRows + 4 * half + 32);
      UNROLL for (int c = 0; c < kWide; ++c) {
        int32_t word;
        __builtin_memcpy(&word, x + c * stride + k, 4);
        const __m256i codes = _mm256_set1_epi32(word);
        sum[c][0] = Sum::add(sum[c][0], codes, first);
        sum[c][1] = Sum::add(sum[c][1], codes, second);
      }
    }
    UNROLL for (int c = 0; c < kWide; ++c) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + c * kRows + half), sum[c][0]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + c * kRows + half + 8), sum[c][1]);
    }
  }
}

void multiply256(const void* panel, const uint8_t* x, size_t stride, int columns, size_t count, int32_t* sums) {
  const int8_t* levels = static_cast<const int8_t*>(panel);
  int c = 0;
  for (; c + 6 <= columns; c += 6) multiply_of<6>(levels, x + c * stride, stride, count, sums + c * kRows);
  for (; c < columns; ++c) multiply_of<1>(levels, x + c * stride, stride, count, sums + c * kRows);
}

}  // namespace

extern const Isa kAvxVnni;
const Isa kAvxVnni = {
    "avxvnni", available, 12, 0, 0, 1, quantize<0>, dot256<Sum>, dot_float256, pack_fours, pack_float, multiply256,
    multiply_float256, finish<0>, finish_float, unpack, unpack_2of4,
    weigh<0>, remainder<0>, reach, round_levels, attend_floats, normalize, gelu, next_codes256,
};

}  // namespace usmlite
