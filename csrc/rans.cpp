#include "rans.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "trellis.hpp"

namespace usmlite {
namespace {

constexpr int kBits = 12;  // frequencies add up to 2^12
constexpr uint32_t kTotal = 1u << kBits;
constexpr uint32_t kLowest = 1u << 16;  // states lie in 2^16 .. 2^32 - 1 between steps
constexpr int kMostTables = 64;

uint32_t read16(const uint8_t* at) { return at[0] | static_cast<uint32_t>(at[1]) << 8; }

uint32_t read32(const uint8_t* at) { return read16(at) | read16(at + 2) << 16; }

// Entries as `next_codes` reads them.
void fill_table(const uint16_t* frequencies, uint32_t symbols, uint32_t* table) {
  uint32_t slot = 0;
  for (uint32_t symbol = 0; symbol < symbols; ++symbol) {
    const uint32_t frequency = frequencies[symbol];
    for (uint32_t place = 0; place < frequency; ++place) {
      table[slot++] = symbol | place << 8 | (frequency - 1) << 20;
    }
  }
}

// One code of every lane, looking for the end of the words at each of them. `starts` says where each code's table
// begins.
bool careful_step(const uint32_t* tables, const uint32_t* starts, uint32_t* states, size_t lanes,
                  const uint8_t*& words, const uint8_t* end, uint8_t* out) {
  for (size_t lane = 0; lane < lanes; ++lane) {
    uint32_t x = states[lane];
    const uint32_t entry = tables[starts[lane] + (x & (kTotal - 1))];
    out[lane] = static_cast<uint8_t>(entry);
    x = ((entry >> 20) + 1) * (x >> kBits) + (entry >> 8 & (kTotal - 1));
    if (x < kLowest) {
      if (words == end) return false;
      x = x << 16 | read16(words);
      words += 2;
    }
    states[lane] = x;
  }
  return true;
}

// What decoding needs of a trellis, and the state of every column. In bytes and without look-ups, so that compilers take
// as many columns at once as a register has bytes.
struct Trellis {
  uint8_t quantizer = 0, parity = 0;  // what they add to a state
  std::vector<uint8_t> columns;

  Trellis(int states, size_t count) : columns(count) {
    if (states == 0) return;
    quantizer = next_state(states, 1, 0);
    parity = next_state(states, 0, 1);
  }

  // The tables of neighbours in a row, from the first ones of the two quantizers.
  void choose(size_t column, size_t count, uint32_t* starts) const {
    const uint8_t* own = columns.data() + column;
    for (size_t k = 0; k < count; ++k) starts[k] = 2 * starts[k] + (static_cast<uint32_t>(own[k] & 1) << kBits);
  }

