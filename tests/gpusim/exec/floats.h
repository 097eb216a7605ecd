// The 16-bit floating-point types, and rounding to them (to nearest even; NaN becomes the type's canonical NaN).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "decoder.h"

namespace gpusim {

inline float to_float(BFloat b) {
  const uint32_t bits = uint32_t{b.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(Half h) {
  const uint32_t exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float f;
  if (exponent == 31) {
    const uint32_t bits = 0x7f800000u | fraction << 13;
    std::memcpy(&f, &bits, 4);
  } else {
    f = exponent ? std::ldexp(static_cast<float>(fraction + 1024), static_cast<int>(exponent) - 25)
                 : std::ldexp(static_cast<float>(fraction), -24);
  }
  return h.bits & 0x8000 ? -f : f;
}

// How a conversion rounds.
enum class Rounding : uint8_t { kNearest, kZero, kDown, kUp, kAway };

// |value| = n units of 2^exponent, n an integer after rounding; the arithmetic is exact in double.
inline double round_units(double units, Rounding r) {
  switch (r) {
    case Rounding::kZero:
      return std::trunc(units);
    case Rounding::kDown:
      return std::floor(units);
    case Rounding::kUp:
      return std::ceil(units);
    case Rounding::kAway:
      return std::round(units);
    default:
      return std::nearbyint(units);
  }
}

// A double to a format of `fraction` explicit bits, largest exponent `top`, smallest normal exponent `low`.
inline double round_to_format(double v, int fraction, int low, int top, Rounding r) {
  if (v != v || std::isinf(v) || v == 0) return v;
  int exponent;
  std::frexp(v, &exponent);
  --exponent;
  const int unit = (exponent < low ? low : exponent) - fraction;
  const double rounded = std::ldexp(round_units(std::ldexp(v, -unit), r), unit);
  if (std::fabs(rounded) < std::ldexp(1.0, top + 1)) return rounded;
  const double largest = std::copysign(std::ldexp(2.0 - std::ldexp(1.0, -fraction), top), v);
  const bool cut = r == Rounding::kZero || (r == Rounding::kDown && v > 0) || (r == Rounding::kUp && v < 0);
  return cut ? largest : std::copysign(INFINITY, v);
}

inline BFloat to_bfloat(double v, Rounding r = Rounding::kNearest) {
  if (v != v) return {0x7fff};
  const float f = static_cast<float>(round_to_format(v, 7, -126, 127, r));
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return {static_cast<uint16_t>(bits >> 16)};
}
inline BFloat to_bfloat(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline Half to_half(double v, Rounding r = Rounding::kNearest) {
  if (v != v) return {0x7fff};
  const double rounded = round_to_format(v, 10, -14, 15, r);
  const uint16_t sign = std::signbit(rounded) ? 0x8000 : 0;
  const double magnitude = std::fabs(rounded);
  if (std::isinf(magnitude)) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < std::ldexp(1.0, -14)) return {static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(magnitude, 24)))};
  int exponent;
  const double m = std::frexp(magnitude, &exponent);  // in [0.5, 1)
  return {static_cast<uint16_t>(sign | (exponent + 14) << 10 | (static_cast<int>(std::ldexp(m, 11)) - 1024))};
}

// The type arithmetic is done in: itself, or float for the 16-bit types (exact enough that rounding once more changes nothing).
inline float wide(Half h) { return to_float(h); }
inline float wide(BFloat b) { return to_float(b); }
template <class T>
  requires std::is_arithmetic_v<T>
T wide(T v) {
  return v;
}
template <class T, class W>
T from_wide(W v) {
  if constexpr (std::is_same_v<T, Half>)
    return to_half(static_cast<double>(v));
  else if constexpr (std::is_same_v<T, BFloat>)
    return to_bfloat(static_cast<float>(v));
  else
    return static_cast<T>(v);
}
template <class T>
T from_double(double v) {
  if constexpr (std::is_same_v<T, Half>)
    return to_half(v);
  else if constexpr (std::is_same_v<T, BFloat>)
    return to_bfloat(v);
  else
    return static_cast<T>(v);
}
template <class T>
T canonical_nan() {
  if constexpr (sizeof(T) == 2) {
    return T{0x7fff};
  } else if constexpr (sizeof(T) == 4) {
    const uint32_t bits = 0x7fffffff;
    T v;
    std::memcpy(&v, &bits, 4);
    return v;
  } else {
    return static_cast<T>(NAN);
  }
}

}  // namespace gpusim
