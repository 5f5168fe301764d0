#include "weight.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "threads.hpp"

namespace usmlite {
namespace {

// 255 * 128 * 65536 is below 2^31.
constexpr size_t kLongest = 65536;
constexpr size_t kMostPlaces = 1u << 12;
constexpr size_t kMostElements = size_t{1} << 40;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

uint64_t binomial(int m, int n) {
  uint64_t out = 1;
  for (int i = 1; i <= n; ++i) out = out * static_cast<uint64_t>(m - n + i) / static_cast<uint64_t>(i);
  return out;
}

size_t ceil_of(size_t a, size_t b) { return (a + b - 1) / b; }

}  // namespace

Weight::Weight(const Parts& parts) : parts_(parts) {
  const size_t rows = parts.rows, columns = parts.columns;
  require(columns > 0 && columns < kMostElements && rows < kMostElements / columns, "impossible shape");
  require(parts.bits >= 0 && parts.bits <= 8, "codes have 1 to 8 bits");
  require(parts.group <= columns, "a scale group is at most a row");
  const size_t group = parts.group == 0 ? columns : parts.group;
  groups_ = ceil_of(columns, group);
  require(parts.scale.size == rows * groups_ * sizeof(float), "wrong number of scales");
  require(parts.column_scale.size == 0 || parts.column_scale.size == columns * sizeof(float),
          "wrong number of column scales");
  const Pattern& pattern = parts.pattern;
  stored_ = columns;
  if (pattern.n != 0) {
    require(pattern.n > 0 && pattern.n < pattern.m && pattern.m <= 32, "impossible N:M");
    require(parts.bits > 0, "levels have no patterns");
    require(pattern.word_bytes == 1 || pattern.word_bytes == 2 || pattern.word_bytes == 4 || pattern.word_bytes == 8,
            "impossible word of patterns");
    require(pattern.digits > 0 && pattern.digits <= 64, "impossible number of patterns in a word");
    patterns_count_ = binomial(pattern.m, pattern.n);
    pattern_groups_ = ceil_of(columns, static_cast<size_t>(pattern.m));
    stored_ = pattern_groups_ * static_cast<size_t>(pattern.n);
    pattern_bytes_ = ceil_of(pattern_groups_, static_cast<size_t>(pattern.digits)) *
                     static_cast<size_t>(pattern.word_bytes);
  }
  require(parts.patterns.size == rows * pattern_bytes_, "wrong number of pattern bytes");
  if (parts.bits == 0) {
    row_bytes_ = columns;
    require(parts.zero.size == 0, "levels have no zero points");
  } else {
    row_bytes_ = ceil_of(stored_ * static_cast<size_t>(parts.bits), 8);
    const int codes = 1 << parts.bits;
    if (parts.zero.size != 0) {
      require(parts.zero.size == rows * groups_, "wrong number of zero points");
      require(parts.bits <= 7, "levels of 8-bit codes with zero points take more than a byte");
      require(std::all_of(parts.zero.at(0), parts.zero.at(0) + parts.zero.size, [&](int z) { return z < codes; }),
              "impossible zero point");
    } else {
      require(parts.doubled_offset >= 0 && parts.doubled_offset < 2 * codes, "impossible offset");
      factor_ = parts.doubled_offset % 2 == 0 ? 1 : 2;
      const int low = -parts.doubled_offset * factor_ / 2;
      require(low >= -128 && low + (codes - 1) * factor_ <= 127, "these levels take more than a byte");
    }
  }
  require(parts.codes.size == rows * row_bytes_, "wrong number of code bytes");

  const float* scale = static_cast<const float*>(parts.scale.data);
  steps_.resize(groups_ * rows);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t g = 0; g < groups_; ++g) steps_[g * rows + row] = scale[row * groups_ + g] * (factor_ == 2 ? 0.5f : 1.0f);
  }
  if (parts.column_scale.size != 0) {
    const float* values = static_cast<const float*>(parts.column_scale.data);
    column_scale_.assign(values, values + columns);
  }
  parts_.scale = parts_.column_scale = Bytes();
  for (size_t g = 0; g < groups_; ++g) {
    const size_t stop = std::min(columns, (g + 1) * group);
    for (size_t begin = g * group; begin < stop; begin += kLongest) {
      segments_.push_back({begin, std::min(stop, begin + kLongest), g});
    }
  }
  // Whole groups of M and the stored codes before they are put in their places.
  if (parts.bits != 0) {
    scratch_bytes_ = std::max(columns, pattern_groups_ * static_cast<size_t>(std::max(pattern.m, 1))) + stored_ + kPad;
  }
  if (patterns_count_ != 0 && patterns_count_ <= kMostPlaces) make_places();
}

// The places that pattern `rank` keeps, in ascending order.
static void places_of(uint64_t rank, int n, int m, uint8_t* places) {
  int place = m - 1;
  for (int k = n; k > 0; --k) {
    // The highest place whose count of smaller choices still fits.
    while (place > k - 1 && binomial(place, k) > rank) --place;
    places[k - 1] = static_cast<uint8_t>(place);
    if (place >= k) rank -= binomial(place, k);
    --place;
  }
}

