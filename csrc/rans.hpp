// Decoding of entropy-coded codes (docs/format.md, "Entropy-coded codes").
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"

namespace usmlite {

// A matrix [rows, columns] of codes as its stream, without what says how it is read: that is parsed already.
struct Coded {
  int bits = 0;                            // of a code, 1 to 8
  int tables = 0;                          // of frequencies, 1 to 64
  int lowest = 0;                          // the sum of levels of the first table, 0 to 255
  const uint8_t* row_levels = nullptr;     // [rows]
  const uint8_t* column_levels = nullptr;  // [columns]
  size_t rows = 0, columns = 0;
  int states = 0;                          // of the trellis, 0 without one; symbols then have 7 bits
  const uint16_t* frequencies = nullptr;   // [tables, 2^bits]; with a trellis [tables, 2, 2^bits]
  const uint8_t* stream = nullptr;         // states, then words
  size_t stream_bytes = 0;
};

// How many lanes `count` codes are dealt to.
uint64_t rans_lanes(uint64_t count);

// Decodes into `out`, uint8 [rows, columns].
//
// Nothing outside the arrays and their sizes is touched, whatever they hold.
// Throws std::invalid_argument where they are not what an encoder makes for so many codes.
void rans_decode(const Coded& coded, uint8_t* out, const Isa* isa = best_isa());

}  // namespace usmlite
