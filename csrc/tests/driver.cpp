// Everything that the library does, on random and hostile input, for AddressSanitizer and UBSan: every array has
// exactly its size on the heap, so that a byte too far is noticed. Also compares all paths with plain sums.
//
// usage: usmlite_driver [SECONDS [SEED]]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "attention.hpp"
#include "isa.hpp"
#include "linear.hpp"
#include "rans.hpp"
#include "threads.hpp"
#include "trellis.hpp"
#include "weight.hpp"
#include "whisper.hpp"

namespace {

using namespace usmlite;

std::mt19937_64 generator;

size_t below(size_t stop) { return generator() % stop; }
size_t between(size_t low, size_t high) { return low + below(high - low + 1); }

// Memory of exactly so many bytes, filled at random.
struct Buffer {
  std::unique_ptr<uint8_t[]> data;
  size_t size;

  explicit Buffer(size_t bytes) : data(new uint8_t[bytes]), size(bytes) {
    for (size_t i = 0; i < bytes; ++i) data[i] = static_cast<uint8_t>(generator());
  }
  Bytes bytes() const { return {size == 0 ? nullptr : data.get(), size}; }
};

struct Floats {
  std::unique_ptr<float[]> data;
  size_t count;

  Floats(size_t numbers, float low, float high) : data(new float[numbers]), count(numbers) {
    std::uniform_real_distribution<float> draw(low, high);
    for (size_t i = 0; i < numbers; ++i) data[i] = draw(generator);
  }
  Bytes bytes() const { return {count == 0 ? nullptr : data.get(), count * sizeof(float)}; }
};

void fail(const char* what) {
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(1);
}

size_t ceil_of(size_t a, size_t b) { return (a + b - 1) / b; }

uint64_t patterns_of(int n, int m) {
  uint64_t out = 1;
  for (int i = 1; i <= n; ++i) out = out * static_cast<uint64_t>(m - n + i) / static_cast<uint64_t>(i);
  return out;
}

// A layout as docs/format.md chooses it is not needed here: any that fits into a word will do.
Pattern any_pattern() {
  Pattern pattern;
  if (below(2) == 0) return pattern;
  pattern.m = static_cast<int>(between(2, 32));
  pattern.n = static_cast<int>(between(1, static_cast<size_t>(pattern.m) - 1));
  pattern.word_bytes = 1 << below(4);
  pattern.digits = static_cast<int>(between(1, 3));
  if (below(3) == 0) {
    pattern = Pattern();
    pattern.n = 2;
    pattern.m = 4;
    pattern.word_bytes = 1;
    pattern.digits = 3;
  }
  return pattern;
}

void check_product() {
  Parts parts;
  parts.rows = between(1, 80);
  parts.columns = between(1, 300);
  parts.group = below(3) == 0 ? between(1, parts.columns) : 0;
  parts.bits = static_cast<int>(below(9));
  const size_t groups = parts.group == 0 ? 1 : ceil_of(parts.columns, parts.group);
  size_t stored = parts.columns, pattern_bytes = 0;
  bool zeros = false;
  if (parts.bits > 0) {
    parts.pattern = any_pattern();
    if (parts.pattern.n != 0) {
      const size_t m_groups = ceil_of(parts.columns, static_cast<size_t>(parts.pattern.m));
      stored = m_groups * static_cast<size_t>(parts.pattern.n);
      pattern_bytes = ceil_of(m_groups, static_cast<size_t>(parts.pattern.digits)) *
                      static_cast<size_t>(parts.pattern.word_bytes);
    }
    zeros = parts.bits < 8 && below(3) == 0;
    parts.doubled_offset = parts.bits < 8 && below(2) == 0 ? (1 << parts.bits) - 1 : 1 << parts.bits;
  }
  const size_t row_bytes = parts.bits == 0 ? parts.columns : ceil_of(stored * static_cast<size_t>(parts.bits), 8);
  const Buffer codes(parts.rows * row_bytes), patterns(parts.rows * pattern_bytes);
  Buffer zero(zeros ? parts.rows * groups : 0);
  for (size_t i = 0; i < zero.size; ++i) zero.data[i] = static_cast<uint8_t>(zero.data[i] % (1 << parts.bits));
  const Floats scale(parts.rows * groups, 0.001f, 0.1f), column_scale(below(2) == 0 ? parts.columns : 0, 0.5f, 2.0f);
  parts.codes = codes.bytes();
  parts.patterns = patterns.bytes();
  parts.zero = zero.bytes();
  parts.scale = scale.bytes();
  parts.column_scale = column_scale.bytes();
  Weight weight(parts);

  const size_t count = between(1, 60), stride = below(3) == 0 ? between(1, parts.columns) : parts.columns;
  Floats x((count - 1) * stride + parts.columns, -3.0f, 3.0f);
  const Floats bias(parts.rows, -1.0f, 1.0f);
  std::vector<int64_t> ids(parts.rows);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i);

