// Attention in whole numbers: keys and values of a byte each, queries and the weights of the softmax too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "isa.hpp"

namespace usmlite {

// Keys and values of one sequence, in the order in which the inner loops read them.
//
// The mean of all keys is taken away first, which changes no softmax: keys have a few large numbers in common. Then
// each key has a scale of its own, and each column of the values one for every kBlock of them.
class KeysValues {
 public:
  static constexpr size_t kBlock = 256;

  // keys, values: float32 [count][heads * width]; count, heads and width at least 1, width at most 4096 (throws
  // std::invalid_argument).
  KeysValues(const float* keys, const float* values, size_t count, size_t heads, size_t width, const Isa& isa,
             int threads);

  size_t count() const { return count_; }
  size_t heads() const { return heads_; }
  size_t width() const { return width_; }
  size_t bytes() const { return panels_.size(); }

 private:
  friend class Tile;
  void set(const float* keys, const float* values, size_t head);
  void set_keys(const float* keys, size_t head, int8_t* levels);
  void set_values(const float* values, size_t head, int8_t* levels);

  // Where a panel of 32 keys begins in panels_, or one of 32 columns of a block of values.
  size_t key_panel(size_t head, size_t panel) const { return head * head_bytes_ + panel * key_bytes_; }
  size_t value_panel(size_t head, size_t block, size_t part) const {
    return head * head_bytes_ + key_panels_ * key_bytes_ + (block * parts_ + part) * value_bytes_;
  }

  size_t count_, heads_, width_;
  const Isa& isa_;
  size_t key_panels_, blocks_, parts_, key_bytes_, value_bytes_, head_bytes_;
  std::vector<char> panels_;
  // [heads][key_panels_ * kRows] and [heads][blocks_][parts_ * kRows]: scales, and sums of levels.
  std::vector<float> key_scales_, value_scales_;
  std::vector<int32_t> key_sums_, value_sums_;
};

// Row i of out [count][heads * width] = values weighed by the softmax of scale * (row i of queries . keys), head by head.
// A query that is not finite, or keys or values that are not, give NaN.
struct Attention {
  const KeysValues* from;
  const float* queries;
  size_t count;
  float* out;
};
void attend(const Attention* jobs, size_t count, float scale, const Isa& isa, int threads);

}  // namespace usmlite
