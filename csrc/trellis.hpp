// Codes of a column that follow each other along a trellis (docs/format.md, "Codes along a trellis").
#pragma once

#include <cstddef>
#include <cstdint>

namespace usmlite {

constexpr int kMostStates = 32;
constexpr size_t kTrellisRows = 4096;  // after so many rows every column begins anew
constexpr int kSymbols = 128;          // of a quantizer, from -64 to 63

// Whether there is a trellis of so many states.
bool is_trellis(int states);

// The state after `state` and a symbol of this parity. The lowest bit of a state is its quantizer.
uint8_t next_state(int states, int state, int parity);

// The code of a symbol, both counted from 0: 128 and 64 stand for zero.
uint8_t trellis_code(int quantizer, int symbol);

struct TrellisSearch {
  int states = 0;
  size_t count = 0, rows = 0;        // columns of weights, each on its own, and their length
  const float* steps = nullptr;      // [count, rows], weights in steps
  const float* costs = nullptr;      // [count], of the square of a step, in bits
  const uint8_t* tables = nullptr;   // [count, rows], which table of `bits` a weight belongs to
  const float* bits = nullptr;       // [table_count, 2, kSymbols], what each quantizer's symbols cost
  size_t table_count = 0;
  uint8_t* out = nullptr;            // [count, rows], codes
};

// The codes with the least sum of squared errors and bits, column by column (Viterbi's algorithm).
//
// Throws std::invalid_argument where there is no such trellis, or a table is not there.
void trellis_search(const TrellisSearch& job);

}  // namespace usmlite
