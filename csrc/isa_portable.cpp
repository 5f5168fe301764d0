// Plain C++, for every processor.
#include "isa.hpp"

namespace usmlite {
namespace {

#include "isa_common.inl"

#include "isa_rows.inl"

}  // namespace

extern const Isa kPortable;
const Isa kPortable = {
    "portable", [] { return true; }, 4, 0, 0, 1, quantize<0>, dot, dot_float, pack_fours, pack_float, multiply,
    multiply_float, finish<0>, finish_float, unpack, unpack_2of4,
    weigh<0>, remainder<0>, reach, round_levels, attend_floats, normalize, gelu, next_codes,
};

}  // namespace usmlite
