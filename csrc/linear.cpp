#include "linear.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "scratch.hpp"
#include "threads.hpp"

namespace usmlite {
namespace {

// From this many rows of activations on, a block of the weight is put in order first.
constexpr size_t kMany = 12;
// Rows of activations for which a block stays in cache; each chunk packs it anew.
constexpr size_t kChunk = 240;
// The same where activations stay float32: their blocks take four times the memory.
constexpr size_t kManyFloats = 48;
// Everything that the threads share while they compute one product.
struct Product {
  const Weight& weight;
  const Isa& isa;
  const float* bias;
  float* y;
  size_t count;
  bool whole;
  Then then;
  // Activations: codes with a scale and a zero a row, of what was rounded away after those of all rows; or floats.
  size_t terms = 1;
  const uint8_t* codes = nullptr;
  const float* scales = nullptr;
  const int32_t* zeros = nullptr;
  const float* values = nullptr;
  size_t stride = 0;  // of codes, or of values

  // Per thread: levels of a block that are not in memory as such, its panel, sums.
  size_t levels_bytes = 0, panel = 0, own = 0;
  char* memory = nullptr;

  // Outputs first .. first + kRows of activations begin .. end.
  void compute(size_t first, size_t begin, size_t end, int worker) const {
    char* at = memory + own * static_cast<size_t>(worker);
    int8_t* scratch = reinterpret_cast<int8_t*>(at);
    void* packed = at + levels_bytes;
    void* sums = at + levels_bytes + panel;
    const int rows = static_cast<int>(std::min<size_t>(kRows, weight.rows() - first));
    const int8_t* levels[kRows];
    const size_t each = weight.scratch_bytes();
    for (int r = 0; r < rows; ++r) {
      levels[r] = weight.levels(first + static_cast<size_t>(r), scratch + each * static_cast<size_t>(r), isa);
    }
    // Rows that are not there are computed like the last one, and dropped.
    for (int r = rows; r < kRows; ++r) levels[r] = levels[rows - 1];
    const bool many = count >= (whole ? kMany : kManyFloats);
    const auto& segments = weight.segments();
    const int8_t* part[kRows];
    for (size_t s = 0; s < segments.size(); ++s) {
      const size_t low = segments[s].begin, length = segments[s].end - low;
      for (int r = 0; r < kRows; ++r) part[r] = levels[r] + low;
      if (many) (whole ? isa.pack : isa.pack_float)(part, length, packed);
      const size_t step = static_cast<size_t>(many ? isa.block : kColumns);
      if (!many && terms == 2) {
        compute_pairs(part, s, first, rows, begin, end, static_cast<int32_t*>(sums));
        continue;
      }
      for (size_t term = 0; term < terms; ++term) {
        for (size_t i = begin; i < end; i += step) {
          const int columns = static_cast<int>(std::min(step, end - i));
          if (many) prefetch(first, i, columns);
          if (whole) {
            int32_t* out = static_cast<int32_t*>(sums);
            const uint8_t* x = codes + (term * count + i) * stride + low;
            if (many) {
              isa.multiply(packed, x, stride, columns, length, out);
            } else {
              for (int r = 0; r < rows; r += 4) isa.dot(part + r, x, stride, columns, length, out + r);
            }
          } else {
            float* out = static_cast<float*>(sums);
            const float* x = values + i * stride + low;
            if (many) {
              isa.multiply_float(packed, x, stride, columns, length, out);
            } else {
              for (int r = 0; r < rows; r += 4) isa.dot_float(part + r, x, stride, columns, length, out + r);
            }
          }
          finish(s, term, first, i, rows, columns, sums);
        }
      }
    }
  }

  // Both terms of a row of activations side by side: the weight is read once.
  void compute_pairs(const int8_t* const* part, size_t s, size_t first, int rows, size_t begin, size_t end,
                     int32_t* sums) const {
    const size_t low = weight.segments()[s].begin, length = weight.segments()[s].end - low;
    for (size_t i = begin; i < end; ++i) {
      for (int r = 0; r < rows; r += 4) isa.dot(part + r, codes + i * stride + low, count * stride, 2, length, sums + r);
      finish(s, 0, first, i, rows, 1, sums);
      finish(s, 1, first, i, rows, 1, sums + kRows);
    }
  }

