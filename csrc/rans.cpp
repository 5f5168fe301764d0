#include "rans.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace usmlite {
namespace {

constexpr int kBits = 12;  // frequencies add up to 2^12
constexpr uint32_t kTotal = 1u << kBits;
constexpr uint32_t kLowest = 1u << 16;  // states lie in 2^16 .. 2^32 - 1 between steps
constexpr int kMostTables = 64;

uint32_t read16(const uint8_t* at) { return at[0] | static_cast<uint32_t>(at[1]) << 8; }

uint32_t read32(const uint8_t* at) { return read16(at) | read16(at + 2) << 16; }

// A slot's entry: its symbol in bits 0 to 7, its place in the symbol's range in bits 8 to 19, the symbol's
// frequency less one in bits 20 to 31.
void fill_table(const uint8_t* frequencies, uint32_t symbols, uint32_t* table) {
  uint32_t slot = 0;
  for (uint32_t symbol = 0; symbol < symbols; ++symbol) {
    const uint32_t frequency = read16(frequencies + 2 * symbol);
    for (uint32_t place = 0; place < frequency; ++place) {
      table[slot++] = symbol | place << 8 | (frequency - 1) << 20;
    }
  }
}

// One code of every lane of a run whose table is the same. `Careful` looks for the end of the words at
// each of them; without it the caller has seen that there is one for every lane.
template <bool Careful>
bool step(const uint32_t* table, uint32_t* states, size_t lanes, const uint8_t*& words, const uint8_t* end,
          uint8_t* out) {
  const uint8_t* next = words;
  for (size_t lane = 0; lane < lanes; ++lane) {
    uint32_t x = states[lane];
    const uint32_t entry = table[x & (kTotal - 1)];
    out[lane] = static_cast<uint8_t>(entry);
    x = ((entry >> 20) + 1) * (x >> kBits) + (entry >> 8 & (kTotal - 1));
    if (Careful) {
      if (x < kLowest) {
        if (next == end) return false;
        x = x << 16 | read16(next);
        next += 2;
      }
    } else {
      // Without a branch: whether a lane needs a word is as good as random.
      const bool empty = x < kLowest;
      const uint32_t filled = x << 16 | read16(next);
      x = empty ? filled : x;
      next += empty ? 2 : 0;
    }
    states[lane] = x;
  }
  words = next;
  return true;
}

}  // namespace

uint64_t rans_lanes(uint64_t count) {
  return std::max<uint64_t>(1, std::min<uint64_t>(count, 128 + count / 16384));
}

void rans_decode(const uint8_t* data, size_t bytes, int bits, uint64_t count, int tables, uint8_t* out) {
  if (bits < 1 || bits > 8 || tables < 1 || tables > kMostTables) {
    throw std::invalid_argument("codes have 1 to 8 bits and 1 to 64 tables");
  }
  const uint64_t lanes = rans_lanes(count);
  const uint32_t symbols = 1u << bits;
  const uint64_t head = 2ull * static_cast<uint64_t>(tables) * symbols;
  if (bytes < head || (bytes - head) / 4 < lanes || (bytes - head) % 2) {
    throw std::invalid_argument(std::to_string(bytes) + " bytes cannot hold " + std::to_string(count) + " codes");
  }
  for (int table = 0; table < tables; ++table) {
    uint32_t sum = 0;
    for (uint32_t symbol = 0; symbol < symbols; ++symbol) {
      sum += read16(data + 2 * (static_cast<size_t>(table) * symbols + symbol));
    }
    if (sum != kTotal) {
      throw std::invalid_argument("frequencies add up to " + std::to_string(sum) + " instead of " +
                                  std::to_string(kTotal));
    }
  }
  std::vector<uint32_t> states(lanes);
  for (uint64_t lane = 0; lane < lanes; ++lane) states[lane] = read32(data + head + 4 * lane);
  const uint8_t* words = data + head + 4 * lanes;
  const uint8_t* end = data + bytes;

  std::vector<uint32_t> table(kTotal);
  const uint64_t run = (count + static_cast<uint64_t>(tables) - 1) / static_cast<uint64_t>(tables);
  uint64_t table_end = 0;  // the first code that the table at hand is not for
  int following = 0;
  for (uint64_t first = 0; first < count; first += lanes) {
    const uint64_t stop = std::min(count, first + lanes);
    // A step may lie in several tables, one after the other.
    for (uint64_t code = first; code < stop;) {
      if (code == table_end) {
        fill_table(data + 2 * static_cast<size_t>(following) * symbols, symbols, table.data());
        ++following;
        table_end += run;
      }
      const size_t part = static_cast<size_t>(std::min(stop, table_end) - code);
      const bool plenty = static_cast<size_t>(end - words) >= 2 * part;  // a word for every lane
      const bool ok = plenty ? step<false>(table.data(), states.data() + (code - first), part, words, end, out + code)
                             : step<true>(table.data(), states.data() + (code - first), part, words, end, out + code);
      if (!ok) throw std::invalid_argument("the stream ends early");
      code += part;
    }
  }
  // What encoding started from; anything else was altered.
  if (words != end || std::any_of(states.begin(), states.end(), [](uint32_t x) { return x != kLowest; })) {
    throw std::invalid_argument("the stream does not end where its codes do");
  }
}

}  // namespace usmlite
