// 64-bit Arm with dot products of signed bytes; codes of activations are stored less 128 for them.
#include <arm_neon.h>

#ifdef __linux__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "isa.hpp"

namespace usmlite {
namespace {

#include "isa_common.inl"

#include "isa_rows.inl"

bool available() {
#ifdef __linux__
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // every Mac with such a processor has it
#endif
}

inline int8x16_t load(const void* at) { return vld1q_s8(static_cast<const int8_t*>(at)); }

void dot_neon(const int8_t* const* rows, const uint8_t* x, size_t stride, int columns, size_t count, int32_t* sums) {
  for (int c = 0; c < columns; ++c) {
    const uint8_t* codes = x + c * stride;
    int32x4_t sum[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
    size_t k = 0;
    for (; k + 16 <= count; k += 16) {
      const int8x16_t values = load(codes + k);
      UNROLL for (int r = 0; r < 4; ++r) sum[r] = vdotq_s32(sum[r], load(rows[r] + k), values);
    }
    UNROLL for (int r = 0; r < 4; ++r) {
      int32_t total = vaddvq_s32(sum[r]);
      for (size_t i = k; i < count; ++i) total += rows[r][i] * static_cast<int8_t>(codes[i]);
      sums[c * kRows + r] = total;
    }
  }
}

template <int kWide>
void multiply_of(const int8_t* levels, const uint8_t* x, size_t stride, size_t count, int32_t* sums) {
  for (int half = 0; half < kRows; half += 16) {
    int32x4_t sum[kWide][4];
    UNROLL for (int c = 0; c < kWide; ++c) {
      UNROLL for (int v = 0; v < 4; ++v) sum[c][v] = vdupq_n_s32(0);
    }
    for (size_t k = 0; k < count; k += 4) {
      int8x16_t block[4];
      UNROLL for (int v = 0; v < 4; ++v) block[v] = load(levels + k * kRows + 4 * half + 16 * v);
      UNROLL for (int c = 0; c < kWide; ++c) {
        int32_t word;
        __builtin_memcpy(&word, x + c * stride + k, 4);
        const int8x16_t codes = vreinterpretq_s8_s32(vdupq_n_s32(word));
        UNROLL for (int v = 0; v < 4; ++v) sum[c][v] = vdotq_s32(sum[c][v], block[v], codes);
      }
    }
    UNROLL for (int c = 0; c < kWide; ++c) {
      UNROLL for (int v = 0; v < 4; ++v) vst1q_s32(sums + c * kRows + half + 4 * v, sum[c][v]);
    }
  }
}

void multiply_neon(const void* panel, const uint8_t* x, size_t stride, int columns, size_t count, int32_t* sums) {
  const int8_t* levels = static_cast<const int8_t*>(panel);
  int c = 0;
  for (; c + 4 <= columns; c += 4) multiply_of<4>(levels, x + c * stride, stride, count, sums + c * kRows);
  for (; c < columns; ++c) multiply_of<1>(levels, x + c * stride, stride, count, sums + c * kRows);
}

}  // namespace

extern const Isa kNeon;
const Isa kNeon = {
    "neon", available, 12, 0x80, 128, 1, quantize<0x80>, dot_neon, dot_float, pack_fours, pack_float, multiply_neon,
    multiply_float, finish<128>, finish_float, unpack, unpack_2of4,
    weigh<0x80>, remainder<0x80>, reach, round_levels, attend_floats, normalize, gelu, next_codes,
};

}  // namespace usmlite