  std::vector<float> dense;
  std::vector<float> whole;
  const Activations rounded = below(2) == 0 ? Activations::kBytes : Activations::kPairs;
  for (const Isa* const* isa = available_isas(); *isa != nullptr; ++isa) {
    Floats all(parts.rows * parts.columns, 0.0f, 0.0f), out(count * parts.rows, 0.0f, 0.0f);
    const int threads = static_cast<int>(between(1, 4));
    gather(weight, ids.data(), ids.size(), all.data.get(), **isa, threads);
    Buffer levels(parts.rows * parts.columns);
    expand(weight, reinterpret_cast<int8_t*>(levels.data.get()), **isa, threads);
    std::vector<float> found(all.data.get(), all.data.get() + all.count);
    if (dense.empty()) dense = found;
    if (dense != found) fail("paths unpack differently");
    linear(weight, x.data.get(), count, stride, bias.data.get(), out.data.get(), Activations::kFloats, **isa, threads);
    for (size_t i = 0; i < count; ++i) {
      for (size_t r = 0; r < parts.rows; ++r) {
        double sum = bias.data[r], size = 1.0;
        for (size_t k = 0; k < parts.columns; ++k) {
          const double term = static_cast<double>(dense[r * parts.columns + k]) * static_cast<double>(x.data[i * stride + k]);
          sum += term;
          size += std::fabs(term);
        }
        if (!(std::fabs(static_cast<double>(out.data[i * parts.rows + r]) - sum) <= 1e-5 * size)) fail("a product is wrong");
      }
    }
    weight.compute_sums(**isa, threads);
    linear(weight, x.data.get(), count, stride, nullptr, out.data.get(), rounded, **isa, threads);
    found.assign(out.data.get(), out.data.get() + out.count);
    if (whole.empty()) whole = found;
    if (whole != found) fail("paths multiply whole numbers differently");
    // Nothing that activations hold may lead anywhere else.
    Floats wild((count - 1) * stride + parts.columns, 0.0f, 0.0f);
    for (size_t i = 0; i < wild.count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(generator());
      std::memcpy(wild.data.get() + i, &bits, sizeof(bits));
    }
    for (const Activations how : {Activations::kBytes, Activations::kPairs}) {
      linear(weight, wild.data.get(), count, stride, nullptr, out.data.get(), how, **isa, threads);
    }
  }
}

// One thing is changed: the constructor must refuse it, or it did not matter.
void check_refusal() {
  const size_t rows = between(1, 9), columns = between(1, 70);
  const int bits = static_cast<int>(between(1, 8));
  const Buffer codes(rows * ceil_of(columns * static_cast<size_t>(bits), 8));
  const Floats scale(rows, 0.1f, 1.0f);
  Parts parts;
  parts.rows = rows;
  parts.columns = columns;
  parts.bits = bits;
  parts.doubled_offset = 1 << bits;
  parts.codes = codes.bytes();
  parts.scale = scale.bytes();
  switch (below(9)) {
    case 0: parts.rows = static_cast<size_t>(generator()); break;
    case 1: parts.columns = static_cast<size_t>(generator()); break;
    case 2: parts.bits = static_cast<int>(generator()); break;
    case 3: parts.doubled_offset = static_cast<int>(generator()); break;
    case 4: parts.group = static_cast<size_t>(generator()); break;
    case 5: parts.codes.size -= 1; break;
    case 6: parts.scale.size += 4; break;
    case 7: parts.pattern.n = static_cast<int>(generator()); break;
    default: parts.rows += 1;
  }
  try {
    const Weight weight(parts);
    std::vector<float> out(columns);
    const int64_t id = 0;
    gather(weight, &id, 1, out.data(), *best_isa(), 1);
  } catch (const std::invalid_argument&) {
  }
}

