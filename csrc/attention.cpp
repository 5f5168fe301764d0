#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "scratch.hpp"
#include "threads.hpp"

namespace usmlite {
namespace {

constexpr size_t kBlock = KeysValues::kBlock;
constexpr float kLog2OfE = 1.44269504f;
// Queries of one task.
constexpr size_t kChunk = 96;

size_t ceil_of(size_t a, size_t b) { return (a + b - 1) / b; }

// A scale for levels up to 127, and what turns numbers into them; both NaN and 0 where `reach` is NaN.
struct Scale {
  float step, inverse;
};

Scale scale_of(float reach) {
  const float step = reach / 127.0f, inverse = 1.0f / step;
  if (std::isfinite(inverse)) return {step, inverse};
  return {reach <= 1.0f ? 0.0f : std::numeric_limits<float>::quiet_NaN(), 0.0f};
}

int32_t sum_of(const int8_t* levels, size_t count) {
  int32_t sum = 0;
  for (size_t k = 0; k < count; ++k) sum += levels[k];
  return sum;
}

}  // namespace

KeysValues::KeysValues(const float* keys, const float* values, size_t count, size_t heads, size_t width,
                       const Isa& isa, int threads)
    : count_(count), heads_(heads), width_(width), isa_(isa) {
  if (count < 1 || heads < 1 || width < 1 || width > 4096) throw std::invalid_argument("impossible keys");
  key_panels_ = ceil_of(count, kRows);
  blocks_ = ceil_of(count, kBlock);
  parts_ = ceil_of(width, kRows);
  const size_t level = static_cast<size_t>(isa.level_bytes) * kRows;
  key_bytes_ = ceil_of(width, 4) * 4 * level;
  value_bytes_ = std::min(kBlock, ceil_of(count, 4) * 4) * level;
  head_bytes_ = key_panels_ * key_bytes_ + blocks_ * parts_ * value_bytes_;
  panels_.resize(heads * head_bytes_);
  key_scales_.resize(heads * key_panels_ * kRows);
  key_sums_.resize(key_scales_.size());
  value_scales_.resize(heads * blocks_ * parts_ * kRows);
  value_sums_.resize(value_scales_.size());
  auto work = [&](size_t head, int) { set(keys, values, head); };
  parallel(heads, threads_for(static_cast<double>(count * heads * width), threads), work);
}

void KeysValues::set(const float* keys, const float* values, size_t head) {
  thread_local Scratch scratch;
  // For keys a row each, for values a column each; and rows of floats.
  const size_t floats = rounded(3 * width_ * sizeof(float));
  char* memory = static_cast<char*>(scratch.get(floats + kBlock * width_ + kRows * width_));
  set_keys(keys + head * width_, head, reinterpret_cast<int8_t*>(memory));
  set_values(values + head * width_, head, reinterpret_cast<int8_t*>(memory));
}

void KeysValues::set_keys(const float* keys, size_t head, int8_t* memory) {
  const size_t stride = heads_ * width_;
  float* mean = reinterpret_cast<float*>(memory);
  float* row = mean + width_;
  float* inverses = row + width_;
  int8_t* levels = memory + rounded(3 * width_ * sizeof(float));
  std::fill(mean, mean + width_, 0.0f);
  for (size_t i = 0; i < count_; ++i) {
    for (size_t k = 0; k < width_; ++k) mean[k] += keys[i * stride + k];
  }
  for (size_t k = 0; k < width_; ++k) mean[k] /= static_cast<float>(count_);
  for (size_t panel = 0; panel < key_panels_; ++panel) {
    const int8_t* rows[kRows];
    const size_t there = std::min<size_t>(kRows, count_ - panel * kRows);
    for (size_t r = 0; r < there; ++r) {
      const float* key = keys + (panel * kRows + r) * stride;
      for (size_t k = 0; k < width_; ++k) row[k] = key[k] - mean[k];
      const Scale scale = scale_of(isa_.reach(row, width_));
      std::fill(inverses, inverses + width_, scale.inverse);
      isa_.round_levels(row, inverses, width_, levels + r * width_);
      rows[r] = levels + r * width_;
      const size_t at = (head * key_panels_ + panel) * kRows + r;
      key_scales_[at] = scale.step;
      key_sums_[at] = sum_of(rows[r], width_);
    }
    for (size_t r = there; r < kRows; ++r) rows[r] = rows[there - 1];
    isa_.pack(rows, width_, panels_.data() + key_panel(head, panel));
  }
}

void KeysValues::set_values(const float* values, size_t head, int8_t* memory) {
  const size_t stride = heads_ * width_;
  float* reach = reinterpret_cast<float*>(memory);
  float* inverses = reach + width_;
  int8_t* row = memory + rounded(3 * width_ * sizeof(float));
  int8_t* columns = row + width_;  // [width][kBlock]
  for (size_t block = 0; block < blocks_; ++block) {
    const size_t first = block * kBlock, there = std::min(kBlock, count_ - first);
    std::fill(reach, reach + width_, 0.0f);
    for (size_t i = first; i < first + there; ++i) {
      for (size_t k = 0; k < width_; ++k) {
        const float size = std::fabs(values[i * stride + k]);
        reach[k] = size <= reach[k] ? reach[k] : size;  // and a NaN stays, until a number comes
      }
    }
    const size_t at = (head * blocks_ + block) * parts_ * kRows;
    for (size_t k = 0; k < width_; ++k) {
      const Scale scale = scale_of(reach[k]);
      value_scales_[at + k] = scale.step;
      inverses[k] = scale.inverse;
    }
    for (size_t i = 0; i < there; ++i) {
      const float* value = values + (first + i) * stride;
      isa_.round_levels(value, inverses, width_, row);
      for (size_t k = 0; k < width_; ++k) columns[k * kBlock + i] = row[k];
      // Not finite, in the values or the keys: so is all that is made of them.
      const float key = key_scales_[head * key_panels_ * kRows + first + i];
      if (!(isa_.reach(value, width_) + key <= std::numeric_limits<float>::max())) {
        std::fill_n(value_scales_.begin() + static_cast<std::ptrdiff_t>(at), width_, std::numeric_limits<float>::quiet_NaN());
      }
    }
    for (size_t part = 0; part < parts_; ++part) {
      const int8_t* rows[kRows];
      for (size_t r = 0; r < kRows; ++r) {
        const size_t column = std::min(part * kRows + r, width_ - 1);
        rows[r] = columns + column * kBlock;
        value_sums_[at + part * kRows + r] = sum_of(rows[r], there);
      }
      isa_.pack(rows, there, panels_.data() + value_panel(head, block, part));
    }
  }
}

// Some queries of one head, side by side.
class Tile {
 public:
  Tile(const KeysValues& from, size_t head, float scale, const Isa& isa)
      : from_(from), head_(head), scale_(scale * kLog2OfE), isa_(isa),
        stride_(rounded(from.width() + kPad)) {
    thread_local Scratch scratch;
    const size_t block = static_cast<size_t>(isa.block);
    char* memory = static_cast<char*>(
        scratch.get(block * (stride_ + kWeights + kBlock * sizeof(float) + kRows * sizeof(int32_t)) +
                    rounded(block * from.width() * sizeof(float))));
    scores_ = reinterpret_cast<float*>(memory);
    sums_ = reinterpret_cast<int32_t*>(scores_ + block * kBlock);
    codes_ = reinterpret_cast<uint8_t*>(sums_ + block * kRows);
    weights_ = codes_ + block * stride_;
    found_ = reinterpret_cast<float*>(weights_ + block * kWeights);
    std::memset(weights_, 0, block * kWeights);
  }

