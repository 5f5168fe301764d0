#include "trellis.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

namespace usmlite {
namespace {

constexpr int kZeroSymbol = kSymbols / 2;
constexpr int kMostSymbol = kZeroSymbol - 1;
constexpr float kMostStep = 126.0f;
constexpr float kFar = 1048576.0f;
constexpr float kNever = std::numeric_limits<float>::infinity();

// Ungerboeck's codes for amplitudes: the polynomials of the next state, with the lowest coefficient left out.
struct Polynomials {
  uint8_t quantizer, parity;
};

Polynomials polynomials(int states) {
  switch (states) {
    case 4: return {05 >> 1, 02 >> 1};
    case 8: return {013 >> 1, 04 >> 1};
    case 16: return {023 >> 1, 04 >> 1};
    case 32: return {045 >> 1, 010 >> 1};
    default: throw std::invalid_argument("a trellis has 4, 8, 16 or 32 states");
  }
}

int value_of(int quantizer, int index) { return quantizer == 0 ? 2 * index : 2 * index - (index > 0) + (index < 0); }

// The two ways into a state, as 2 * state + parity, lower ones first.
struct Ways {
  uint8_t from[kMostStates][2];
};

Ways ways_into(int states) {
  Ways ways{};
  int found[kMostStates] = {};
  for (int way = 0; way < 2 * states; ++way) {
    const int to = next_state(states, way / 2, way % 2);
    ways.from[to][found[to]++] = static_cast<uint8_t>(way);
  }
  return ways;
}

// Of each of the four subsets (2 * quantizer + parity) the best symbol's place and cost.
struct Best {
  float cost[4];
  int8_t index[4];
};

Best best_of(float step, float weight, const float* bits) {
  const int sign = step < 0 ? -1 : 1;
  const float absolute = step < 0 ? -step : step;
  // What is no number, or has no finite square, counts as very large.
  const float size = absolute < kFar ? absolute : kFar;
  const float near = size < kMostStep ? size : kMostStep;
  // The last multiples of four steps, with each subset's offset, that are not above: then there are neighbours on both
  // sides, and one further in, which may be cheaper: zero where there is one.
  const int even = static_cast<int>(near) / 4, odd = static_cast<int>(near + 2.0f) / 4 - 1;
  const int three = static_cast<int>(near + 1.0f) / 4, one = static_cast<int>(near + 3.0f) / 4 - 1;
  const int indices[4][3] = {{0, 2 * even, 2 * even + 2},
                             {2 * odd - 1, 2 * odd + 1, 2 * odd + 3},
                             {0, 2 * three, 2 * three + 2},
                             {2 * one - 1, 2 * one + 1, 2 * one + 3}};
  Best best;
  for (int subset = 0; subset < 4; ++subset) {
    const int quantizer = subset >> 1;
    const float* of_symbols = bits + quantizer * kSymbols + kZeroSymbol;
    float least = kNever;
    int at = 0;
    for (int candidate = 0; candidate < 3; ++candidate) {
      const int index = std::clamp(indices[subset][candidate], -1, kMostSymbol - (subset % 2 == 0));
      const float error = size - static_cast<float>(2 * index - (quantizer == 0 ? 0 : (index > 0) - (index < 0)));
      const float cost = weight * error * error + of_symbols[sign * index];
      at = cost < least ? index : at;
      least = cost < least ? cost : least;
    }
    best.cost[subset] = least;
    best.index[subset] = static_cast<int8_t>(sign * at);
  }
  return best;
}

void search_run(const TrellisSearch& job, const Ways& ways, size_t column, size_t first, size_t rows) {
  const int states = job.states;
  const size_t offset = column * job.rows + first;
  std::vector<uint8_t> from(rows * static_cast<size_t>(states));
  std::vector<Best> best(rows);
  float costs[kMostStates], next[kMostStates];
  std::fill(costs, costs + states, kNever);
  costs[0] = 0.0f;
  for (size_t row = 0; row < rows; ++row) {
    const size_t table = job.tables[offset + row];
    best[row] = best_of(job.steps[offset + row], job.costs[column], job.bits + table * 2 * kSymbols);
    const float* cost = best[row].cost;
    uint8_t* way = from.data() + row * static_cast<size_t>(states);
    float least = kNever;
    for (int to = 0; to < states; ++to) {
      const int one = ways.from[to][0], other = ways.from[to][1];
      const float with_one = costs[one >> 1] + cost[one & 3];  // parity, and the state's lowest bit
      const float with_other = costs[other >> 1] + cost[other & 3];
      const bool better = with_other < with_one;
      way[to] = static_cast<uint8_t>(better ? other : one);
      next[to] = better ? with_other : with_one;
      least = next[to] < least ? next[to] : least;
    }
    for (int state = 0; state < states; ++state) costs[state] = next[state] - least;
  }
  int state = static_cast<int>(std::min_element(costs, costs + states) - costs);
  for (size_t row = rows; row-- > 0;) {
    const int way = from[row * static_cast<size_t>(states) + static_cast<size_t>(state)];
    state = way >> 1;
    const int quantizer = state & 1, subset = 2 * quantizer + (way & 1);
    job.out[offset + row] = trellis_code(quantizer, kZeroSymbol + best[row].index[subset]);
  }
}

}  // namespace

bool is_trellis(int states) { return states == 4 || states == 8 || states == 16 || states == 32; }

uint8_t next_state(int states, int state, int parity) {
  const Polynomials found = polynomials(states);
  return static_cast<uint8_t>((state >> 1) ^ (state & 1 ? found.quantizer : 0) ^ (parity ? found.parity : 0));
}

uint8_t trellis_code(int quantizer, int symbol) {
  return static_cast<uint8_t>(value_of(quantizer, symbol - kZeroSymbol) + 128);
}

void trellis_search(const TrellisSearch& job) {
  const Ways ways = ways_into(job.states);
  const uint8_t* end = job.tables + job.count * job.rows;
  if (std::any_of(job.tables, end, [&](uint8_t table) { return table >= job.table_count; })) {
    throw std::invalid_argument("there is no such table");
  }
  for (size_t column = 0; column < job.count; ++column) {
    for (size_t first = 0; first < job.rows; first += kTrellisRows) {
      search_run(job, ways, column, first, std::min(kTrellisRows, job.rows - first));
    }
  }
}

}  // namespace usmlite
