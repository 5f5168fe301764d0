// AVX-512 with VNNI: 64 products of bytes in one instruction.
#include <immintrin.h>

#include "isa.hpp"

namespace usmlite {
namespace {

#include "isa_common.inl"

#include "isa_rows.inl"

#include "isa_rows_avx512.inl"

bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

// Sums of the lanes of four registers.
inline __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int kWide>
void dot_of(const int8_t* const* rows, const uint8_t* x, size_t stride, size_t count, int32_t* sums) {
  __m512i sum[kWide][4];
  UNROLL for (int c = 0; c < kWide; ++c) {
    UNROLL for (int r = 0; r < 4; ++r) sum[c][r] = _mm512_setzero_si512();
  }
  size_t k = 0;
  for (; k + 64 <= count; k += 64) {
    __m512i levels[4];
    UNROLL for (int r = 0; r < 4; ++r) levels[r] = _mm512_loadu_si512(rows[r] + k);
    UNROLL for (int c = 0; c < kWide; ++c) {
      const __m512i codes = _mm512_loadu_si512(x + c * stride + k);
      UNROLL for (int r = 0; r < 4; ++r) sum[c][r] = _mm512_dpbusd_epi32(sum[c][r], codes, levels[r]);
    }
  }
  if (k < count) {
    const __mmask64 rest = (~0ull) >> (64 - (count - k));
    __m512i levels[4];
    UNROLL for (int r = 0; r < 4; ++r) levels[r] = _mm512_maskz_loadu_epi8(rest, rows[r] + k);
    UNROLL for (int c = 0; c < kWide; ++c) {
      const __m512i codes = _mm512_maskz_loadu_epi8(rest, x + c * stride + k);
      UNROLL for (int r = 0; r < 4; ++r) sum[c][r] = _mm512_dpbusd_epi32(sum[c][r], codes, levels[r]);
    }
  }
  UNROLL for (int c = 0; c < kWide; ++c) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + c * kRows), sums_of(sum[c][0], sum[c][1], sum[c][2], sum[c][3]));
  }
}

void dot512(const int8_t* const* rows, const uint8_t* x, size_t stride, int columns, size_t count, int32_t* sums) {
  switch (columns) {
    case 1: return dot_of<1>(rows, x, stride, count, sums);
    case 2: return dot_of<2>(rows, x, stride, count, sums);
    case 3: return dot_of<3>(rows, x, stride, count, sums);
    default: return dot_of<4>(rows, x, stride, count, sums);
  }
}

template <int kWide>
void dot_float_of(const int8_t* const* rows, const float* x, size_t stride, size_t count, float* sums) {
  __m512 sum[kWide][4];
  UNROLL for (int c = 0; c < kWide; ++c) {
    UNROLL for (int r = 0; r < 4; ++r) sum[c][r] = _mm512_setzero_ps();
  }
  for (size_t k = 0; k < count; k += 16) {
    const __mmask16 mask = count - k >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (count - k)) - 1);
    __m512 levels[4];
    UNROLL for (int r = 0; r < 4; ++r) {
      levels[r] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, rows[r] + k)));
    }
    UNROLL for (int c = 0; c < kWide; ++c) {
      const __m512 values = _mm512_maskz_loadu_ps(mask, x + c * stride + k);
      UNROLL for (int r = 0; r < 4; ++r) sum[c][r] = _mm512_fmadd_ps(values, levels[r], sum[c][r]);
    }
  }
  UNROLL for (int c = 0; c < kWide; ++c) {
    _mm_storeu_ps(sums + c * kRows, sums_of(sum[c][0], sum[c][1], sum[c][2], sum[c][3]));
  }
}

void dot_float512(const int8_t* const* rows, const float* x, size_t stride, int columns, size_t count, float* sums) {
  switch (columns) {
    case 1: return dot_float_of<1>(rows, x, stride, count, sums);
    case 2: return dot_float_of<2>(rows, x, stride, count, sums);
    case 3: return dot_float_of<3>(rows, x, stride, count, sums);
    default: return dot_float_of<4>(rows, x, stride, count, sums);
  }
}