void check_rans() {
  Coded coded;
  const int trellises[] = {0, 0, 0, 4, 8, 16, 32, 7};
  coded.states = trellises[below(8)];
  coded.bits = coded.states != 0 && below(8) != 0 ? 7 : static_cast<int>(between(1, 8));
  coded.tables = static_cast<int>(between(1, 64));
  coded.lowest = static_cast<int>(below(256));
  coded.rows = below(60);
  coded.columns = below(60);
  const Buffer rows(coded.rows), columns(coded.columns);
  coded.row_levels = rows.data.get();
  coded.column_levels = columns.data.get();
  const size_t symbols = size_t{1} << coded.bits;
  const size_t tables = static_cast<size_t>(coded.tables) * (coded.states == 0 ? 1 : 2);
  const Buffer frequencies(2 * symbols * tables);
  uint16_t* at = reinterpret_cast<uint16_t*>(frequencies.data.get());
  // Most of them add up: only then is there anything to decode.
  if (below(4) != 0) {
    for (size_t i = 0; i < symbols * tables; i += symbols) {
      size_t left = 4096;
      for (size_t symbol = 0; symbol < symbols; ++symbol) {
        const size_t frequency = symbol + 1 == symbols ? left : below(left + 1);
        left -= frequency;
        at[i + symbol] = static_cast<uint16_t>(frequency);
      }
    }
  }
  coded.frequencies = at;
  const size_t lanes = static_cast<size_t>(rans_lanes(coded.rows * coded.columns));
  const Buffer stream(below(2) == 0 ? below(4 * lanes + 4000) : 4 * lanes + 2 * below(2000));
  coded.stream = stream.data.get();
  coded.stream_bytes = stream.size;
  Buffer out(coded.rows * coded.columns), other(out.size);
  std::fill_n(out.data.get(), out.size, uint8_t{0});
  const auto decode = [&](const Isa* isa, Buffer& to) {
    try {
      rans_decode(coded, to.data.get(), isa);
      return true;
    } catch (const std::invalid_argument&) {
      return false;
    }
  };
  const bool whole = decode(find_isa("portable"), out);
  for (const Isa* const* isa = available_isas(); *isa != nullptr; ++isa) {
    std::fill_n(other.data.get(), other.size, uint8_t{0});
    if (decode(*isa, other) != whole || !std::equal(out.data.get(), out.data.get() + out.size, other.data.get())) {
      fail("paths decode codes differently");
    }
  }
}

// Now and then any bits at all, which must lead nowhere else.
void make_wild(Floats& numbers) {
  for (size_t i = 0; i < numbers.count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(generator());
    std::memcpy(numbers.data.get() + i, &bits, sizeof(bits));
  }
}

