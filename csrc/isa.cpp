#include "isa.hpp"

#include <cstring>

namespace usmlite {

extern const Isa kPortable;
#ifdef USMLITE_AVX2
extern const Isa kAvx2;
#endif
#ifdef USMLITE_AVXVNNI
extern const Isa kAvxVnni;
#endif
#ifdef USMLITE_AVX512
extern const Isa kAvx512;
#endif
#ifdef USMLITE_NEON
extern const Isa kNeon;
#endif

namespace {

const Isa* const kAll[] = {
#ifdef USMLITE_AVX512
    &kAvx512,
#endif
#ifdef USMLITE_AVXVNNI
    &kAvxVnni,
#endif
#ifdef USMLITE_AVX2
    &kAvx2,
#endif
#ifdef USMLITE_NEON
    &kNeon,
#endif
    &kPortable,
};

struct Available {
  const Isa* found[sizeof(kAll) / sizeof(kAll[0]) + 1] = {};
  Available() {
    int count = 0;
    for (const Isa* isa : kAll) {
      if (isa->available()) found[count++] = isa;
    }
  }
};

}  // namespace

const Isa* const* available_isas() {
  static const Available available;
  return available.found;
}

const Isa* best_isa() { return available_isas()[0]; }

const Isa* find_isa(const char* name) {
  for (const Isa* const* isa = available_isas(); *isa != nullptr; ++isa) {
    if (std::strcmp((*isa)->name, name) == 0) return *isa;
  }
  return nullptr;
}

}  // namespace usmlite
