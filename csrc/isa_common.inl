// The inner loops in plain C++, included by every instruction set's file into its own unnamed namespace and
// compiled there for that set. Nothing here may come from a header with inline functions: the linker keeps
// one copy of these for the whole library, and it might be one that only some processors can run.

constexpr float kLargest = 3.402823466e+38f;
constexpr int kLanes = 16;  // sums and extremes of long rows are kept for so many interleaved parts

// What a table of rANS says of a slot: the symbol in bits 0 to 7, the slot's place in the symbol's range in bits 8 to 19,
// the symbol's frequency less one in bits 20 to 31. Frequencies add up to 2^12, states lie in 2^16 .. 2^32 - 1.
inline size_t next_codes(const uint32_t* tables, const uint32_t* starts, uint32_t* states, size_t lanes,
                         const uint8_t* words, uint8_t* codes) {
  const uint8_t* next = words;
  for (size_t lane = 0; lane < lanes; ++lane) {
    uint32_t x = states[lane];
    const uint32_t entry = tables[starts[lane] + (x & 4095)];
    codes[lane] = static_cast<uint8_t>(entry);
    x = ((entry >> 20) + 1) * (x >> 12) + (entry >> 8 & 4095);
    // Without a branch: whether a lane needs a word is as good as random.
    const bool empty = x < 1u << 16;
    const uint32_t filled = x << 16 | next[0] | static_cast<uint32_t>(next[1]) << 8;
    states[lane] = empty ? filled : x;
    next += empty ? 2 : 0;
  }
  return static_cast<size_t>(next - words) / 2;
}

inline float larger(float a, float b) { return a > b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }

// Steps between the least number of a row (at most 0) and the most (at least 0); false where there are none: all are
// zeros, or so small that they might as well be, or one is not finite and everything becomes NaN.
inline bool steps_of(float low, float high, bool bad, float* scale, int32_t* zero, float* inverse) {
  // Halves first: the difference of two large numbers may be too large.
  const float step = (high * 0.5f - low * 0.5f) * (2.0f / 255.0f);
  if (bad || !(1.0f / step <= kLargest)) {
    const float infinite = kLargest + kLargest * (bad ? 1.0f : 0.0f);
    *scale = 0.0f * infinite;  // NaN, or 0
    *zero = 0;
    return false;
  }
  *inverse = 1.0f / step;
  *scale = step;
  *zero = static_cast<int32_t>(-low * *inverse + 0.5f);
  return true;
}

template <bool kScaled>
inline float value_at(const float* x, const float* column_scale, size_t k) {
  return kScaled ? x[k] * column_scale[k] : x[k];
}

template <uint8_t kFlip, bool kScaled>
inline void quantize_row(const float* x, const float* column_scale, size_t count, uint8_t* codes, float* scale,
                         int32_t* zero) {
  // In lanes, because an order of its own is all that keeps the compiler from vectors.
  float lows[kLanes] = {}, highs[kLanes] = {};
  int bads[kLanes] = {};
  auto look = [&](size_t k, int lane) {
    const float value = value_at<kScaled>(x, column_scale, k);
    lows[lane] = smaller(value, lows[lane]);
    highs[lane] = larger(value, highs[lane]);
    bads[lane] |= !(value <= kLargest && value >= -kLargest);
  };
  size_t begin = 0;
  for (; begin + kLanes <= count; begin += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) look(begin + static_cast<size_t>(lane), lane);
  }
  for (; begin < count; ++begin) look(begin, 0);
  float low = 0.0f, high = 0.0f, inverse;
  int bad = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    low = smaller(lows[lane], low);
    high = larger(highs[lane], high);
    bad |= bads[lane];
  }
  if (!steps_of(low, high, bad != 0, scale, zero, &inverse)) {
    for (size_t k = 0; k < count; ++k) codes[k] = kFlip;
    return;
  }
  const float shift = static_cast<float>(*zero) + 0.5f;
  for (size_t k = 0; k < count; ++k) {
    int32_t code = static_cast<int32_t>(value_at<kScaled>(x, column_scale, k) * inverse + shift);
    code = code < 0 ? 0 : code > 255 ? 255 : code;
    codes[k] = static_cast<uint8_t>(code) ^ kFlip;
  }
}

template <uint8_t kFlip>
[[maybe_unused]] void quantize(const float* x, const float* column_scale, size_t count, uint8_t* codes, float* scale,
                               int32_t* zero) {
  if (column_scale == nullptr) {
    quantize_row<kFlip, false>(x, column_scale, count, codes, scale, zero);
  } else {
    quantize_row<kFlip, true>(x, column_scale, count, codes, scale, zero);
  }
}

