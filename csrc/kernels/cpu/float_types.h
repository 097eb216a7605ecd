// bfloat16 and float16 as storage, float32 as arithmetic: branch-free conversions that the compiler can vectorise.
// to_acc widens exactly; from_acc rounds to nearest, ties to even, and keeps NaN a (quiet) NaN.
// No denormal float32 is ever an operand, so the results do not depend on flush-to-zero modes.
#pragma once
#include <cstdint>
#include <cstring>

#include "../types.h"
#include "../visit_dtype.h"

namespace moe::cpu::MOE_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccumulatorOf<T>::type;

inline float float_of_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline uint32_t bits_of_float(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

inline double to_acc(double v) { return v; }
inline float to_acc(float v) { return v; }
inline float to_acc(bfloat16 v) { return float_of_bits(uint32_t{v.bits} << 16); }
inline float to_acc(float16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  // A subnormal is magnitude * 2^-24: put it below the leading bit of 0.5, whose last place is 2^-24.
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude | 0x3f000000u) - 0.5f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return float_of_bits(sign | (magnitude >= 0x7c00u ? special : finite));
}

template <class T>
inline T from_acc(acc_t<T> v) {
  return v;
}
template <>
inline bfloat16 from_acc<bfloat16>(float v) {
  const uint32_t bits = bits_of_float(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}
template <>
inline float16 from_acc<float16>(float v) {
  const uint32_t bits = bits_of_float(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds at 2^-24
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000u ? nan : result;
  return {static_cast<uint16_t>(sign | result)};
}

// Contiguous elements as accumulators, for kernels written as plain loops: load_as<float>(p + i).
template <class Acc, class T>
inline Acc load_as(const T* p) {
  return static_cast<Acc>(to_acc(*p));
}
template <class T>
inline void store_from(T* p, acc_t<T> v) {
  *p = from_acc<T>(v);
}

// The element types of this instruction set, for visit_dtype.
struct ElementTypes {
  using Float64 = double;
  using Float32 = float;
  using BFloat16 = bfloat16;
  using Float16 = float16;
};

// f(Type<T>{}) with the element type of `dtype`; see visit_dtype.
template <class F>
Status visit_dtype(DType dtype, const F& f) {
  return moe::visit_dtype<ElementTypes>(dtype, f);
}

}  // namespace moe::cpu::MOE_ISA
