#include "whisper.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "linear.hpp"
#include "threads.hpp"

namespace usmlite {
namespace {

// Rows whose feed-forward layer, four times as wide as the stream, stays in cache.
constexpr size_t kRowsOfFeed = 240;
constexpr float kLog2OfE = 1.44269504f;

void check(const Linear& linear, size_t columns, size_t rows) {
  if (linear.weight == nullptr || linear.weight->columns() != columns || linear.weight->rows() != rows) {
    throw std::invalid_argument("the shapes of the layers do not fit together");
  }
}

void check(const Norm& norm) {
  if (norm.weight == nullptr || norm.bias == nullptr || !(norm.epsilon >= 0.0f)) {
    throw std::invalid_argument("a norm without its numbers");
  }
}

void check(const AttentionBlock& block, size_t width) {
  check(block.norm);
  for (const Linear* linear : {&block.query, &block.key, &block.value, &block.out}) check(*linear, width, width);
}

void check(const FeedForward& feed, size_t width) {
  check(feed.norm);
  if (feed.up.weight == nullptr) throw std::invalid_argument("a layer without its weight");
  check(feed.up, width, feed.up.weight->rows());
  check(feed.down, feed.up.weight->rows(), width);
}

void check(size_t width, size_t heads) {
  if (width < 1 || heads < 1 || width % heads != 0) throw std::invalid_argument("no such number of heads");
}

// What all products of a call have in common.
struct Run {
  const Isa& isa;
  int threads;
  size_t width, count;
  Activations activations;

