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

// For every set of eight lanes: which of the words that follow each of them takes.
struct Turns {
  uint64_t of[256] = {};
  constexpr Turns() {
    for (int set = 0; set < 256; ++set) {
      int turn = 0;
      for (int lane = 0; lane < 8; ++lane) {
        of[set] |= static_cast<uint64_t>(turn) << 8 * lane;
        turn += set >> lane & 1;
      }
    }
  }
};
constexpr Turns kTurns;

inline size_t next_codes256(const uint32_t* tables, const uint32_t* starts, uint32_t* states, size_t lanes,
                            const uint8_t* words, uint8_t* codes) {
  const __m256i low = _mm256_set1_epi32(4095);
  // The lowest byte of each number, to the front of its half.
  const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const uint8_t* next = words;
  size_t lane = 0;
  for (; lane + 8 <= lanes; lane += 8) {
    __m256i x = load(states + lane);
    const __m256i slot = _mm256_add_epi32(load(starts + lane), _mm256_and_si256(x, low));
    const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(tables), slot, 4);
    const __m256i symbols = _mm256_shuffle_epi8(entry, bytes);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + lane),
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(symbols), _mm256_extracti128_si256(symbols, 1)));
    const __m256i frequency = _mm256_add_epi32(_mm256_srli_epi32(entry, 20), _mm256_set1_epi32(1));
    x = _mm256_add_epi32(_mm256_mullo_epi32(frequency, _mm256_srli_epi32(x, 12)),
                         _mm256_and_si256(_mm256_srli_epi32(entry, 8), low));
    const __m256i empty = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
    const int set = _mm256_movemask_ps(_mm256_castsi256_ps(empty));
    const __m256i turns = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kTurns.of[set])));
    const __m256i following = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(next)));
    const __m256i filled =
        _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_permutevar8x32_epi32(following, turns));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(states + lane), _mm256_blendv_epi8(x, filled, empty));
    next += 2 * __builtin_popcount(static_cast<unsigned>(set));
  }
  const size_t taken = static_cast<size_t>(next - words) / 2;
  return taken + next_codes(tables, starts + lane, states + lane, lanes - lane, next, codes + lane);
}