[[maybe_unused]] void dot_float(const int8_t* const* rows, const float* x, size_t stride, int columns, size_t count, float* sums) {
  for (int c = 0; c < columns; ++c) {
    for (int r = 0; r < 4; ++r) {
      float partial[16] = {};
      size_t k = 0;
      for (; k + 16 <= count; k += 16) {
        for (int lane = 0; lane < 16; ++lane) {
          partial[lane] += static_cast<float>(rows[r][k + lane]) * x[c * stride + k + lane];
        }
      }
      for (; k < count; ++k) partial[0] += static_cast<float>(rows[r][k]) * x[c * stride + k];
      float sum = 0.0f;
      for (int lane = 0; lane < 16; ++lane) sum += partial[lane];
      sums[c * kRows + r] = sum;
    }
  }
}

[[maybe_unused]] void dot(const int8_t* const* rows, const uint8_t* x, size_t stride, int columns, size_t count, int32_t* sums) {
  for (int c = 0; c < columns; ++c) {
    for (int r = 0; r < 4; ++r) {
      int32_t sum = 0;
      for (size_t k = 0; k < count; ++k) sum += rows[r][k] * x[c * stride + k];
      sums[c * kRows + r] = sum;
    }
  }
}

// Order: four neighbours of row 0, of row 1, ...; then the next four. Zeros after the last column.
[[maybe_unused]] void pack_fours(const int8_t* const* rows, size_t count, void* panel) {
  int8_t* out = static_cast<int8_t*>(panel);
  size_t k = 0;
  for (; k + 4 <= count; k += 4) {
    for (int r = 0; r < kRows; ++r, out += 4) {
      for (int i = 0; i < 4; ++i) out[i] = rows[r][k + i];
    }
  }
  if (k < count) {
    for (int r = 0; r < kRows; ++r, out += 4) {
      for (size_t i = 0; i < 4; ++i) out[i] = k + i < count ? rows[r][k + i] : int8_t{0};
    }
  }
}

[[maybe_unused]] void multiply(const void* panel, const uint8_t* x, size_t stride, int columns, size_t count, int32_t* sums) {
  const int8_t* levels = static_cast<const int8_t*>(panel);
  for (int i = 0; i < columns * kRows; ++i) sums[i] = 0;
  for (size_t k = 0; k < count; k += 4, levels += 4 * kRows) {
    for (int c = 0; c < columns; ++c) {
      const uint8_t* four = x + c * stride + k;
      for (int r = 0; r < kRows; ++r) {
        sums[c * kRows + r] += levels[4 * r] * four[0] + levels[4 * r + 1] * four[1] + levels[4 * r + 2] * four[2] +
                               levels[4 * r + 3] * four[3];
      }
    }
  }
}

[[maybe_unused]] void pack_float(const int8_t* const* rows, size_t count, void* panel) {
  float* out = static_cast<float*>(panel);
  for (int r = 0; r < kRows; ++r) {
    for (size_t k = 0; k < count; ++k) out[k * kRows + r] = static_cast<float>(rows[r][k]);
  }
}

[[maybe_unused]] void multiply_float(const void* panel, const float* x, size_t stride, int columns, size_t count, float* sums) {
  const float* levels = static_cast<const float*>(panel);
  for (int c = 0; c < columns; ++c) {
    float partial[kRows] = {};
    for (size_t k = 0; k < count; ++k) {
      const float value = x[c * stride + k];
      for (int r = 0; r < kRows; ++r) partial[r] += levels[k * kRows + r] * value;
    }
    for (int r = 0; r < kRows; ++r) sums[c * kRows + r] = partial[r];
  }
}

// With its number of rows known when it is compiled, the usual case has no odd end.
template <int kFixed>
inline void finish_row(const int32_t* sums, int rows, float scale, int32_t zero, const float* step,
                       const int32_t* level_sums, const float* bias, bool add, float* y) {
  const int stop = kFixed > 0 ? kFixed : rows;
  float out[kRows];
  for (int r = 0; r < stop; ++r) {
    // Unsigned, because the two may be too large each while their difference never is.
    const uint32_t whole = static_cast<uint32_t>(sums[r]) - static_cast<uint32_t>(zero) * static_cast<uint32_t>(level_sums[r]);
    out[r] = scale * (step[r] * static_cast<float>(static_cast<int32_t>(whole)));
  }
  if (bias != nullptr) {
    for (int r = 0; r < stop; ++r) out[r] += bias[r];
  }
  if (add) {
    for (int r = 0; r < stop; ++r) out[r] += y[r];
  }
  for (int r = 0; r < stop; ++r) y[r] = out[r];
}