  // Their symbols to codes, as trellis_code() has it; their columns' states move on, as next_state() has it.
  void follow(size_t column, size_t count, uint8_t* out) {
    uint8_t* own = columns.data() + column;
    const uint8_t by_quantizer = quantizer, by_parity = parity;
    for (size_t k = 0; k < count; ++k) {
      const uint8_t state = own[k], symbol = out[k], odd = static_cast<uint8_t>(-(state & 1));
      const int8_t steps = static_cast<int8_t>(symbol - kSymbols / 2);
      const int8_t sign = static_cast<int8_t>((steps > 0) - (steps < 0));
      out[k] = static_cast<uint8_t>(128 + 2 * steps - (sign & odd));
      own[k] = static_cast<uint8_t>((state >> 1) ^ (by_quantizer & odd) ^ (by_parity & -(symbol & 1)));
    }
  }
};

// Where the tables of some neighbours in a row begin, by the level of the row less the lowest sum.
void find_tables(int level, const uint8_t* columns, size_t count, int tables, uint32_t* starts) {
  for (size_t k = 0; k < count; ++k) {
    const int table = level + columns[k];
    starts[k] = static_cast<uint32_t>(table < 0 ? 0 : table >= tables ? tables - 1 : table) << kBits;
  }
}

std::vector<uint32_t> make_tables(const Coded& coded) {
  const size_t symbols = size_t{1} << coded.bits;
  const size_t tables = static_cast<size_t>(coded.tables) * (coded.states == 0 ? 1 : 2);
  for (size_t table = 0; table < tables; ++table) {
    uint32_t sum = 0;
    for (size_t symbol = 0; symbol < symbols; ++symbol) sum += coded.frequencies[table * symbols + symbol];
    if (sum != kTotal) {
      throw std::invalid_argument("frequencies add up to " + std::to_string(sum) + " instead of " +
                                  std::to_string(kTotal));
    }
  }
  std::vector<uint32_t> entries(tables << kBits);
  for (size_t table = 0; table < tables; ++table) {
    fill_table(coded.frequencies + table * symbols, static_cast<uint32_t>(symbols), entries.data() + (table << kBits));
  }
  return entries;
}

}  // namespace

uint64_t rans_lanes(uint64_t count) {
  return std::max<uint64_t>(1, std::min<uint64_t>(count, 32 + count / 16384));
}

void rans_decode(const Coded& coded, uint8_t* out, const Isa* isa) {
  if (coded.bits < 1 || coded.bits > 8 || coded.tables < 1 || coded.tables > kMostTables || coded.lowest < 0 ||
      coded.lowest > 255) {
    throw std::invalid_argument("codes have 1 to 8 bits and 1 to 64 tables");
  }
  if (coded.states != 0 && (!is_trellis(coded.states) || coded.bits != 7)) {
    throw std::invalid_argument("a trellis has 4, 8, 16 or 32 states, and symbols of 7 bits");
  }
  if (coded.columns != 0 && coded.rows > SIZE_MAX / 8 / coded.columns) {
    throw std::invalid_argument("sizes are too large");
  }
  const size_t count = coded.rows * coded.columns, lanes = static_cast<size_t>(rans_lanes(count));
  if (coded.stream_bytes / 4 < lanes || coded.stream_bytes % 2 != 0) {
    throw std::invalid_argument(std::to_string(coded.stream_bytes) + " bytes cannot hold " + std::to_string(count) +
                                " codes");
  }
  const std::vector<uint32_t> tables = make_tables(coded);
  std::vector<uint32_t> states(lanes), starts(lanes);
  for (size_t lane = 0; lane < lanes; ++lane) states[lane] = read32(coded.stream + 4 * lane);
  const uint8_t* words = coded.stream + 4 * lanes;
  const uint8_t* end = coded.stream + coded.stream_bytes;

  Trellis trellis(coded.states, coded.states == 0 ? 0 : coded.columns);
  auto decode = [&](size_t lane, size_t part, uint8_t* to) {
    const uint32_t* start = starts.data() + lane;
    if (static_cast<size_t>(end - words) >= 2 * part) {  // a word for every lane
      words += 2 * isa->next_codes(tables.data(), start, states.data() + lane, part, words, to);
    } else if (!careful_step(tables.data(), start, states.data() + lane, part, words, end, to)) {
      throw std::invalid_argument("the stream ends early");
    }
  };
  size_t row = 0, column = 0;
  for (size_t first = 0; first < count; first += lanes) {
    const size_t stop = std::min(count, first + lanes);
    if (coded.tables > 1 || coded.states != 0) {
      for (size_t code = first; code < stop;) {  // a step may lie in several rows
        const size_t part = std::min(stop - code, coded.columns - column), lane = code - first;
        find_tables(coded.row_levels[row] - coded.lowest, coded.column_levels + column, part, coded.tables,
                    starts.data() + lane);
        if (coded.states != 0) {
          // Row by row, because a code's quantizer depends on the codes above it.
          if (column == 0 && row % kTrellisRows == 0) std::fill(trellis.columns.begin(), trellis.columns.end(), 0);
          trellis.choose(column, part, starts.data() + lane);
          decode(lane, part, out + code);
          trellis.follow(column, part, out + code);
        }
        code += part;
        column += part;
        if (column == coded.columns) {
          column = 0;
          ++row;
        }
      }
    }
    if (coded.states == 0) decode(0, stop - first, out + first);
  }
  // What encoding started from; anything else was altered.
  if (words != end || std::any_of(states.begin(), states.end(), [](uint32_t x) { return x != kLowest; })) {
    throw std::invalid_argument("the stream does not end where its codes do");
  }
}

}  // namespace usmlite
