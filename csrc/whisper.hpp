// The layers of a Whisper model, each side in one call: what lies between the products costs little here.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "attention.hpp"
#include "isa.hpp"
#include "weight.hpp"

namespace usmlite {

// These refer to somebody else's memory. All products are of whole numbers: Weight::compute_sums has been called.
struct Linear {
  const Weight* weight = nullptr;
  const float* bias = nullptr;  // [weight->rows()], or null
};

struct Norm {
  const float* weight = nullptr;  // [width of the stream]
  const float* bias = nullptr;
  float epsilon = 1e-5f;
};

// With the norm before it.
struct AttentionBlock {
  Norm norm;
  Linear query, key, value, out;
};

struct FeedForward {
  Norm norm;
  Linear up, down;
};

struct EncoderLayer {
  AttentionBlock own;
  FeedForward feed;
};

struct DecoderLayer {
  AttentionBlock own, cross;
  FeedForward feed;
};

// Compares all shapes; throws std::invalid_argument. The width of the stream is that of the last norm, `width`.
class Encoder {
 public:
  Encoder(std::vector<EncoderLayer> layers, Norm last, size_t width, size_t heads, const Isa& isa);

  size_t width() const { return width_; }
  // x: float32 [count][width], overwritten with what comes out of the last norm.
  void run(float* x, size_t count, int threads) const;

 private:
  std::vector<EncoderLayer> layers_;
  Norm last_;
  size_t width_, heads_;
  const Isa& isa_;
};

// A decoder with its caches, for several sequences side by side, all of the same length.
class Decoder {
 public:
  Decoder(std::vector<DecoderLayer> layers, Norm last, size_t width, size_t heads, const Isa& isa);

  size_t width() const { return width_; }
  size_t slots() const { return slots_.size(); }
  size_t length() const { return length_; }

  // Starts anew with one sequence for each of `batch` windows; encoded: float32 [batch][positions][width].
  void hear(const float* encoded, size_t batch, size_t positions, int threads);
  // Appends `added` tokens to each of the first `rows` sequences; x: float32 [rows][added][width], embeddings that
  // are overwritten with what comes out of the last norm. The others must not be used again.
  void step(float* x, size_t rows, size_t added, int threads);
  // The two change places. Throws std::out_of_range, as the next.
  void swap(size_t a, size_t b);
  // Sequence i becomes what sequence rows[i] was.
  void select(const size_t* rows, size_t count);

 private:
  struct Slot {
    std::vector<std::shared_ptr<const KeysValues>> cross;  // a layer each
    std::vector<std::vector<float>> keys, values;          // [length][width]
  };
  void attend_own(size_t layer, const float* query, const float* keys, const float* values, size_t added, float* out,
                  int threads);
  void attend_cross(size_t layer, const float* query, size_t added, float* out, int threads);

  std::vector<DecoderLayer> layers_;
  Norm last_;
  size_t width_, heads_;
  const Isa& isa_;
  size_t length_ = 0;
  std::vector<Slot> slots_;
};

}  // namespace usmlite
