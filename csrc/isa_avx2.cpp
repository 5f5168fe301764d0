// AVX2. Products of bytes are computed in 16 bits: the instruction for bytes clips the sums of two.
#include <immintrin.h>

#include "isa.hpp"

namespace usmlite {
namespace {

#include "isa_common.inl"

#include "isa_rows.inl"

#include "isa_avx256.inl"

bool available() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

struct Sum {
  static __m256i add(__m256i sum, __m256i codes, __m256i levels) {
    const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(codes)),
                                          _mm256_cvtepi8_epi16(_mm256_castsi256_si128(levels)));
    const __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(codes, 1)),
                                           _mm256_cvtepi8_epi16(_mm256_extracti128_si256(levels, 1)));
    return _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
  }
};

// 16-bit levels: two neighbours of row 0, of row 1, ...; then the next two. A zero after an odd last column.
void pack_pairs(const int8_t* const* rows, size_t count, void* panel) {
  int16_t* out = static_cast<int16_t*>(panel);
  for (size_t k = 0; k < count; k += 2) {
    for (int r = 0; r < kRows; ++r, out += 2) {
      out[0] = rows[r][k];
      out[1] = k + 1 < count ? rows[r][k + 1] : int16_t{0};
    }
  }
}

template <int kWide>
void multiply_of(const int16_t* levels, const uint8_t* x, size_t stride, size_t count, int32_t* sums) {
  for (int half = 0; half < kRows; half += 16) {
    __m256i sum[kWide][2];
    UNROLL for (int c = 0; c < kWide; ++c) sum[c][0] = sum[c][1] = _mm256_setzero_si256();
    for (size_t k = 0; k < count; k += 2) {
      const __m256i first = load(levels + k * kRows + 2 * half);
      const __m256i second = load(levels + k * kRows + 2 * half + 16);
      UNROLL for (int c = 0; c < kWide; ++c) {
        int16_t pair;
        __builtin_memcpy(&pair, x + c * stride + k, 2);
        const __m256i codes = _mm256_cvtepu8_epi16(_mm_set1_epi16(pair));
        sum[c][0] = _mm256_add_epi32(sum[c][0], _mm256_madd_epi16(codes, first));
        sum[c][1] = _mm256_add_epi32(sum[c][1], _mm256_madd_epi16(codes, second));
      }
    }
    UNROLL for (int c = 0; c < kWide; ++c) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + c * kRows + half), sum[c][0]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + c * kRows + half + 8), sum[c][1]);
    }
  }
}

void multiply256(const void* panel, const uint8_t* x, size_t stride, int columns, size_t count, int32_t* sums) {
  const int16_t* levels = static_cast<const int16_t*>(panel);
  int c = 0;
  for (; c + 4 <= columns; c += 4) multiply_of<4>(levels, x + c * stride, stride, count, sums + c * kRows);
  for (; c < columns; ++c) multiply_of<1>(levels, x + c * stride, stride, count, sums + c * kRows);
}

}  // namespace

extern const Isa kAvx2;
const Isa kAvx2 = {
    "avx2", available, 12, 0, 0, 2, quantize<0>, dot256<Sum>, dot_float256, pack_pairs, pack_float, multiply256,
    multiply_float256, finish<0>, finish_float, unpack, unpack_2of4,
    weigh<0>, remainder<0>, reach, round_levels, attend_floats, normalize, gelu, next_codes256,
};

}  // namespace usmlite
