// A weight [rows, columns] as it lies in memory: whole numbers, scales for groups of columns, and what the
// kernels want to know about them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "isa.hpp"

namespace usmlite {

// One array of somebody else's memory.
struct Bytes {
  const void* data = nullptr;
  size_t size = 0;  // bytes

  const uint8_t* at(size_t offset) const { return static_cast<const uint8_t*>(data) + offset; }
};

// N kept of every M neighbours; `digits` patterns, base C(M, N), in each little-endian word of `word_bytes`.
struct Pattern {
  int n = 0, m = 0, word_bytes = 0, digits = 0;
};

// What docs/format.md calls the parts of a compressed weight, or its levels.
struct Parts {
  size_t rows = 0, columns = 0;
  size_t group = 0;         // columns that share a scale; 0: all
  int bits = 0;             // of the codes; 0: `codes` are levels, int8 [rows, columns]
  int doubled_offset = 0;   // twice the code that stands for zero; unused with zero points or levels
  Pattern pattern;          // n = 0: dense
  Bytes codes;              // uint8 [rows, bytes of a row], or the levels
  Bytes scale;              // float32 [rows, groups]
  Bytes zero;               // uint8 [rows, groups], or nothing
  Bytes patterns;           // uint8 [rows, words * word_bytes]; nothing where dense
  Bytes column_scale;       // float32 [columns], or nothing
};

// A run of columns with one scale, short enough for sums of 32 bits.
struct Segment {
  size_t begin, end, group;
};

class Weight {
 public:
  // Checks everything against everything; keeps `codes`, `zero` and `patterns` by address, copies the rest.
  // Throws std::invalid_argument.
  explicit Weight(const Parts& parts);

  size_t rows() const { return parts_.rows; }
  size_t columns() const { return parts_.columns; }
  const float* column_scale() const { return column_scale_.empty() ? nullptr : column_scale_.data(); }
  const std::vector<Segment>& segments() const { return segments_; }
  // [groups][rows], multiplies the levels.
  const float* steps(size_t group) const { return steps_.data() + group * parts_.rows; }
  // Whether `levels` costs nothing.
  bool direct() const { return parts_.bits == 0; }

  // Row `row` as levels: where they lie, or unpacked to `scratch`, of scratch_bytes().
  const int8_t* levels(size_t row, int8_t* scratch, const Isa& isa) const;
  size_t scratch_bytes() const { return scratch_bytes_; }

  // Row `row` as float32 [columns]: level * step, times the column's scale.
  void unpack(size_t row, int8_t* scratch, float* out, const Isa& isa) const;

  // [segments][rows]: sums of the levels. Computed when they are first asked for.
  const int32_t* level_sums(size_t segment) const { return sums_.data() + segment * parts_.rows; }
  void compute_sums(const Isa& isa, int threads);

 private:
  void unpack_row(size_t row, int8_t* out, const Isa& isa) const;
  void make_places();

  Parts parts_;
  size_t row_bytes_ = 0, pattern_bytes_ = 0, stored_ = 0, pattern_groups_ = 0, groups_ = 1, scratch_bytes_ = 0;
  int factor_ = 1;  // 2 where zero lies between two codes: levels are whole numbers then too
  std::vector<Segment> segments_;
  std::vector<float> steps_, column_scale_;
  std::vector<int32_t> sums_;
  uint64_t patterns_count_ = 0;
  std::vector<uint8_t> places_;  // [patterns][n], where there are few enough
};

}  // namespace usmlite