void Weight::make_places() {
  const int n = parts_.pattern.n;
  places_.resize(patterns_count_ * static_cast<size_t>(n));
  for (uint64_t rank = 0; rank < patterns_count_; ++rank) {
    places_of(rank, n, parts_.pattern.m, places_.data() + rank * static_cast<size_t>(n));
  }
}

void Weight::unpack_row(size_t row, int8_t* out, const Isa& isa) const {
  const Pattern& pattern = parts_.pattern;
  const uint8_t* codes = parts_.codes.at(row * row_bytes_);
  const uint8_t* zero = parts_.zero.size == 0 ? nullptr : parts_.zero.at(row * groups_);
  const int offset = parts_.doubled_offset / 2;
  // (code - offset) * 1, or (2 code - doubled offset) where zero lies between two codes: both as (code - a) * f + b.
  const int correction = factor_ == 2 ? -1 : 0;  // 2 (code - (d - 1) / 2) - 1 = 2 code - d
  const size_t columns = parts_.columns;
  if (pattern.n == 0) {
    if (zero == nullptr) {
      isa.unpack(codes, parts_.bits, 0, columns, offset, factor_, out);
      if (correction != 0) {
        for (size_t k = 0; k < columns; ++k) out[k] = static_cast<int8_t>(out[k] + correction);
      }
    } else {
      const size_t group = parts_.group == 0 ? columns : parts_.group;
      for (size_t g = 0; g < groups_; ++g) {
        const size_t begin = g * group;
        isa.unpack(codes, parts_.bits, begin, std::min(columns, begin + group) - begin, zero[g], 1, out + begin);
      }
    }
    return;
  }
  const uint8_t* words = parts_.patterns.at(row * pattern_bytes_);
  const size_t m = static_cast<size_t>(pattern.m), n = static_cast<size_t>(pattern.n);
  if (parts_.bits == 4 && m == 4 && n == 2 && pattern.word_bytes == 1 && pattern.digits == 3 && zero == nullptr &&
      factor_ == 1) {
    isa.unpack_2of4(codes, words, pattern_groups_, offset, factor_, out);
    return;
  }
  int8_t* stored = out + pattern_groups_ * m;
  isa.unpack(codes, parts_.bits, 0, stored_, zero == nullptr ? offset : 0, zero == nullptr ? factor_ : 1, stored);
  std::memset(out, 0, pattern_groups_ * m);
  uint64_t word = 0;
  uint8_t own[32];
  for (size_t group = 0; group < pattern_groups_; ++group, out += m, stored += n) {
    if (group % static_cast<size_t>(pattern.digits) == 0) {
      word = 0;
      for (int b = 0; b < pattern.word_bytes; ++b) word |= static_cast<uint64_t>(*words++) << (8 * b);
    }
    const uint64_t rank = word % patterns_count_;
    word /= patterns_count_;
    const uint8_t* places = own;
    if (places_.empty()) {
      places_of(rank, pattern.n, pattern.m, own);
    } else {
      places = places_.data() + rank * n;
    }
    for (size_t i = 0; i < n; ++i) {
      int level = stored[i] + correction;
      if (zero != nullptr) {
        const size_t column = std::min(group * m + places[i], columns - 1);
        level = static_cast<uint8_t>(stored[i]) - zero[parts_.group == 0 ? 0 : column / parts_.group];
      }
      out[places[i]] = static_cast<int8_t>(level);
    }
  }
}

const int8_t* Weight::levels(size_t row, int8_t* scratch, const Isa& isa) const {
  if (direct()) return reinterpret_cast<const int8_t*>(parts_.codes.at(row * row_bytes_));
  unpack_row(row, scratch, isa);
  return scratch;
}

void Weight::unpack(size_t row, int8_t* scratch, float* out, const Isa& isa) const {
  const int8_t* found = levels(row, scratch, isa);
  for (const Segment& segment : segments_) {
    const float step = steps(segment.group)[row];
    for (size_t k = segment.begin; k < segment.end; ++k) out[k] = static_cast<float>(found[k]) * step;
  }
  if (!column_scale_.empty()) {
    for (size_t k = 0; k < parts_.columns; ++k) out[k] *= column_scale_[k];
  }
}

void Weight::compute_sums(const Isa& isa, int threads) {
  if (!sums_.empty()) return;
  const size_t rows = parts_.rows, block = 64;
  std::vector<int32_t> sums(segments_.size() * rows);
  std::vector<int8_t> scratch(scratch_bytes_ * static_cast<size_t>(std::max(threads, 1)));
  auto work = [&](size_t task, int worker) {
    int8_t* own = scratch.data() + scratch_bytes_ * static_cast<size_t>(worker);
    for (size_t row = task * block; row < std::min(rows, (task + 1) * block); ++row) {
      const int8_t* found = levels(row, own, isa);
      for (size_t s = 0; s < segments_.size(); ++s) {
        int32_t sum = 0;
        for (size_t k = segments_[s].begin; k < segments_[s].end; ++k) sum += found[k];
        sums[s * rows + row] = sum;
      }
    }
  };
  parallel(ceil_of(rows, block), threads, work);
  sums_ = std::move(sums);
}

}  // namespace usmlite
