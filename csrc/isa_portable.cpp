// Plain C++, for every processor.
#include "isa.hpp"

namespace usmlite {
namespace {

#include "isa_common.inl"

}  // namespace

extern const Isa kPortable;
const Isa kPortable = {
    "portable", [] { return true; }, 4, 0, 0, quantize<0>, dot, dot_float, pack_fours, pack_float, multiply,
    multiply_float, finish<0>, finish_float, unpack, unpack_2of4,
};

}  // namespace usmlite