template <int kShift>
[[maybe_unused]] void finish(const int32_t* sums, int columns, int rows, const float* scale, const int32_t* zero, const float* step,
            const int32_t* level_sums, const float* bias, bool add, float* y, size_t y_stride) {
  for (int c = 0; c < columns; ++c, sums += kRows, y += y_stride) {
    if (rows == kRows) {
      finish_row<kRows>(sums, rows, scale[c], zero[c] - kShift, step, level_sums, bias, add, y);
    } else {
      finish_row<0>(sums, rows, scale[c], zero[c] - kShift, step, level_sums, bias, add, y);
    }
  }
}

void finish_float(const float* sums, int columns, int rows, const float* step, const float* bias, bool add, float* y,
                  size_t y_stride) {
  for (int c = 0; c < columns; ++c, sums += kRows, y += y_stride) {
    for (int r = 0; r < rows; ++r) {
      float out = step[r] * sums[r];
      if (bias != nullptr) out += bias[r];
      y[r] = add ? out + y[r] : out;
    }
  }
}

template <int kBits>
inline void unpack_words(const uint8_t* bytes, size_t eights, int offset, int factor, int8_t* levels) {
  for (size_t i = 0; i < eights; ++i, bytes += kBits, levels += 8) {
    uint64_t word = 0;
    for (int b = 0; b < kBits; ++b) word |= static_cast<uint64_t>(bytes[b]) << (8 * b);
    for (int k = 0; k < 8; ++k) {
      const int code = static_cast<int>(word >> (kBits * k) & ((1u << kBits) - 1));
      levels[k] = static_cast<int8_t>((code - offset) * factor);
    }
  }
}

inline int code_at(const uint8_t* row, int bits, size_t index) {
  const size_t bit = index * static_cast<size_t>(bits);
  unsigned word = row[bit / 8];
  if (bit % 8 + static_cast<size_t>(bits) > 8) word |= static_cast<unsigned>(row[bit / 8 + 1]) << 8;
  return static_cast<int>(word >> (bit % 8) & ((1u << bits) - 1));
}

void unpack(const uint8_t* row, int bits, size_t first, size_t count, int offset, int factor, int8_t* levels) {
  size_t i = 0;
  for (; i < count && (first + i) % 8 != 0; ++i) {
    levels[i] = static_cast<int8_t>((code_at(row, bits, first + i) - offset) * factor);
  }
  const uint8_t* bytes = row + (first + i) / 8 * static_cast<size_t>(bits);
  const size_t eights = (count - i) / 8;
  int8_t* out = levels + i;
  switch (bits) {
    case 1: unpack_words<1>(bytes, eights, offset, factor, out); break;
    case 2: unpack_words<2>(bytes, eights, offset, factor, out); break;
    case 3: unpack_words<3>(bytes, eights, offset, factor, out); break;
    case 4:
      for (size_t k = 0; k < 4 * eights; ++k) {
        out[2 * k] = static_cast<int8_t>(((bytes[k] & 15) - offset) * factor);
        out[2 * k + 1] = static_cast<int8_t>(((bytes[k] >> 4) - offset) * factor);
      }
      break;
    case 5: unpack_words<5>(bytes, eights, offset, factor, out); break;
    case 6: unpack_words<6>(bytes, eights, offset, factor, out); break;
    case 7: unpack_words<7>(bytes, eights, offset, factor, out); break;
    default:
      for (size_t k = 0; k < 8 * eights; ++k) out[k] = static_cast<int8_t>((bytes[k] - offset) * factor);
  }
  for (i += 8 * eights; i < count; ++i) {
    levels[i] = static_cast<int8_t>((code_at(row, bits, first + i) - offset) * factor);
  }
}

// The places that the six patterns of 2:4 keep, in colexicographic order.
constexpr uint8_t kPlaces2of4[6][2] = {{0, 1}, {0, 2}, {1, 2}, {0, 3}, {1, 3}, {2, 3}};

void unpack_2of4(const uint8_t* codes, const uint8_t* patterns, size_t groups, int offset, int factor, int8_t* levels) {
  for (size_t k = 0; k < 4 * groups; ++k) levels[k] = 0;
  unsigned ranks = 0;
  for (size_t group = 0; group < groups; ++group, levels += 4) {
    if (group % 3 == 0) ranks = patterns[group / 3];
    const uint8_t* places = kPlaces2of4[ranks % 6];
    ranks /= 6;
    levels[places[0]] = static_cast<int8_t>(((codes[group] & 15) - offset) * factor);
    levels[places[1]] = static_cast<int8_t>(((codes[group] >> 4) - offset) * factor);
  }
}