void check_trellis() {
  TrellisSearch job;
  job.states = 4 << below(4);
  job.count = below(4);
  job.rows = below(2) == 0 ? below(60) : 4090 + below(20);
  job.table_count = below(4);
  Floats steps(job.count * job.rows, -150.0f, 150.0f), costs(job.count, 0.0f, 4.0f);
  Floats bits(job.table_count * 2 * kSymbols, 0.0f, 9.0f);
  if (below(3) == 0) {
    for (Floats* each : {&steps, &costs, &bits}) {
      if (below(2) == 0) make_wild(*each);
    }
  }
  Buffer tables(job.count * job.rows), out(job.count * job.rows);
  for (size_t i = 0; i < tables.size; ++i) tables.data[i] %= static_cast<uint8_t>(job.table_count + (below(9999) == 0) + 1);
  if (job.table_count != 0 && below(4) != 0) {
    for (size_t i = 0; i < tables.size; ++i) tables.data[i] %= static_cast<uint8_t>(job.table_count);
  }
  job.steps = steps.data.get();
  job.costs = costs.data.get();
  job.bits = bits.data.get();
  job.tables = tables.data.get();
  job.out = out.data.get();
  try {
    trellis_search(job);
  } catch (const std::invalid_argument&) {
    return;
  }
  // What was found follows the trellis.
  for (size_t column = 0; column < job.count; ++column) {
    int state = 0;
    for (size_t row = 0; row < job.rows; ++row) {
      if (row % kTrellisRows == 0) state = 0;
      const int value = job.out[column * job.rows + row] - 128, quantizer = state & 1;
      if (value != 0 && (value & 1) != quantizer) fail("a code beside its trellis");
      const int index = (value + quantizer * ((value > 0) - (value < 0))) / 2;
      state = next_state(job.states, state, index & 1);
    }
  }
}

bool same(const std::vector<float>& a, const Floats& b) {
  return a.empty() || std::memcmp(a.data(), b.data.get(), b.count * sizeof(float)) == 0;
}

void check_attention() {
  const size_t count = between(1, 40), positions = between(1, 600), heads = between(1, 3), width = between(1, 70);
  const size_t row = heads * width;
  Floats query(count * row, -3.0f, 3.0f), key(positions * row, -1.0f, 1.0f), value(positions * row, -2.0f, 2.0f);
  const bool wild = below(4) == 0;
  if (wild) {
    for (Floats* each : {&query, &key, &value}) {
      if (below(2) == 0) make_wild(*each);
    }
  }
  std::vector<float> first;
  for (const Isa* const* isa = available_isas(); *isa != nullptr; ++isa) {
    Floats out(count * row, 0.0f, 0.0f);
    const int threads = static_cast<int>(between(1, 4));
    const KeysValues from(key.data.get(), value.data.get(), positions, heads, width, **isa, threads);
    const Attention job{&from, query.data.get(), count, out.data.get()};
    attend(&job, 1, 0.3f, **isa, threads);
    if (wild) continue;
    if (!same(first, out)) fail("paths attend differently");
    first.assign(out.data.get(), out.data.get() + out.count);
    for (size_t i = 0; i < out.count; ++i) {
      // Weighed means of what lies between -2 and 2.
      if (!(std::fabs(out.data[i]) <= 2.02f)) fail("attention left the range of the values");
    }
  }
  for (const Isa* const* isa = available_isas(); *isa != nullptr; ++isa) {
    Floats x(row, -5.0f, 5.0f), y(row, 0.0f, 0.0f), scores(positions, 0.0f, 0.0f);
    if (wild) make_wild(x);
    (*isa)->gelu(x.data.get(), row, y.data.get());
    (*isa)->normalize(x.data.get(), x.data.get(), y.data.get(), row, 1e-5f, y.data.get());
    (*isa)->attend_floats(query.data.get(), 0.3f, key.data.get(), value.data.get(), row, positions, width,
                          scores.data.get(), y.data.get());
  }
}

// Weights of whole layers, with all that they refer to.
struct Layers {
  std::vector<std::unique_ptr<Buffer>> levels;
  std::vector<std::unique_ptr<Floats>> numbers;
  std::vector<std::unique_ptr<Weight>> weights;

  const float* floats(size_t count, float low, float high) {
    numbers.push_back(std::make_unique<Floats>(count, low, high));
    return numbers.back()->data.get();
  }
  Norm norm(size_t width) { return {floats(width, 0.5f, 1.5f), floats(width, -0.1f, 0.1f), 1e-5f}; }
  Linear linear(size_t rows, size_t columns) {
    levels.push_back(std::make_unique<Buffer>(rows * columns));
    Parts parts;
    parts.rows = rows;
    parts.columns = columns;
    parts.codes = levels.back()->bytes();
    floats(rows, 0.0001f, 0.001f);
    parts.scale = numbers.back()->bytes();
    weights.push_back(std::make_unique<Weight>(parts));
    weights.back()->compute_sums(*best_isa(), 1);
    return {weights.back().get(), below(2) == 0 ? nullptr : floats(rows, -0.1f, 0.1f)};
  }
  AttentionBlock attention(size_t width) {
    return {norm(width), linear(width, width), linear(width, width), linear(width, width), linear(width, width)};
  }
  FeedForward feed(size_t width, size_t wide) { return {norm(width), linear(wide, width), linear(width, wide)}; }
};