  // Where the outputs go, while the products are computed: stores would wait for memory that is not in a cache.
  void prefetch(size_t first, size_t i, int columns) const {
#if defined(__GNUC__)
    for (int c = 0; c < columns; ++c) {
      const char* row = reinterpret_cast<const char*>(y + (i + static_cast<size_t>(c)) * weight.rows() + first);
      for (size_t byte = 0; byte < kRows * sizeof(float); byte += 64) __builtin_prefetch(row + byte, 1);
    }
#else
    (void)first, (void)i, (void)columns;
#endif
  }

  void finish(size_t s, size_t term, size_t first, size_t i, int rows, int columns, const void* sums) const {
    const float* step = weight.steps(weight.segments()[s].group) + first;
    const bool opening = s == 0 && term == 0;
    const float* added = opening && bias != nullptr ? bias + first : nullptr;
    const bool add = !opening || then == Then::kAdd;
    float* out = y + i * weight.rows() + first;
    if (whole) {
      isa.finish(static_cast<const int32_t*>(sums), columns, rows, scales + term * count + i, zeros + term * count + i, step,
                 weight.level_sums(s) + first, added, add, out, weight.rows());
    } else {
      isa.finish_float(static_cast<const float*>(sums), columns, rows, step, added, add, out, weight.rows());
    }
    if (then == Then::kGelu && s + 1 == weight.segments().size() && term + 1 == terms) {
      for (int c = 0; c < columns; ++c, out += weight.rows()) isa.gelu(out, static_cast<size_t>(rows), out);
    }
  }
};

}  // namespace

void linear(const Weight& weight, const float* x, size_t count, size_t x_stride, const float* bias, float* y,
            Activations activations, const Isa& isa, int threads, Then then) {
  const bool whole = activations != Activations::kFloats;
  const size_t rows = weight.rows(), columns = weight.columns();
  if (count == 0 || rows == 0) return;
  const double products = static_cast<double>(count) * static_cast<double>(rows) * static_cast<double>(columns);
  threads = threads_for(products, threads);

  Product product{weight, isa, bias, y, count, whole, then};
  product.terms = activations == Activations::kPairs ? 2 : 1;
  const size_t all = product.terms * count;
  const size_t padded = rounded(columns + kPad);
  const float* column_scale = weight.column_scale();
  size_t longest = 0;
  for (const Segment& segment : weight.segments()) longest = std::max(longest, segment.end - segment.begin);
  product.levels_bytes = rounded(weight.scratch_bytes() * kRows);
  product.panel = count >= (whole ? kMany : kManyFloats) ? rounded(panel_bytes(longest)) : 0;
  product.own = product.levels_bytes + product.panel + rounded(sizeof(float) * kRows * kMostBlock);
  const size_t own_bytes = product.own * static_cast<size_t>(threads);
  const bool scaled = !whole && column_scale != nullptr;
  // Behind the codes come their scales and zeros, and a row of floats for each thread.
  const size_t row_bytes = product.terms > 1 ? rounded(columns * sizeof(float)) : 0;
  const size_t codes_bytes =
      whole ? all * padded + rounded(2 * sizeof(float) * all) + row_bytes * static_cast<size_t>(threads) : 0;
  const size_t values_bytes = scaled ? count * padded * sizeof(float) : 0;
  thread_local Scratch scratch;
  char* memory = static_cast<char*>(scratch.get(own_bytes + codes_bytes + values_bytes));
  product.memory = memory;

  if (whole) {
    uint8_t* codes = reinterpret_cast<uint8_t*>(memory + own_bytes);
    float* scales = reinterpret_cast<float*>(codes + all * padded);
    int32_t* zeros = reinterpret_cast<int32_t*>(scales + all);
    char* rows_of_floats = reinterpret_cast<char*>(scales) + rounded(2 * sizeof(float) * all);
    constexpr size_t kBlock = 16;
    auto quantize = [&](size_t task, int worker) {
      float* rest = reinterpret_cast<float*>(rows_of_floats + row_bytes * static_cast<size_t>(worker));
      for (size_t i = task * kBlock; i < std::min(count, (task + 1) * kBlock); ++i) {
        uint8_t* row = codes + i * padded;
        isa.quantize(x + i * x_stride, column_scale, columns, row, scales + i, zeros + i);
        std::memset(row + columns, 0, padded - columns);
        if (product.terms == 1) continue;
        isa.remainder(x + i * x_stride, column_scale, columns, row, scales[i], zeros[i], rest);
        uint8_t* second = row + count * padded;
        isa.quantize(rest, nullptr, columns, second, scales + count + i, zeros + count + i);
        std::memset(second + columns, 0, padded - columns);
      }
    };
    parallel((count + kBlock - 1) / kBlock, count < 4 * kBlock ? 1 : threads, quantize);
    product.codes = codes;
    product.scales = scales;
    product.zeros = zeros;
    product.stride = padded;
  } else if (scaled) {
    float* values = reinterpret_cast<float*>(memory + own_bytes);
    for (size_t i = 0; i < count; ++i) {
      for (size_t k = 0; k < columns; ++k) values[i * padded + k] = x[i * x_stride + k] * column_scale[k];
    }
    product.values = values;
    product.stride = padded;
  } else {
    product.values = x;
    product.stride = x_stride;
  }

  const size_t blocks = (rows + kRows - 1) / kRows;
  // Where there are few blocks for many threads, rows of activations are divided further.
  size_t chunk = kChunk;
  while (chunk > 2 * kMany * 2 && blocks * ((count + chunk - 1) / chunk) < 4 * static_cast<size_t>(threads)) {
    chunk = (chunk / 2 + kMany - 1) / kMany * kMany;
  }
  const size_t chunks = (count + chunk - 1) / chunk;
  auto compute = [&](size_t task, int worker) {
    const size_t begin = task / blocks * chunk;
    product.compute(task % blocks * kRows, begin, std::min(count, begin + chunk), worker);
  };
  parallel(blocks * chunks, threads, compute);
  scratch.trim();
}

void gather(const Weight& weight, const int64_t* ids, size_t count, float* out, const Isa& isa, int threads) {
  for (size_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || static_cast<size_t>(ids[i]) >= weight.rows()) throw std::out_of_range("there is no such row");
  }
  const size_t columns = weight.columns(), block = 64;
  threads = threads_for(static_cast<double>(count) * static_cast<double>(columns), threads);
  std::vector<int8_t> scratch(weight.scratch_bytes() * static_cast<size_t>(threads));
  auto work = [&](size_t task, int worker) {
    for (size_t i = task * block; i < std::min(count, (task + 1) * block); ++i) {
      weight.unpack(static_cast<size_t>(ids[i]), scratch.data() + weight.scratch_bytes() * static_cast<size_t>(worker),
                    out + i * columns, isa);
    }
  };
  parallel((count + block - 1) / block, threads, work);
}

void expand(const Weight& weight, int8_t* out, const Isa& isa, int threads) {
  const size_t rows = weight.rows(), columns = weight.columns(), block = 64;
  threads = threads_for(static_cast<double>(rows) * static_cast<double>(columns), threads);
  std::vector<int8_t> scratch(weight.scratch_bytes() * static_cast<size_t>(threads));
  auto work = [&](size_t task, int worker) {
    int8_t* own = scratch.data() + weight.scratch_bytes() * static_cast<size_t>(worker);
    for (size_t row = task * block; row < std::min(rows, (task + 1) * block); ++row) {
      std::memcpy(out + row * columns, weight.levels(row, own, isa), columns);
    }
  };
  parallel((rows + block - 1) / block, threads, work);
}

}  // namespace usmlite
