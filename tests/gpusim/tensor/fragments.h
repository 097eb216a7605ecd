// Where the elements of a matrix lie in the registers of a warp, and small matrix products in float32, in the order of k.
#pragma once
#include <vector>

#include "../exec/decoder.h"
#include "../exec/floats.h"

namespace gpusim {

inline const float* half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (uint32_t bits = 0; bits < 65536; ++bits) t[bits] = to_float(Half{static_cast<uint16_t>(bits)});
    return t;
  }();
  return table.data();
}

enum class Element : uint8_t { kHalf, kBFloat, kTf32 };

inline float element(Element e, uint16_t bits) { return e == Element::kHalf ? half_table()[bits] : to_float(BFloat{bits}); }
// The tensor core reads the upper 19 bits of a float32.
inline float tf32(uint32_t bits) {
  bits &= 0xffffe000u;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

}  // namespace gpusim
