// The inner loops, once for each instruction set.
//
// A weight comes to them as rows of levels, int8: weight = level * step. Activations are float32, or whole
// numbers: x = scale * (code - zero), a byte each. Blocks of kRows outputs are computed in one of two ways:
//
// * few rows of activations: `dot`, along the rows of the weight as they lie in memory;
// * many: `pack` puts the levels of a block into the order in which `block` reads them again and again.
//
// Both give sums of products, which `finish` turns into outputs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace usmlite {

constexpr int kRows = 32;         // outputs of a block
constexpr int kColumns = 4;       // rows of activations that `dot` takes, at most
constexpr int kMostBlock = 16;    // rows of activations that `block` takes, at most
constexpr int kPad = 64;          // readable bytes, or floats, after each row of activations

struct Isa {
  const char* name;
  bool (*available)();
  int block;          // rows of activations that `block` takes
  uint8_t code_flip;  // stored activation codes are (code XOR this)
  int code_shift;     // what that adds to the zero of the codes: their products are with code - code_shift
  int level_bytes;    // that a level takes in `pack`'s order

  // x[count] * column_scale[count] (may be null) to codes; x = scale * (code - zero). A row with a number
  // that is not finite gets the scale NaN.
  void (*quantize)(const float* x, const float* column_scale, size_t count, uint8_t* codes, float* scale,
                   int32_t* zero);

  // sums[c * kRows + r] = sum over k < count of rows[r][k] * x[c * stride + k], for 4 rows and `columns`
  // (1 to kColumns) rows of activations.
  void (*dot)(const int8_t* const* rows, const uint8_t* x, size_t stride, int columns, size_t count, int32_t* sums);
  void (*dot_float)(const int8_t* const* rows, const float* x, size_t stride, int columns, size_t count, float* sums);

  // Levels of kRows rows in `block`'s order; what `panel_bytes(count)` says fits every path.
  void (*pack)(const int8_t* const* rows, size_t count, void* panel);
  void (*pack_float)(const int8_t* const* rows, size_t count, void* panel);

  // sums[c * kRows + r] as for dot, for kRows rows and `columns` (1 to this->block) rows of activations. Reads up to
  // 3 codes beyond `count`.
  void (*multiply)(const void* panel, const uint8_t* x, size_t stride, int columns, size_t count, int32_t* sums);
  void (*multiply_float)(const void* panel, const float* x, size_t stride, int columns, size_t count, float* sums);

  // y[c * y_stride + r] (+)= scale[c] * (step[r] * (sums - (zero[c] - code_shift) * level_sums[r])) (+ bias[r])
  void (*finish)(const int32_t* sums, int columns, int rows, const float* scale, const int32_t* zero,
                 const float* step, const int32_t* level_sums, const float* bias, bool add, float* y, size_t y_stride);
  void (*finish_float)(const float* sums, int columns, int rows, const float* step, const float* bias, bool add,
                       float* y, size_t y_stride);

  // Codes of `bits` bits (least significant first, dense) less `offset`, times `factor`: `count` of them, from
  // code `first` of a row on. Reads whole bytes of the row only.
  void (*unpack)(const uint8_t* row, int bits, size_t first, size_t count, int offset, int factor, int8_t* levels);
  // 4-bit codes of which 2 of every 4 are kept, patterns of three groups in a byte: `groups` whole groups.
  void (*unpack_2of4)(const uint8_t* codes, const uint8_t* patterns, size_t groups, int offset, int factor,
                      int8_t* levels);

  // What follows comes from isa_rows.inl.

  // codes[k] = 255 * 2^(scores[k] - top), rounded, for count >= 1 scores; their sum. Returns `top`, the largest.
  float (*weigh)(const float* scores, size_t count, uint8_t* codes, int32_t* sum);
  // rest[k] = x[k] * column_scale[k] (may be null) less what its code from `quantize` stands for.
  void (*remainder)(const float* x, const float* column_scale, size_t count, const uint8_t* codes, float scale,
                    int32_t zero, float* rest);
  // The largest |x[k]|; NaN where one of them is not finite.
  float (*reach)(const float* x, size_t count);
  // levels[k] = x[k] * inverse[k], rounded to -127 .. 127.
  void (*round_levels)(const float* x, const float* inverse, size_t count, int8_t* levels);
  // out[width] = values weighed by the softmax of scale * ln 2 * (query . keys), in float32; keys and values are
  // `stride` floats apart. Overwrites scores[count].
  void (*attend_floats)(const float* query, float scale, const float* keys, const float* values, size_t stride,
                        size_t count, size_t width, float* scores, float* out);
  // Layer normalization of a row.
  void (*normalize)(const float* x, const float* weight, const float* bias, size_t count, float epsilon, float* y);
  // The Gaussian error linear unit; y may be x.
  void (*gelu)(const float* x, size_t count, float* y);

  // One rANS step of every lane (rans.cpp): its next code, from the table that begins at starts[lane]. There must be a
  // word for every lane; returns how many were taken.
  size_t (*next_codes)(const uint32_t* tables, const uint32_t* starts, uint32_t* states, size_t lanes,
                       const uint8_t* words, uint8_t* codes);
};

// Bytes that the levels of a block take at most, in any order: float32, the count rounded up.
inline size_t panel_bytes(size_t count) { return (count + 4) * kRows * sizeof(float); }

// Put before a loop over registers: only once it is gone can its arrays be registers. GCC would come to that too late.
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

// The best one that this processor has, or the named one; null where there is none of that name here.
const Isa* best_isa();
const Isa* find_isa(const char* name);
// Those that this processor has, best first, ended by null.
const Isa* const* available_isas();

}  // namespace usmlite
