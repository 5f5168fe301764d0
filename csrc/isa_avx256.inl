// What the sets with registers of 256 bits share. `Sum` says how bytes are multiplied:
//   Sum::add(sum, codes, levels): each of eight lanes gets four products of a code (0 to 255) and a level.

inline int32_t lanes_of(__m256i a) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return _mm_cvtsi128_si32(half);
}

inline float lanes_of(__m256 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  half = _mm_add_ss(half, _mm_shuffle_ps(half, half, 1));
  return _mm_cvtss_f32(half);
}

inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

template <class Sum, int kWide>
void dot_of(const int8_t* const* rows, const uint8_t* x, size_t stride, size_t count, int32_t* sums) {
  __m256i sum[kWide][4];
  UNROLL for (int c = 0; c < kWide; ++c) {
    UNROLL for (int r = 0; r < 4; ++r) sum[c][r] = _mm256_setzero_si256();
  }
  size_t k = 0;
  for (; k + 32 <= count; k += 32) {
    UNROLL for (int r = 0; r < 4; ++r) {
      const __m256i levels = load(rows[r] + k);
      UNROLL for (int c = 0; c < kWide; ++c) sum[c][r] = Sum::add(sum[c][r], load(x + c * stride + k), levels);
    }
  }
  UNROLL for (int c = 0; c < kWide; ++c) {
    UNROLL for (int r = 0; r < 4; ++r) {
      int32_t total = lanes_of(sum[c][r]);
      for (size_t i = k; i < count; ++i) total += rows[r][i] * x[c * stride + i];
      sums[c * kRows + r] = total;
    }
  }
}

template <class Sum>
void dot256(const int8_t* const* rows, const uint8_t* x, size_t stride, int columns, size_t count, int32_t* sums) {
  int c = 0;
  for (; c + 2 <= columns; c += 2) dot_of<Sum, 2>(rows, x + c * stride, stride, count, sums + c * kRows);
  if (c < columns) dot_of<Sum, 1>(rows, x + c * stride, stride, count, sums + c * kRows);
}

template <int kWide>
void dot_float_of(const int8_t* const* rows, const float* x, size_t stride, size_t count, float* sums) {
  __m256 sum[kWide][4];
  UNROLL for (int c = 0; c < kWide; ++c) {
    UNROLL for (int r = 0; r < 4; ++r) sum[c][r] = _mm256_setzero_ps();
  }
  size_t k = 0;
  for (; k + 8 <= count; k += 8) {
    UNROLL for (int r = 0; r < 4; ++r) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[r] + k));
      const __m256 levels = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
      UNROLL for (int c = 0; c < kWide; ++c) {
        sum[c][r] = _mm256_fmadd_ps(_mm256_loadu_ps(x + c * stride + k), levels, sum[c][r]);
      }
    }
  }
  UNROLL for (int c = 0; c < kWide; ++c) {
    UNROLL for (int r = 0; r < 4; ++r) {
      float total = lanes_of(sum[c][r]);
      for (size_t i = k; i < count; ++i) total += static_cast<float>(rows[r][i]) * x[c * stride + i];
      sums[c * kRows + r] = total;
    }
  }
}

void dot_float256(const int8_t* const* rows, const float* x, size_t stride, int columns, size_t count, float* sums) {
  int c = 0;
  for (; c + 2 <= columns; c += 2) dot_float_of<2>(rows, x + c * stride, stride, count, sums + c * kRows);
  if (c < columns) dot_float_of<1>(rows, x + c * stride, stride, count, sums + c * kRows);
}

template <int kWide>
void multiply_float_of(const float* levels, const float* x, size_t stride, size_t count, float* sums) {
  for (int half = 0; half < kRows; half += 16) {
    __m256 sum[kWide][2];
    UNROLL for (int c = 0; c < kWide; ++c) sum[c][0] = sum[c][1] = _mm256_setzero_ps();
    for (size_t k = 0; k < count; ++k) {
      const __m256 first = _mm256_loadu_ps(levels + k * kRows + half);
      const __m256 second = _mm256_loadu_ps(levels + k * kRows + half + 8);
      UNROLL for (int c = 0; c < kWide; ++c) {
        const __m256 value = _mm256_set1_ps(x[c * stride + k]);
        sum[c][0] = _mm256_fmadd_ps(value, first, sum[c][0]);
        sum[c][1] = _mm256_fmadd_ps(value, second, sum[c][1]);
      }
    }
    UNROLL for (int c = 0; c < kWide; ++c) {
      _mm256_storeu_ps(sums + c * kRows + half, sum[c][0]);
      _mm256_storeu_ps(sums + c * kRows + half + 8, sum[c][1]);
    }
  }
}

void multiply_float256(const void* panel, const float* x, size_t stride, int columns, size_t count, float* sums) {
  const float* levels = static_cast<const float*>(panel);
  int c = 0;
  for (; c + 6 <= columns; c += 6) multiply_float_of<6>(levels, x + c * stride, stride, count, sums + c * kRows);
  for (; c < columns; ++c) multiply_float_of<1>(levels, x + c * stride, stride, count, sums + c * kRows);
}