  // Queries first .. first + count, at most isa.block of them.
  void compute(const Attention& job, size_t first, int count) {
    const size_t width = from_.width_, row = from_.heads_ * width;
    count_ = count;
    for (int c = 0; c < count; ++c) {
      const float* query = job.queries + (first + static_cast<size_t>(c)) * row + head_ * width;
      uint8_t* codes = codes_ + static_cast<size_t>(c) * stride_;
      isa_.quantize(query, nullptr, width, codes, scales_ + c, zeros_ + c);
      std::memset(codes + width, 0, stride_ - width);
      scales_[c] *= scale_;
      top_[c] = -std::numeric_limits<float>::max();
      total_[c] = 0.0f;
    }
    std::fill(found_, found_ + static_cast<size_t>(count) * width, 0.0f);
    for (size_t block = 0; block < from_.blocks_; ++block) add(block);
    for (int c = 0; c < count; ++c) {
      const float* found = found_ + static_cast<size_t>(c) * width;
      float* out = job.out + (first + static_cast<size_t>(c)) * row + head_ * width;
      for (size_t k = 0; k < width; ++k) out[k] = found[k] / total_[c];
    }
  }

 private:
  static constexpr size_t kWeights = kBlock + kPad;  // bytes from one query's weights to the next's

  void add(size_t block) {
    const size_t width = from_.width_, first = block * kBlock, there = std::min(kBlock, from_.count_ - first);
    for (size_t k = 0; k < there; k += kRows) {
      const size_t panel = (first + k) / kRows, at = (head_ * from_.key_panels_ + panel) * kRows;
      isa_.multiply(from_.panels_.data() + from_.key_panel(head_, panel), codes_, stride_, count_, width, sums_);
      isa_.finish(sums_, count_, static_cast<int>(std::min<size_t>(kRows, there - k)), scales_, zeros_,
                  from_.key_scales_.data() + at, from_.key_sums_.data() + at, nullptr, false, scores_ + k, kBlock);
    }
    float shares[kMostBlock];
    const int32_t zeros[kMostBlock] = {};
    for (int c = 0; c < count_; ++c) shares[c] = weigh(c, there);
    for (size_t part = 0; part < from_.parts_; ++part) {
      const size_t at = ((head_ * from_.blocks_ + block) * from_.parts_ + part) * kRows;
      isa_.multiply(from_.panels_.data() + from_.value_panel(head_, block, part), weights_, kWeights, count_, there,
                    sums_);
      isa_.finish(sums_, count_, static_cast<int>(std::min<size_t>(kRows, width - part * kRows)), shares, zeros,
                  from_.value_scales_.data() + at, from_.value_sums_.data() + at, nullptr, true,
                  found_ + part * kRows, width);
    }
  }

