// What Python sees of the library. Addresses come as numbers: `usmlite.kernels.native` has looked at the tensors that
// they belong to, and the sizes that come with them are checked here once more.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "isa.hpp"
#include "linear.hpp"
#include "rans.hpp"
#include "threads.hpp"
#include "trellis.hpp"
#include "weight.hpp"
#include "whisper.hpp"

namespace nb = nanobind;
using usmlite::Bytes;
using usmlite::Isa;
using usmlite::Weight;

namespace {

using Memory = std::pair<uintptr_t, size_t>;  // address and bytes

template <class T>
T* numbers(const Memory& memory, size_t count, const char* what) {
  if (memory.second / sizeof(T) < count || (memory.first == 0 && count != 0)) throw std::invalid_argument(what);
  return reinterpret_cast<T*>(memory.first);
}

Bytes bytes(const Memory& memory) {
  if (memory.first == 0 && memory.second != 0) throw std::invalid_argument("memory without an address");
  return {reinterpret_cast<const void*>(memory.first), memory.second};
}

const Isa& isa_of(size_t path) {
  const Isa* const* isas = usmlite::available_isas();
  for (size_t i = 0; isas[i] != nullptr; ++i) {
    if (i == path) return *isas[i];
  }
  throw std::invalid_argument("there is no such path");
}

size_t product(size_t a, size_t b) {
  if (b != 0 && a > SIZE_MAX / b) throw std::invalid_argument("sizes are too large");
  return a * b;
}

Weight make_weight(size_t rows, size_t columns, size_t group, int bits, int doubled_offset,
                   std::tuple<int, int, int, int> pattern, Memory codes, Memory scale, Memory zero, Memory patterns,
                   Memory column_scale) {
  usmlite::Parts parts;
  parts.rows = rows;
  parts.columns = columns;
  parts.group = group;
  parts.bits = bits;
  parts.doubled_offset = doubled_offset;
  std::tie(parts.pattern.n, parts.pattern.m, parts.pattern.word_bytes, parts.pattern.digits) = pattern;
  parts.codes = bytes(codes);
  parts.scale = bytes(scale);
  parts.zero = bytes(zero);
  parts.patterns = bytes(patterns);
  parts.column_scale = bytes(column_scale);
  return Weight(parts);
}

void linear(Weight& weight, Memory x, size_t count, size_t x_stride, Memory bias, Memory y, int activations,
            size_t path, int threads, int then) {
  if (count == 0) return;
  if (then < 0 || then > static_cast<int>(usmlite::Then::kAdd) || activations < 0 ||
      activations > static_cast<int>(usmlite::Activations::kPairs)) {
    throw std::invalid_argument("nothing of this kind");
  }
  const auto how = static_cast<usmlite::Activations>(activations);
  const size_t last = product(count - 1, x_stride);
  if (last > SIZE_MAX - weight.columns()) throw std::invalid_argument("sizes are too large");
  const float* from = numbers<const float>(x, last + weight.columns(), "x is too small");
  float* to = numbers<float>(y, product(count, weight.rows()), "y is too small");
  const float* added = bias.first == 0 ? nullptr : numbers<const float>(bias, weight.rows(), "bias is too small");
  const Isa& isa = isa_of(path);
  if (how != usmlite::Activations::kFloats) weight.compute_sums(isa, threads);  // while the interpreter's lock keeps others out
  nb::gil_scoped_release free;
  usmlite::linear(weight, from, count, x_stride, added, to, how, isa, threads, static_cast<usmlite::Then>(then));
}

void gather(const Weight& weight, Memory ids, size_t count, Memory out, size_t path, int threads) {
  const int64_t* from = numbers<const int64_t>(ids, count, "ids are too few");
  float* to = numbers<float>(out, product(count, weight.columns()), "out is too small");
  const Isa& isa = isa_of(path);
  nb::gil_scoped_release free;
  usmlite::gather(weight, from, count, to, isa, threads);
}

void expand(const Weight& weight, Memory out, size_t path, int threads) {
  int8_t* to = numbers<int8_t>(out, product(weight.rows(), weight.columns()), "out is too small");
  const Isa& isa = isa_of(path);
  nb::gil_scoped_release free;
  usmlite::expand(weight, to, isa, threads);
}

void attend(Memory queries, Memory keys, Memory values, size_t count, size_t positions, size_t heads, size_t width,
            float scale, Memory out, size_t path, int threads) {
  const size_t row = product(heads, width);
  const float* k = numbers<const float>(keys, product(positions, row), "keys are too small");
  const float* v = numbers<const float>(values, product(positions, row), "values are too small");
  const float* q = numbers<const float>(queries, product(count, row), "queries are too small");
  float* to = numbers<float>(out, product(count, row), "out is too small");
  const Isa& isa = isa_of(path);
  nb::gil_scoped_release free;
  const usmlite::KeysValues from(k, v, positions, heads, width, isa, threads);
  const usmlite::Attention job{&from, q, count, to};
  usmlite::attend(&job, 1, scale, isa, threads);
}

void gelu(Memory x, size_t count, Memory y, size_t path, int threads) {
  const float* from = numbers<const float>(x, count, "x is too small");
  float* to = numbers<float>(y, count, "y is too small");
  const Isa& isa = isa_of(path);
  nb::gil_scoped_release free;
  constexpr size_t kEach = 16384;
  auto work = [&](size_t task, int) {
    const size_t first = task * kEach;
    isa.gelu(from + first, std::min(kEach, count - first), to + first);
  };
  usmlite::parallel((count + kEach - 1) / kEach, threads, work);
}

void normalize(Memory x, size_t count, Memory weight, Memory bias, size_t width, float epsilon, Memory y, size_t path) {
  const float* from = numbers<const float>(x, product(count, width), "x is too small");
  float* to = numbers<float>(y, product(count, width), "y is too small");
  const float* factors = numbers<const float>(weight, width, "the weight is too small");
  const float* added = numbers<const float>(bias, width, "the bias is too small");
  const Isa& isa = isa_of(path);
  nb::gil_scoped_release free;
  for (size_t i = 0; i < count; ++i) isa.normalize(from + i * width, factors, added, width, epsilon, to + i * width);
}

// Layers as Python gives them: blocks of a norm (weight, bias, epsilon) and linear layers (weight, bias).
using NormParts = std::tuple<Memory, Memory, float>;
using LinearParts = std::pair<Weight*, Memory>;
using BlockParts = std::pair<NormParts, std::vector<LinearParts>>;
using LayerParts = std::vector<BlockParts>;

usmlite::Norm norm_of(const NormParts& parts, size_t width) {
  const auto& [weight, bias, epsilon] = parts;
  return {numbers<const float>(weight, width, "the weight of a norm is too small"),
          numbers<const float>(bias, width, "the bias of a norm is too small"), epsilon};
}

usmlite::Linear linear_of(const LinearParts& parts, const Isa& isa) {
  const auto& [weight, bias] = parts;
  if (weight == nullptr) throw std::invalid_argument("a layer without its weight");
  weight->compute_sums(isa, 1);
  return {weight, bias.first == 0 ? nullptr : numbers<const float>(bias, weight->rows(), "a bias is too small")};
}

usmlite::AttentionBlock attention_of(const BlockParts& parts, size_t width, const Isa& isa) {
  const auto& linears = parts.second;
  if (linears.size() != 4) throw std::invalid_argument("attention has four layers");
  return {norm_of(parts.first, width), linear_of(linears[0], isa), linear_of(linears[1], isa),
          linear_of(linears[2], isa), linear_of(linears[3], isa)};
}

usmlite::FeedForward feed_of(const BlockParts& parts, size_t width, const Isa& isa) {
  const auto& linears = parts.second;
  if (linears.size() != 2) throw std::invalid_argument("a feed-forward layer has two layers");
  return {norm_of(parts.first, width), linear_of(linears[0], isa), linear_of(linears[1], isa)};
}

usmlite::Encoder make_encoder(const std::vector<LayerParts>& layers, const NormParts& last, size_t width, size_t heads,
                              size_t path) {
  const Isa& isa = isa_of(path);
  std::vector<usmlite::EncoderLayer> made;
  for (const LayerParts& layer : layers) {
    if (layer.size() != 2) throw std::invalid_argument("an encoder's layer has two blocks");
    made.push_back({attention_of(layer[0], width, isa), feed_of(layer[1], width, isa)});
  }
  return usmlite::Encoder(std::move(made), norm_of(last, width), width, heads, isa);
}

usmlite::Decoder make_decoder(const std::vector<LayerParts>& layers, const NormParts& last, size_t width, size_t heads,
                              size_t path) {
  const Isa& isa = isa_of(path);
  std::vector<usmlite::DecoderLayer> made;
  for (const LayerParts& layer : layers) {
    if (layer.size() != 3) throw std::invalid_argument("a decoder's layer has three blocks");
    made.push_back({attention_of(layer[0], width, isa), attention_of(layer[1], width, isa), feed_of(layer[2], width, isa)});
  }
  return usmlite::Decoder(std::move(made), norm_of(last, width), width, heads, isa);
}

void encode(const usmlite::Encoder& encoder, Memory x, size_t count, int threads) {
  float* rows = numbers<float>(x, product(count, encoder.width()), "x is too small");
  nb::gil_scoped_release free;
  encoder.run(rows, count, threads);
}

// Two threads with one decoder would mix their sequences, but not their memory.
struct Session {
  usmlite::Decoder decoder;
  std::mutex mutex;

