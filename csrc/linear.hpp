// Activations times a weight.
#pragma once

#include <cstddef>

#include "isa.hpp"
#include "weight.hpp"

namespace usmlite {

// What becomes of the outputs: nothing more; the Gaussian error linear unit of each; or they are added to what y held.
enum class Then { kNothing, kGelu, kAdd };

// How activations are multiplied: as they are; rounded, each row to 256 steps between its smallest and its largest number
// (or 0), so that products are of whole numbers; or so rounded, and what was rounded away too, which takes twice the
// arithmetic but no more reading of the weight, and is nearly as good as not rounding.
enum class Activations { kFloats, kBytes, kPairs };

// y[i, :] = weight x[i, :] + bias for i < count.
//
// x: float32, row i at x + i * x_stride, weight.columns() numbers in each.
// bias: float32 [weight.rows()], or null.
// y: float32 [count, weight.rows()].
// For all but floats weight.compute_sums must have been called.
void linear(const Weight& weight, const float* x, size_t count, size_t x_stride, const float* bias, float* y,
            Activations activations, const Isa& isa, int threads, Then then = Then::kNothing);

// out[i, :] = row ids[i] of the weight, float32 [count, weight.columns()].
// Throws std::out_of_range where there is no such row.
void gather(const Weight& weight, const int64_t* ids, size_t count, float* out, const Isa& isa, int threads);

// The whole weight as levels, int8 [weight.rows(), weight.columns()].
void expand(const Weight& weight, int8_t* out, const Isa& isa, int threads);

}  // namespace usmlite