  void product(const Linear& linear, const float* x, float* y, size_t rows, Then then, Activations how) const {
    usmlite::linear(*linear.weight, x, rows, linear.weight->columns(), linear.bias, y, how, isa, threads, then);
  }
  void product(const Linear& linear, const float* x, float* y, Then then = Then::kNothing) const {
    product(linear, x, y, count, then, activations);
  }
  void normalize(const Norm& norm, const float* x, float* y, size_t rows) const {
    for (size_t i = 0; i < rows; ++i) {
      isa.normalize(x + i * width, norm.weight, norm.bias, width, norm.epsilon, y + i * width);
    }
  }
  // `normed` holds `count` rows; `wide` as many rows of the layer's width as threads, times rows_of_feed(). Each
  // thread takes rows through both products: threads that wait for each other often are slow on a busy machine.
  void feed(const FeedForward& layer, float* x, float* normed, float* wide) const {
    const size_t each = rows_of_feed(), chunks = (count + each - 1) / each;
    const Run alone{isa, chunks > 1 ? 1 : threads, width, count, activations};
    auto work = [&](size_t chunk, int worker) {
      const size_t first = chunk * each, rows = std::min(each, count - first);
      float* own = wide + static_cast<size_t>(worker) * each * layer.up.weight->rows();
      normalize(layer.norm, x + first * width, normed + first * width, rows);
      alone.product(layer.up, normed + first * width, own, rows, Then::kGelu, activations);
      alone.product(layer.down, own, x + first * width, rows, Then::kAdd, activations);
    };
    parallel(chunks, threads, work);
  }
  // As even as can be, so that no thread has a chunk more than another; at most kRowsOfFeed.
  size_t rows_of_feed() const {
    const size_t all = static_cast<size_t>(std::max(threads, 1));
    const size_t rounds = (count + all * kRowsOfFeed - 1) / (all * kRowsOfFeed);
    return count <= kRowsOfFeed ? count : (count + all * rounds - 1) / (all * rounds);
  }
  // Floats that `feed` wants for `wide`.
  size_t feed_floats(size_t widest) const {
    return count <= kRowsOfFeed ? count * widest : rows_of_feed() * static_cast<size_t>(std::max(threads, 1)) * widest;
  }
};

float scale_of(size_t width, size_t heads) { return 1.0f / std::sqrt(static_cast<float>(width / heads)); }

template <class Layer>
size_t widest(const std::vector<Layer>& layers) {
  size_t most = 0;
  for (const Layer& layer : layers) most = std::max(most, layer.feed.up.weight->rows());
  return most;
}

// Memory that nobody needs to have been zero.
std::unique_ptr<float[]> floats(size_t count) { return std::unique_ptr<float[]>(new float[count]); }

}  // namespace

Encoder::Encoder(std::vector<EncoderLayer> layers, Norm last, size_t width, size_t heads, const Isa& isa)
    : layers_(std::move(layers)), last_(last), width_(width), heads_(heads), isa_(isa) {
  check(width, heads);
  check(last);
  for (const EncoderLayer& layer : layers_) {
    check(layer.own, width);
    check(layer.feed, width);
  }
}

void Encoder::run(float* x, size_t count, int threads) const {
  if (count == 0) return;
  const Run run{isa_, threads, width_, count, Activations::kBytes};
  const size_t size = count * width_;
  // The feed-forward layer comes when queries and what else attention needed are gone.
  const auto memory = floats(std::max(4 * size, size + run.feed_floats(widest(layers_))));
  float *normed = memory.get(), *query = normed + size, *key = query + size, *value = key + size;
  // Rounding what the output layer is given would be most of the error: heads differ in size, and share a row. It and
  // that of the values are small.
  for (const EncoderLayer& layer : layers_) {
    run.normalize(layer.own.norm, x, normed, count);
    run.product(layer.own.query, normed, query);
    run.product(layer.own.key, normed, key);
    run.product(layer.own.value, normed, value, count, Then::kNothing, Activations::kPairs);
    {
      const KeysValues from(key, value, count, heads_, width_ / heads_, isa_, threads);
      const Attention job{&from, query, count, normed};
      attend(&job, 1, scale_of(width_, heads_), isa_, threads);
    }
    run.product(layer.own.out, normed, x, count, Then::kAdd, Activations::kPairs);
    run.feed(layer.feed, x, normed, query);
  }
  run.normalize(last_, x, x, count);
}

Decoder::Decoder(std::vector<DecoderLayer> layers, Norm last, size_t width, size_t heads, const Isa& isa)
    : layers_(std::move(layers)), last_(last), width_(width), heads_(heads), isa_(isa) {
  check(width, heads);
  check(last);
  for (const DecoderLayer& layer : layers_) {
    check(layer.own, width);
    check(layer.cross, width);
    check(layer.feed, width);
  }
}

void Decoder::hear(const float* encoded, size_t batch, size_t positions, int threads) {
  if (positions < 1) throw std::invalid_argument("nothing to hear");
  slots_.clear();
  length_ = 0;
  const Run run{isa_, threads, width_, positions, Activations::kBytes};
  const size_t size = positions * width_;
  const auto memory = floats(2 * size);
  std::vector<Slot> slots(batch);
  for (size_t i = 0; i < batch; ++i) {
    slots[i].keys.resize(layers_.size());
    slots[i].values.resize(layers_.size());
    for (const DecoderLayer& layer : layers_) {
      run.product(layer.cross.key, encoded + i * size, memory.get());
      run.product(layer.cross.value, encoded + i * size, memory.get() + size);
      slots[i].cross.push_back(std::make_shared<const KeysValues>(
          memory.get(), memory.get() + size, positions, heads_, width_ / heads_, isa_, threads));
    }
  }
  slots_ = std::move(slots);
}

void Decoder::step(float* x, size_t rows, size_t added, int threads) {
  if (rows > slots_.size()) throw std::invalid_argument("there are not so many sequences");
  if (rows == 0 || added == 0) return;
  slots_.resize(rows);
  // Reading the weights is what a step costs: what activations are rounded to costs next to nothing.
  const Run run{isa_, threads, width_, rows * added, Activations::kPairs};
  const size_t size = rows * added * width_;
  const auto memory = floats(std::max(4 * size, size + run.feed_floats(widest(layers_))));
  float *normed = memory.get(), *query = normed + size, *key = query + size, *value = key + size;
  for (size_t l = 0; l < layers_.size(); ++l) {
    const DecoderLayer& layer = layers_[l];
    run.normalize(layer.own.norm, x, normed, run.count);
    run.product(layer.own.query, normed, query);
    run.product(layer.own.key, normed, key);
    run.product(layer.own.value, normed, value);
    attend_own(l, query, key, value, added, normed, threads);
    run.product(layer.own.out, normed, x, Then::kAdd);

    run.normalize(layer.cross.norm, x, normed, run.count);
    run.product(layer.cross.query, normed, query);
    attend_cross(l, query, added, normed, threads);
    run.product(layer.cross.out, normed, x, Then::kAdd);

    run.feed(layer.feed, x, normed, query);
  }
  run.normalize(last_, x, x, run.count);
  length_ += added;
}

void Decoder::attend_own(size_t layer, const float* query, const float* keys, const float* values, size_t added,
                         float* out, int threads) {
  const size_t head_width = width_ / heads_, new_floats = added * width_;
  const float scale = scale_of(width_, heads_) * kLog2OfE;
  for (size_t s = 0; s < slots_.size(); ++s) {
    auto append = [&](std::vector<float>& cache, const float* more) {
      cache.resize(length_ * width_);  // what a step that was interrupted left is gone
      cache.insert(cache.end(), more + s * new_floats, more + (s + 1) * new_floats);
    };
    append(slots_[s].keys[layer], keys);
    append(slots_[s].values[layer], values);
  }
  const size_t longest = length_ + added;
  std::vector<float> scores(longest * static_cast<size_t>(std::max(threads, 1)));
  auto work = [&](size_t task, int worker) {
    const size_t s = task / heads_, head = task % heads_ * head_width;
    for (size_t i = 0; i < added; ++i) {
      const size_t at = (s * added + i) * width_ + head;
      isa_.attend_floats(query + at, scale, slots_[s].keys[layer].data() + head, slots_[s].values[layer].data() + head,
                         width_, length_ + i + 1, head_width, scores.data() + static_cast<size_t>(worker) * longest,
                         out + at);
    }
  };
  const double products = 2.0 * static_cast<double>(slots_.size() * added * longest * width_);
  parallel(slots_.size() * heads_, threads_for(products, threads), work);
}

void Decoder::attend_cross(size_t layer, const float* query, size_t added, float* out, int threads) {
  std::vector<Attention> jobs;
  for (size_t s = 0; s < slots_.size(); ++s) {
    const KeysValues* from = slots_[s].cross[layer].get();
    // Sequences of one window are neighbours mostly, and read its keys together.
    if (!jobs.empty() && jobs.back().from == from) {
      jobs.back().count += added;
    } else {
      jobs.push_back({from, query + s * added * width_, added, out + s * added * width_});
    }
  }
  attend(jobs.data(), jobs.size(), scale_of(width_, heads_), isa_, threads);
}

void Decoder::swap(size_t a, size_t b) { std::swap(slots_.at(a), slots_.at(b)); }

void Decoder::select(const size_t* rows, size_t count) {
  std::vector<size_t> uses(slots_.size());
  for (size_t i = 0; i < count; ++i) {
    if (rows[i] >= slots_.size()) throw std::out_of_range("there is no such sequence");
    ++uses[rows[i]];
  }
  std::vector<Slot> chosen;
  chosen.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    Slot& slot = slots_[rows[i]];
    if (--uses[rows[i]] == 0) {
      chosen.push_back(std::move(slot));
    } else {
      chosen.push_back(slot);
    }
  }
  slots_ = std::move(chosen);
}

}  // namespace usmlite