// Four levels of a row are one lane: 16 rows of 64 levels are turned over like a matrix of 16 by 16 lanes.
inline void turn(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

void pack512(const int8_t* const* rows, size_t count, void* panel) {
  const size_t fours = (count + 3) / 4;
  for (int half = 0; half < 2; ++half) {
    __m512i* out = static_cast<__m512i*>(panel) + half;
    for (size_t k = 0; k < count; k += 64) {
      const __mmask64 mask = count - k >= 64 ? ~0ull : (~0ull) >> (64 - (count - k));
      __m512i block[16];
      for (int r = 0; r < 16; ++r) block[r] = _mm512_maskz_loadu_epi8(mask, rows[16 * half + r] + k);
      turn(block);
      for (size_t i = 0; i < 16 && k / 4 + i < fours; ++i) _mm512_storeu_si512(out + 2 * (k / 4 + i), block[i]);
    }
  }
}

inline __m512i four(const uint8_t* codes) {
  int32_t word;
  __builtin_memcpy(&word, codes, 4);
  return _mm512_set1_epi32(word);
}

template <int kWide>
void multiply_of(const void* panel, const uint8_t* x, size_t stride, size_t count, int32_t* sums) {
  const __m512i* levels = static_cast<const __m512i*>(panel);
  __m512i sum[kWide][2];
  UNROLL for (int c = 0; c < kWide; ++c) sum[c][0] = sum[c][1] = _mm512_setzero_si512();
  for (size_t k = 0; k < count; k += 4, levels += 2) {
    const __m512i first = _mm512_loadu_si512(levels), second = _mm512_loadu_si512(levels + 1);
    UNROLL for (int c = 0; c < kWide; ++c) {
      const __m512i codes = four(x + c * stride + k);
      sum[c][0] = _mm512_dpbusd_epi32(sum[c][0], codes, first);
      sum[c][1] = _mm512_dpbusd_epi32(sum[c][1], codes, second);
    }
  }
  UNROLL for (int c = 0; c < kWide; ++c) {
    _mm512_storeu_si512(sums + c * kRows, sum[c][0]);
    _mm512_storeu_si512(sums + c * kRows + 16, sum[c][1]);
  }
}

void multiply512(const void* panel, const uint8_t* x, size_t stride, int columns, size_t count, int32_t* sums) {
  int c = 0;
  for (; c + 12 <= columns; c += 12) multiply_of<12>(panel, x + c * stride, stride, count, sums + c * kRows);
  for (; c + 4 <= columns; c += 4) multiply_of<4>(panel, x + c * stride, stride, count, sums + c * kRows);
  for (; c < columns; ++c) multiply_of<1>(panel, x + c * stride, stride, count, sums + c * kRows);
}

template <int kWide>
void multiply_float_of(const void* panel, const float* x, size_t stride, size_t count, float* sums) {
  const float* levels = static_cast<const float*>(panel);
  __m512 sum[kWide][2];
  UNROLL for (int c = 0; c < kWide; ++c) sum[c][0] = sum[c][1] = _mm512_setzero_ps();
  for (size_t k = 0; k < count; ++k, levels += kRows) {
    const __m512 first = _mm512_loadu_ps(levels), second = _mm512_loadu_ps(levels + 16);
    UNROLL for (int c = 0; c < kWide; ++c) {
      const __m512 value = _mm512_set1_ps(x[c * stride + k]);
      sum[c][0] = _mm512_fmadd_ps(value, first, sum[c][0]);
      sum[c][1] = _mm512_fmadd_ps(value, second, sum[c][1]);
    }
  }
  UNROLL for (int c = 0; c < kWide; ++c) {
    _mm512_storeu_ps(sums + c * kRows, sum[c][0]);
    _mm512_storeu_ps(sums + c * kRows + 16, sum[c][1]);
  }
}

void multiply_float512(const void* panel, const float* x, size_t stride, int columns, size_t count, float* sums) {
  int c = 0;
  for (; c + 12 <= columns; c += 12) multiply_float_of<12>(panel, x + c * stride, stride, count, sums + c * kRows);
  for (; c + 4 <= columns; c += 4) multiply_float_of<4>(panel, x + c * stride, stride, count, sums + c * kRows);
  for (; c < columns; ++c) multiply_float_of<1>(panel, x + c * stride, stride, count, sums + c * kRows);
}

// 32 bytes of two codes each to 64 levels.
inline __m512i levels_of(__m256i bytes, __m512i offset) {
  const __m512i words = _mm512_cvtepu8_epi16(bytes);
  const __m512i codes = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)), _mm512_set1_epi8(15));
  return _mm512_sub_epi8(codes, offset);
}

void unpack512(const uint8_t* row, int bits, size_t first, size_t count, int offset, int factor, int8_t* levels) {
  if (bits == 4 && first % 2 == 0) {
    const __m512i zero = _mm512_set1_epi8(static_cast<char>(offset));
    for (; count >= 64; first += 64, count -= 64, levels += 64) {
      const void* bytes = row + first / 2;
      __m512i found = levels_of(_mm256_loadu_si256(static_cast<const __m256i*>(bytes)), zero);
      if (factor == 2) found = _mm512_add_epi8(found, found);
      _mm512_storeu_si512(levels, found);
    }
  }
  unpack(row, bits, first, count, offset, factor, levels);
}

