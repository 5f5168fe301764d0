// Rows of floats with AVX-512, where compilers make too little of isa_rows.inl. The same operations in the same order,
// and so the same bits.

inline __mmask16 mask_of(size_t count) { return count >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1); }

template <bool kScaled>
void quantize_row512(const float* x, const float* column_scale, size_t count, uint8_t* codes, float* scale, int32_t* zero) {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  unsigned bad = 0;
  for (size_t k = 0; k < count; k += 16) {
    const __mmask16 mask = mask_of(count - k);
    __m512 value = _mm512_maskz_loadu_ps(mask, x + k);
    if (kScaled) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, column_scale + k));
    low = _mm512_min_ps(value, low);
    high = _mm512_max_ps(value, high);
    bad |= _mm512_fpclass_ps_mask(value, 0x99);  // infinities, and what is not a number
  }
  const float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
  float inverse;
  if (!steps_of(least, most, bad != 0, scale, zero, &inverse)) {
    for (size_t k = 0; k < count; ++k) codes[k] = 0;
    return;
  }
  const __m512 factor = _mm512_set1_ps(inverse), shift = _mm512_set1_ps(static_cast<float>(*zero) + 0.5f);
  for (size_t k = 0; k < count; k += 16) {
    const __mmask16 mask = mask_of(count - k);
    __m512 value = _mm512_maskz_loadu_ps(mask, x + k);
    if (kScaled) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, column_scale + k));
    const __m512i code = _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(value, factor), shift));
    _mm512_mask_cvtusepi32_storeu_epi8(codes + k, mask, _mm512_max_epi32(code, _mm512_setzero_si512()));
  }
}

void quantize512(const float* x, const float* column_scale, size_t count, uint8_t* codes, float* scale, int32_t* zero) {
  if (column_scale == nullptr) {
    quantize_row512<false>(x, column_scale, count, codes, scale, zero);
  } else {
    quantize_row512<true>(x, column_scale, count, codes, scale, zero);
  }
}

// Half a block of outputs of one row of activations.
inline void finish_half(const int32_t* sums, __mmask16 mask, float scale, int32_t zero, const float* step,
                        const int32_t* level_sums, const float* bias, bool add, float* y) {
  __m512i whole = _mm512_loadu_si512(sums);
  if (zero != 0) {
    const __m512i away = _mm512_mullo_epi32(_mm512_set1_epi32(zero), _mm512_maskz_loadu_epi32(mask, level_sums));
    whole = _mm512_sub_epi32(whole, away);
  }
  const __m512 steps = _mm512_maskz_loadu_ps(mask, step);
  __m512 out = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_mul_ps(steps, _mm512_cvtepi32_ps(whole)));
  if (bias != nullptr) out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(mask, bias));
  if (add) out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(mask, y));
  _mm512_mask_storeu_ps(y, mask, out);
}

void finish512(const int32_t* sums, int columns, int rows, const float* scale, const int32_t* zero, const float* step,
               const int32_t* level_sums, const float* bias, bool add, float* y, size_t y_stride) {
  const __mmask16 first = mask_of(static_cast<size_t>(rows));
  const __mmask16 second = rows > 16 ? mask_of(static_cast<size_t>(rows - 16)) : __mmask16{0};
  for (int c = 0; c < columns; ++c, sums += kRows, y += y_stride) {
    finish_half(sums, first, scale[c], zero[c], step, level_sums, bias, add, y);
    if (second == 0) continue;
    finish_half(sums + 16, second, scale[c], zero[c], step + 16, level_sums + 16, bias == nullptr ? bias : bias + 16, add,
                y + 16);
  }
}

float weigh512(const float* scores, size_t count, uint8_t* codes, int32_t* sum) {
  __m512 tops = _mm512_set1_ps(-kLargest);
  for (size_t k = 0; k < count; k += 16) {
    tops = _mm512_max_ps(_mm512_mask_loadu_ps(tops, mask_of(count - k), scores + k), tops);
  }
  const float top = _mm512_reduce_max_ps(tops);
  const __m512 away = _mm512_set1_ps(top), magic = _mm512_set1_ps(12582912.0f);
  __m512i total = _mm512_setzero_si512();
  for (size_t k = 0; k < count; k += 16) {
    const __mmask16 mask = mask_of(count - k);
    __m512 t = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + k), away);
    // Less than 2^-9 becomes 0; most of a sharp softmax is.
    if (_mm512_mask_cmp_ps_mask(mask, t, _mm512_set1_ps(-9.0f), _CMP_GT_OQ) == 0) {
      _mm512_mask_cvtepi32_storeu_epi8(codes + k, mask, _mm512_setzero_si512());
      continue;
    }
    t = _mm512_max_ps(t, _mm512_set1_ps(-100.0f));
    const __m512 shifted = _mm512_add_ps(t, magic);
    const __m512 f = _mm512_sub_ps(t, _mm512_sub_ps(shifted, magic));
    __m512 p = _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(5.5171669e-2f), f), _mm512_set1_ps(2.4261166e-1f));
    p = _mm512_add_ps(_mm512_mul_ps(p, f), _mm512_set1_ps(6.9326097e-1f));
    p = _mm512_add_ps(_mm512_mul_ps(p, f), _mm512_set1_ps(9.9992831e-1f));
    const __m512i power = _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23));
    const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(power), _mm512_set1_ps(255.0f));
    const __m512i code = _mm512_maskz_cvttps_epi32(mask, _mm512_add_ps(scaled, _mm512_set1_ps(0.5f)));
    total = _mm512_add_epi32(total, code);
    _mm512_mask_cvtepi32_storeu_epi8(codes + k, mask, code);
  }
  *sum = _mm512_reduce_add_epi32(total);
  return top;
}

float reach512(const float* x, size_t count) {
  __m512 most = _mm512_setzero_ps();
  unsigned bad = 0;
  for (size_t k = 0; k < count; k += 16) {
    const __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(mask_of(count - k), x + k));
    most = _mm512_max_ps(size, most);
    bad |= _mm512_fpclass_ps_mask(size, 0x99);
  }
  return bad ? 0.0f * (kLargest + kLargest) : _mm512_reduce_max_ps(most);
}

void round_levels512(const float* x, const float* inverse, size_t count, int8_t* levels) {
  for (size_t k = 0; k < count; k += 16) {
    const __mmask16 mask = mask_of(count - k);
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + k), _mm512_maskz_loadu_ps(mask, inverse + k));
    const __m512 above = _mm512_max_ps(_mm512_add_ps(scaled, _mm512_set1_ps(128.5f)), _mm512_set1_ps(1.0f));
    const __m512i code = _mm512_cvttps_epi32(_mm512_min_ps(above, _mm512_set1_ps(255.0f)));
    _mm512_mask_cvtepi32_storeu_epi8(levels + k, mask, _mm512_sub_epi32(code, _mm512_set1_epi32(128)));
  }
}
