// Inner loops on rows of floats, in plain C++ that compilers turn into vectors: included like isa_common.inl, after
// it. Sums are kept in lanes, so that every instruction set adds in the same order and gives the same bits.

inline float sum_of(const float* lanes) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// 2^t for t <= 0, to 2e-7 of itself; below 2^-100, and of what is not a number, 2^-100. 2^t = 2^n 2^f with f in
// [-1/2, 1/2]: adding 1.5 * 2^23 rounds t to n, which then stands in the lowest bits.
inline float power(float t) {
  t = larger(t, -100.0f);
  const float shifted = t + 12582912.0f;
  const float f = t - (shifted - 12582912.0f);
  float p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

// The same to 1e-4, for what becomes a byte.
inline float rough_power(float t) {
  t = larger(t, -100.0f);
  const float shifted = t + 12582912.0f;
  const float f = t - (shifted - 12582912.0f);
  const float p = ((5.5171669e-2f * f + 2.4261166e-1f) * f + 6.9326097e-1f) * f + 9.9992831e-1f;
  return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

inline float largest_of(const float* x, size_t count) {
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = -kLargest;
  size_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = larger(x[k + static_cast<size_t>(lane)], lanes[lane]);
  }
  for (; k < count; ++k) lanes[0] = larger(x[k], lanes[0]);
  float top = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) top = larger(lanes[lane], top);
  return top;
}

template <uint8_t kFlip>
[[maybe_unused]] float weigh(const float* scores, size_t count, uint8_t* codes, int32_t* sum) {
  const float top = largest_of(scores, count);
  int32_t total = 0;
  for (size_t k = 0; k < count; ++k) {
    const int32_t code = static_cast<int32_t>(rough_power(scores[k] - top) * 255.0f + 0.5f);
    total += code;
    codes[k] = static_cast<uint8_t>(code) ^ kFlip;
  }
  *sum = total;
  return top;
}

template <uint8_t kFlip>
void remainder(const float* x, const float* column_scale, size_t count, const uint8_t* codes, float scale, int32_t zero,
               float* rest) {
  for (size_t k = 0; k < count; ++k) {
    const int32_t code = static_cast<int32_t>(static_cast<uint8_t>(codes[k] ^ kFlip));
    const float value = column_scale == nullptr ? x[k] : x[k] * column_scale[k];
    rest[k] = value - scale * static_cast<float>(code - zero);
  }
}

[[maybe_unused]] float reach(const float* x, size_t count) {
  float lanes[kLanes] = {};
  int bads[kLanes] = {};
  size_t begin = 0;
  for (; begin + kLanes <= count; begin += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float size = __builtin_fabsf(x[begin + static_cast<size_t>(lane)]);
      lanes[lane] = larger(size, lanes[lane]);
      bads[lane] |= !(size <= kLargest);
    }
  }
  for (; begin < count; ++begin) {
    const float size = __builtin_fabsf(x[begin]);
    lanes[0] = larger(size, lanes[0]);
    bads[0] |= !(size <= kLargest);
  }
  int bad = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes[0] = larger(lanes[lane], lanes[0]);
    bad |= bads[lane];
  }
  return bad ? 0.0f * (kLargest + kLargest) : lanes[0];
}

[[maybe_unused]] void round_levels(const float* x, const float* inverse, size_t count, int8_t* levels) {
  for (size_t k = 0; k < count; ++k) {
    // Away from zero by adding first; `larger` takes its second argument where the first is not a number.
    const float shifted = smaller(larger(x[k] * inverse[k] + 128.5f, 1.0f), 255.0f);
    levels[k] = static_cast<int8_t>(static_cast<int32_t>(shifted) - 128);
  }
}

void attend_floats(const float* query, float scale, const float* keys, const float* values, size_t stride, size_t count,
                   size_t width, float* scores, float* out) {
  for (size_t i = 0; i < count; ++i) {
    const float* key = keys + i * stride;
    float lanes[kLanes] = {};
    size_t k = 0;
    for (; k + kLanes <= width; k += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += query[k + static_cast<size_t>(lane)] * key[k + static_cast<size_t>(lane)];
      }
    }
    for (; k < width; ++k) lanes[0] += query[k] * key[k];
    scores[i] = sum_of(lanes) * scale;
  }
  const float top = largest_of(scores, count);
  float lanes[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float weight = power(scores[i + static_cast<size_t>(lane)] - top);
      scores[i + static_cast<size_t>(lane)] = weight;
      lanes[lane] += weight;
    }
  }
  for (; i < count; ++i) lanes[0] += scores[i] = power(scores[i] - top);
  const float inverse = 1.0f / sum_of(lanes);
  for (size_t k = 0; k < width; ++k) out[k] = 0.0f;
  for (i = 0; i < count; ++i) {
    const float weight = scores[i] * inverse;
    const float* value = values + i * stride;
    for (size_t k = 0; k < width; ++k) out[k] += weight * value[k];
  }
}

void normalize(const float* x, const float* weight, const float* bias, size_t count, float epsilon, float* y) {
  float sums[kLanes] = {}, squares[kLanes] = {};
  const size_t whole = count - count % kLanes;
  for (size_t k = 0; k < whole; k += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += x[k + static_cast<size_t>(lane)];
  }
  for (size_t k = whole; k < count; ++k) sums[0] += x[k];
  const float mean = sum_of(sums) / static_cast<float>(count);
  for (size_t k = 0; k < whole; k += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float rest = x[k + static_cast<size_t>(lane)] - mean;
      squares[lane] += rest * rest;
    }
  }
  for (size_t k = whole; k < count; ++k) squares[0] += (x[k] - mean) * (x[k] - mean);
  const float variance = sum_of(squares) / static_cast<float>(count);
  const float factor = 1.0f / __builtin_sqrtf(variance + epsilon);
  for (size_t k = 0; k < count; ++k) y[k] = (x[k] - mean) * factor * weight[k] + bias[k];
}

// x times the share of a normal distribution below x. The error function is a quotient of polynomials, as in Eigen
// (`generic_fast_erf_float`), to 1e-6; beyond 4 it is 1.
void gelu(const float* x, size_t count, float* y) {
  for (size_t k = 0; k < count; ++k) {
    const float value = x[k];
    const float t = smaller(larger(value * 0.70710678f, -4.0f), 4.0f);
    const float square = t * t;
    float top = -2.72614225801306e-10f;
    top = top * square + 2.77068142495902e-08f;
    top = top * square - 2.10102402082508e-06f;
    top = top * square - 5.69250639462346e-05f;
    top = top * square - 7.34990630326855e-04f;
    top = top * square - 2.95459980854025e-03f;
    top = top * square - 1.60960333262415e-02f;
    float bottom = -1.45660718464996e-05f;
    bottom = bottom * square - 2.13374055278905e-04f;
    bottom = bottom * square - 1.68282697438203e-03f;
    bottom = bottom * square - 7.37332916720468e-03f;
    bottom = bottom * square - 1.42647390514189e-02f;
    y[k] = 0.5f * value * (1.0f + t * top / bottom);
  }
}