// For every byte of 2:4 patterns, which of its 12 places are kept.
struct Masks {
  uint16_t of[256] = {};
  constexpr Masks() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int group = 0, ranks = byte; group < 3; ++group, ranks /= 6) {
        for (int i = 0; i < 2; ++i) {
          of[byte] = static_cast<uint16_t>(of[byte] | 1 << (4 * group + kPlaces2of4[ranks % 6][i]));
        }
      }
    }
  }
};
constexpr Masks kMasks;

// The instruction that puts bytes in their places is a later one than the rest of this file needs.
__attribute__((target("avx512vbmi2"))) size_t unpack_2of4_vbmi2(const uint8_t* codes, const uint8_t* patterns,
                                                                size_t groups, int offset, int8_t* levels) {
  const __m256i zero = _mm256_set1_epi8(static_cast<char>(offset));
  size_t done = 0;
  for (; done + 48 <= groups; done += 48, codes += 48, patterns += 16, levels += 192) {
    uint64_t m[16];
    UNROLL for (int i = 0; i < 16; ++i) m[i] = kMasks.of[patterns[i]];
    const uint64_t masks[3] = {
        m[0] | m[1] << 12 | m[2] << 24 | m[3] << 36 | m[4] << 48 | m[5] << 60,
        m[5] >> 4 | m[6] << 8 | m[7] << 20 | m[8] << 32 | m[9] << 44 | m[10] << 56,
        m[10] >> 8 | m[11] << 4 | m[12] << 16 | m[13] << 28 | m[14] << 40 | m[15] << 52,
    };
    UNROLL for (int i = 0; i < 3; ++i) {
      const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
      const __m256i kept = _mm256_sub_epi8(
          _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15)), zero);
      _mm512_storeu_si512(levels + 64 * i, _mm512_maskz_expand_epi8(masks[i], _mm512_castsi256_si512(kept)));
    }
  }
  return done;
}

void unpack_2of4_512(const uint8_t* codes, const uint8_t* patterns, size_t groups, int offset, int factor,
                     int8_t* levels) {
  static const bool expands = __builtin_cpu_supports("avx512vbmi2");
  size_t done = 0;
  if (expands && factor == 1) done = unpack_2of4_vbmi2(codes, patterns, groups, offset, levels);
  unpack_2of4(codes + done, patterns + done / 3, groups - done, offset, factor, levels + 4 * done);
}

size_t next_codes512(const uint32_t* tables, const uint32_t* starts, uint32_t* states, size_t lanes,
                     const uint8_t* words, uint8_t* codes) {
  const __m512i low = _mm512_set1_epi32(4095), lowest = _mm512_set1_epi32(1 << 16);
  const uint8_t* next = words;
  size_t lane = 0;
  for (; lane + 16 <= lanes; lane += 16) {
    __m512i x = _mm512_loadu_si512(states + lane);
    const __m512i slot = _mm512_add_epi32(_mm512_loadu_si512(starts + lane), _mm512_and_si512(x, low));
    const __m512i entry = _mm512_i32gather_epi32(slot, tables, 4);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + lane), _mm512_cvtepi32_epi8(entry));
    const __m512i frequency = _mm512_add_epi32(_mm512_srli_epi32(entry, 20), _mm512_set1_epi32(1));
    x = _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srli_epi32(x, 12)),
                         _mm512_and_si512(_mm512_srli_epi32(entry, 8), low));
    const __mmask16 empty = _mm512_cmplt_epu32_mask(x, lowest);
    const __m512i following = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)));
    x = _mm512_mask_or_epi32(x, empty, _mm512_slli_epi32(x, 16), _mm512_maskz_expand_epi32(empty, following));
    _mm512_storeu_si512(states + lane, x);
    next += 2 * __builtin_popcount(empty);
  }
  const size_t taken = static_cast<size_t>(next - words) / 2;
  return taken + next_codes(tables, starts + lane, states + lane, lanes - lane, next, codes + lane);
}

}  // namespace

extern const Isa kAvx512;
const Isa kAvx512 = {
    "avx512vnni", available, 12, 0, 0, 1, quantize512, dot512, dot_float512, pack512, pack_float, multiply512,
    multiply_float512, finish512, finish_float, unpack512, unpack_2of4_512,
    weigh512, remainder<0>, reach512, round_levels512, attend_floats, normalize, gelu, next_codes512,
};

}  // namespace usmlite