  template <class Work>
  void alone(Work work) {
    nb::gil_scoped_release free;
    std::lock_guard<std::mutex> lock(mutex);
    work(decoder);
  }
};

void hear(Session& session, Memory encoded, size_t batch, size_t positions, int threads) {
  const size_t width = session.decoder.width();
  const float* rows = numbers<const float>(encoded, product(product(batch, positions), width), "encoded is too small");
  session.alone([&](usmlite::Decoder& decoder) { decoder.hear(rows, batch, positions, threads); });
}

void step(Session& session, Memory x, size_t rows, size_t added, int threads) {
  float* to = numbers<float>(x, product(product(rows, added), session.decoder.width()), "x is too small");
  session.alone([&](usmlite::Decoder& decoder) { decoder.step(to, rows, added, threads); });
}

void rans_decode(Memory stream, int bits, int lowest, Memory row_levels, Memory column_levels, int tables, int states,
                 Memory frequencies, Memory out) {
  usmlite::Coded coded;
  coded.bits = bits;
  coded.tables = tables;
  coded.states = states;
  coded.lowest = lowest;
  coded.rows = row_levels.second;
  coded.columns = column_levels.second;
  coded.row_levels = numbers<const uint8_t>(row_levels, coded.rows, "levels have no address");
  coded.column_levels = numbers<const uint8_t>(column_levels, coded.columns, "levels have no address");
  if (bits < 1 || bits > 8 || tables < 1) throw std::invalid_argument("impossible codes");
  coded.frequencies =
      numbers<const uint16_t>(frequencies, product(product(static_cast<size_t>(tables), size_t{1} << bits), states == 0 ? 1 : 2),
                              "too few frequencies");
  coded.stream = numbers<const uint8_t>(stream, stream.second, "the stream has no address");
  coded.stream_bytes = stream.second;
  uint8_t* to = numbers<uint8_t>(out, product(coded.rows, coded.columns), "out is too small");
  nb::gil_scoped_release free;
  usmlite::rans_decode(coded, to);
}

void trellis_search(int states, size_t count, size_t rows, Memory steps, Memory costs, Memory tables, Memory bits,
                    size_t table_count, Memory out) {
  const size_t all = product(count, rows);
  usmlite::TrellisSearch job;
  job.states = states;
  job.count = count;
  job.rows = rows;
  job.steps = numbers<const float>(steps, all, "steps are too few");
  job.costs = numbers<const float>(costs, count, "costs are too few");
  job.tables = numbers<const uint8_t>(tables, all, "tables are too few");
  job.bits = numbers<const float>(bits, product(table_count, 2 * usmlite::kSymbols), "bits are too few");
  job.table_count = table_count;
  job.out = numbers<uint8_t>(out, all, "out is too small");
  nb::gil_scoped_release free;
  usmlite::trellis_search(job);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Kernels on packed weights; see usmlite.kernels.native, which checks what they are given.";
  m.def("paths", [] {
    nb::list names;
    for (const Isa* const* isa = usmlite::available_isas(); *isa != nullptr; ++isa) names.append((*isa)->name);
    return names;
  });
  m.def("thread_source", &usmlite::thread_source);
  m.def("rans_decode", &rans_decode);
  m.def("trellis_search", &trellis_search);
  m.def("attend", &attend);
  m.def("gelu", &gelu);
  m.def("normalize", &normalize);
  // The last argument owns the memory, and the weights.
  nb::class_<usmlite::Encoder>(m, "Encoder")
      .def("__init__",
           [](usmlite::Encoder* self, const std::vector<LayerParts>& layers, const NormParts& last, size_t width,
              size_t heads, size_t path,
              nb::object) { new (self) usmlite::Encoder(make_encoder(layers, last, width, heads, path)); },
           nb::keep_alive<1, 7>())
      .def("run", &encode);
  nb::class_<Session>(m, "Decoder")
      .def("__init__",
           [](Session* self, const std::vector<LayerParts>& layers, const NormParts& last, size_t width, size_t heads,
              size_t path, nb::object) { new (self) Session{make_decoder(layers, last, width, heads, path), {}}; },
           nb::keep_alive<1, 7>())
      .def("hear", &hear)
      .def("step", &step)
      .def("swap",
           [](Session& self, size_t a, size_t b) { self.alone([&](usmlite::Decoder& decoder) { decoder.swap(a, b); }); })
      .def("select", [](Session& self, const std::vector<size_t>& rows) {
        self.alone([&](usmlite::Decoder& decoder) { decoder.select(rows.data(), rows.size()); });
      });
  nb::class_<Weight>(m, "Weight")
      .def("__init__",
           [](Weight* self, size_t rows, size_t columns, size_t group, int bits, int doubled_offset,
              std::tuple<int, int, int, int> pattern, Memory codes, Memory scale, Memory zero, Memory patterns,
              Memory column_scale, nb::object) {
             new (self) Weight(make_weight(rows, columns, group, bits, doubled_offset, pattern, codes, scale, zero,
                                           patterns, column_scale));
           },
           // The last argument owns the memory that the addresses lead to.
           nb::keep_alive<1, 13>())
      .def("linear", &linear)
      .def("gather", &gather)
      .def("expand", &expand);
}