  // Turns the scores of a query into weights, which are relative to the block's largest; returns by what they are to
  // be multiplied to be relative to the largest so far, which everything found before is then, too.
  float weigh(int c, size_t count) {
    int32_t sum;
    const float top = isa_.weigh(scores_ + static_cast<size_t>(c) * kBlock, count,
                                 weights_ + static_cast<size_t>(c) * kWeights, &sum);
    float share = 1.0f;
    if (top > top_[c]) {
      const float before = std::exp2(top_[c] - top);
      float* found = found_ + static_cast<size_t>(c) * from_.width_;
      for (size_t k = 0; k < from_.width_; ++k) found[k] *= before;
      total_[c] *= before;
      top_[c] = top;
    } else {
      share = std::exp2(top - top_[c]);
    }
    total_[c] += share * static_cast<float>(sum);
    return share;
  }

  const KeysValues& from_;
  size_t head_;
  float scale_;
  const Isa& isa_;
  size_t stride_;
  int count_ = 0;
  float *scores_, *found_;
  int32_t* sums_;
  uint8_t *codes_, *weights_;
  float scales_[kMostBlock], top_[kMostBlock], total_[kMostBlock];
  int32_t zeros_[kMostBlock];
};

void attend(const Attention* jobs, size_t count, float scale, const Isa& isa, int threads) {
  struct Task {
    const Attention* job;
    size_t head, first;
  };
  std::vector<Task> tasks;
  double products = 0.0;
  for (const Attention* job = jobs; job != jobs + count; ++job) {
    const KeysValues& from = *job->from;
    products += 2.0 * static_cast<double>(job->count) * static_cast<double>(from.count() * from.heads() * from.width());
    for (size_t head = 0; head < from.heads(); ++head) {
      for (size_t first = 0; first < job->count; first += kChunk) tasks.push_back({job, head, first});
    }
  }
  auto work = [&](size_t index, int) {
    const Task& task = tasks[index];
    Tile tile(*task.job->from, task.head, scale, isa);
    const size_t end = std::min(task.job->count, task.first + kChunk), step = static_cast<size_t>(isa.block);
    for (size_t i = task.first; i < end; i += step) {
      tile.compute(*task.job, i, static_cast<int>(std::min(step, end - i)));
    }
  };
  // A token's attention to the speech is over before another thread is awake on a busy machine: ten times as much is
  // worth it.
  parallel(tasks.size(), threads_for(products / 10.0, threads), work);
}

}  // namespace usmlite