void check_layers() {
  Layers layers;
  const size_t heads = between(1, 3), width = heads * between(1, 20), wide = between(1, 60), batch = between(1, 3);
  const size_t positions = between(1, 300);
  std::vector<EncoderLayer> encoding{{layers.attention(width), layers.feed(width, wide)}};
  std::vector<DecoderLayer> decoding{{layers.attention(width), layers.attention(width), layers.feed(width, wide)}};
  const Norm last = layers.norm(width);
  Floats audio(batch * positions * width, -2.0f, 2.0f);
  if (below(4) == 0) make_wild(audio);
  std::vector<std::pair<size_t, size_t>> steps;
  for (size_t rows = batch; rows > 0 && steps.size() < 4; rows -= below(2)) steps.push_back({rows, between(1, 5)});
  const Floats text(batch * 5 * width, -2.0f, 2.0f);
  const size_t swapped = below(batch);
  std::vector<std::vector<float>> found;
  for (const Isa* const* isa = available_isas(); *isa != nullptr; ++isa) {
    const int threads = static_cast<int>(between(1, 4));
    Floats x(audio.count, 0.0f, 0.0f);
    std::copy_n(audio.data.get(), audio.count, x.data.get());
    const Encoder encoder(encoding, last, width, heads, **isa);
    for (size_t i = 0; i < batch; ++i) encoder.run(x.data.get() + i * positions * width, positions, threads);
    Decoder decoder(decoding, last, width, heads, **isa);
    decoder.hear(x.data.get(), batch, positions, threads);
    if (found.empty()) found.resize(steps.size());
    for (size_t i = 0; i < steps.size(); ++i) {
      Floats rows(steps[i].first * steps[i].second * width, 0.0f, 0.0f);
      std::copy_n(text.data.get(), rows.count, rows.data.get());
      decoder.step(rows.data.get(), steps[i].first, steps[i].second, threads);
      if (!same(found[i], rows)) fail("paths decode differently");
      found[i].assign(rows.data.get(), rows.data.get() + rows.count);
      if (i == 0) decoder.swap(0, std::min(swapped, decoder.slots() - 1));
    }
    const std::vector<size_t> chosen(between(1, 4), below(decoder.slots()));
    decoder.select(chosen.data(), chosen.size());
    const size_t beyond = decoder.slots();
    try {
      decoder.select(&beyond, 1);
      fail("a sequence that is not there was selected");
    } catch (const std::out_of_range&) {
    }
  }
  try {
    const Decoder wrong(decoding, last, width + 1, 1, *best_isa());
    fail("layers that do not fit were taken");
  } catch (const std::invalid_argument&) {
  }
}

void check_threads() {
  const size_t tasks = below(200);
  const int threads = static_cast<int>(between(1, 8));
  std::vector<int> done(tasks);
  auto work = [&](size_t task, int worker) {
    if (worker < 0 || worker >= threads) fail("a worker out of range");
    done[task] += 1;
  };
  parallel(tasks, threads, work);
  for (int times : done) {
    if (times != 1) fail("a task was not done once");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 20.0;
  generator.seed(count > 2 ? static_cast<uint64_t>(std::atoll(arguments[2])) : 0);
  const auto start = std::chrono::steady_clock::now();
  size_t rounds = 0;
  do {
    check_product();
    check_refusal();
    check_rans();
    check_trellis();
    check_attention();
    check_layers();
    check_threads();
    ++rounds;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("%zu rounds, best path %s, threads: %s\n", rounds, best_isa()->name, thread_source());
}
