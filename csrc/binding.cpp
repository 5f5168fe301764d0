// What Python sees of the library. Addresses come as numbers: `usmlite.kernels.native` has looked at the tensors that
// they belong to, and the sizes that come with them are checked here once more.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <stdexcept>
#include <tuple>
#include <utility>

#include "isa.hpp"
#include "linear.hpp"
#include "rans.hpp"
#include "threads.hpp"
#include "weight.hpp"

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

void linear(Weight& weight, Memory x, size_t count, size_t x_stride, Memory bias, Memory y, bool whole, size_t path,
            int threads) {
  if (count == 0) return;
  const size_t last = product(count - 1, x_stride);
  if (last > SIZE_MAX - weight.columns()) throw std::invalid_argument("sizes are too large");
  const float* from = numbers<const float>(x, last + weight.columns(), "x is too small");
  float* to = numbers<float>(y, product(count, weight.rows()), "y is too small");
  const float* added = bias.first == 0 ? nullptr : numbers<const float>(bias, weight.rows(), "bias is too small");
  const Isa& isa = isa_of(path);
  if (whole) weight.compute_sums(isa, threads);  // while the interpreter's lock keeps others out
  nb::gil_scoped_release free;
  usmlite::linear(weight, from, count, x_stride, added, to, whole, isa, threads);
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

void rans_decode(Memory stream, int bits, int lowest, Memory row_levels, Memory column_levels, int tables,
                 Memory frequencies, Memory out) {
  usmlite::Coded coded;
  coded.bits = bits;
  coded.tables = tables;
  coded.lowest = lowest;
  coded.rows = row_levels.second;
  coded.columns = column_levels.second;
  coded.row_levels = numbers<const uint8_t>(row_levels, coded.rows, "levels have no address");
  coded.column_levels = numbers<const uint8_t>(column_levels, coded.columns, "levels have no address");
  if (bits < 1 || bits > 8 || tables < 1) throw std::invalid_argument("impossible codes");
  coded.frequencies =
      numbers<const uint16_t>(frequencies, product(static_cast<size_t>(tables), size_t{1} << bits), "too few frequencies");
  coded.stream = numbers<const uint8_t>(stream, stream.second, "the stream has no address");
  coded.stream_bytes = stream.second;
  uint8_t* to = numbers<uint8_t>(out, product(coded.rows, coded.columns), "out is too small");
  nb::gil_scoped_release free;
  usmlite::rans_decode(coded, to);
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
