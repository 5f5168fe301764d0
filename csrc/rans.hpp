// Decoding of entropy-coded codes (docs/format.md, "Entropy-coded codes").
#pragma once

#include <cstddef>
#include <cstdint>

namespace usmlite {

// How many lanes `count` codes are dealt to.
uint64_t rans_lanes(uint64_t count);

// Decodes `count` codes of `bits` bits (1 to 8) from `bytes` bytes into `out`, one byte each.
//
// Nothing outside data[0, bytes) and out[0, count) is touched, whatever the bytes say.
// Throws std::invalid_argument where they are not what an encoder makes for so many codes.
void rans_decode(const uint8_t* data, size_t bytes, int bits, uint64_t count, int tables, uint8_t* out);

}  // namespace usmlite
