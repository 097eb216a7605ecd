// Arithmetic. PTX ISA, "Integer Arithmetic Instructions", "Floating Point Instructions", "Half Precision Floating Point Instructions".
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "carry.h"
#include "elementwise.h"

namespace gpusim {
namespace {

// Two 16-bit numbers per lane.
template <class T, class Op, int kOperands>
Flow packed(Warp& w, const Instr& i, Mask m) {
  T* d = w.reg<T>(i.d);
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b), *c = w.reg<T>(i.c);
  for (int l = 0; l < 2 * kLanes; ++l) {
    if (!(m >> (l / 2) & 1)) continue;
    if constexpr (kOperands == 1) d[l] = Op()(a[l]);
    if constexpr (kOperands == 2) d[l] = Op()(a[l], b[l]);
    if constexpr (kOperands == 3) d[l] = Op()(a[l], b[l], c[l]);
  }
  return Flow::kNext;
}

// Integer arithmetic wraps, so it is done on unsigned numbers.
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(Unsigned<T>(a) + Unsigned<T>(b));
    else
      return from_wide<T>(wide(a) + wide(b));
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(Unsigned<T>(a) - Unsigned<T>(b));
    else
      return from_wide<T>(wide(a) - wide(b));
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(uint64_t(a) * uint64_t(b));
    else
      return from_wide<T>(wide(a) * wide(b));
  }
};
struct Fma {
  template <class T>
  T operator()(T a, T b, T c) const {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(uint64_t(a) * uint64_t(b) + uint64_t(c));
    else if constexpr (sizeof(T) == 2)
      return from_double<T>(double(wide(a)) * double(wide(b)) + double(wide(c)));
    else
      return std::fma(a, b, c);
  }
};
struct MulHigh {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (sizeof(T) == 8) {
      using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
      return static_cast<T>(Wide(a) * Wide(b) >> 64);
    } else {
      using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
      return static_cast<T>(Wide(a) * Wide(b) >> (8 * sizeof(T)));
    }
  }
};
struct MadHigh {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add()(MulHigh()(a, b), c);
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) return static_cast<T>(-1);  // "unspecified": what hardware gives
      if (std::is_signed_v<T> && b == T(-1)) return static_cast<T>(Unsigned<T>(0) - Unsigned<T>(a));
    }
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
// The number wins against NaN, and -0 < +0; .NaN: NaN wins.
template <bool kMax, bool kNan>
struct Extreme {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) {
      return kMax ? (a > b ? a : b) : (a < b ? a : b);
    } else {
      const auto x = wide(a), y = wide(b);
      if (x != x || y != y) {
        if (kNan) return x != x ? canonical_nan<T>() : canonical_nan<T>();
        return x != x ? (y != y ? canonical_nan<T>() : b) : a;
      }
      if (x == y) return std::signbit(x) == kMax ? b : a;
      return (x > y) == kMax ? a : b;
    }
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    if constexpr (std::is_integral_v<T>)
      return a < 0 ? static_cast<T>(Unsigned<T>(0) - Unsigned<T>(a)) : a;
    else if constexpr (sizeof(T) == 2)
      return T{static_cast<uint16_t>(a.bits & 0x7fff)};
    else
      return std::fabs(a);
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(Unsigned<T>(0) - Unsigned<T>(a));
    else if constexpr (sizeof(T) == 2)
      return T{static_cast<uint16_t>(a.bits ^ 0x8000)};
    else
      return -a;
  }
};
// Directed rounding: the host's rounding mode does it; the barriers keep the arithmetic between the two switches.
template <int kMode, class Op>
struct Rounded {
  template <class T, class... More>
  T operator()(T a, More... more) const {
    std::fesetround(kMode);
    volatile T first = a;
    volatile T r = Op()(static_cast<T>(first), more...);
    std::fesetround(FE_TONEAREST);
    return r;
  }
};

template <class Op, class T, int kOperands>
Exec choose(Type t) {
  if (t.packed == 2) {
    if constexpr (sizeof(T) == 2 && !std::is_integral_v<T>) return packed<T, Op, kOperands>;
    return nullptr;
  }
  if constexpr (kOperands == 1)
    return unary<T, Op>;
  else if constexpr (kOperands == 2)
    return binary<T, Op>;
  else
    return ternary<T, Op>;
}

// add, sub, mul, fma on floating-point numbers with their modifiers.
template <class Op, int kOperands>
Exec float_op(const Statement& s, Type t) {
  return for_float(t, [&]<class T>() -> Exec {
    if constexpr (sizeof(T) >= 4) {
      if (s.has("rz")) return choose<Rounded<FE_TOWARDZERO, Op>, T, kOperands>(t);
      if (s.has("rm")) return choose<Rounded<FE_DOWNWARD, Op>, T, kOperands>(t);
      if (s.has("rp")) return choose<Rounded<FE_UPWARD, Op>, T, kOperands>(t);
    }
    if (s.has("sat") || s.has("relu")) return nullptr;
    return choose<Op, T, kOperands>(t);
  });
}

template <class Op>
void decode_arithmetic(Decoder& d, const Statement& s, Instr& i) {
  if (s.has("cc")) return decode_carry(d, s, i);
  const Type t = d.type_of(s);
  operands(d, s, i, t, 2);
  if (is_float(t))
    i.exec = float_op<Op, 2>(s, t);
  else if (!s.has("sat"))
    i.exec = for_integer(t, []<class T>() -> Exec { return binary<T, Op>; });
}

// d = a * b (+ c) at twice the width of the operands.
template <class T, bool kAdd>
Flow multiply_wide(Warp& w, const Instr& i, Mask m) {
  using Wide = std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 2, int32_t, int64_t>,
                                  std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>>;
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  const Wide* c = w.reg<Wide>(i.c);
  each_lane<Wide>(w, i.d, m,
                  [=](int l) { return static_cast<Wide>(uint64_t(int64_t(a[l]) * int64_t(b[l])) + (kAdd ? uint64_t(c[l]) : 0)); });
  return Flow::kNext;
}

void decode_mul(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  if (is_float(t)) return decode_arithmetic<Mul>(d, s, i);
  operands(d, s, i, t, 2);
  i.exec = for_integer(t, [&]<class T>() -> Exec {
    if (s.has("lo")) return binary<T, Mul>;
    if (s.has("hi")) return binary<T, MulHigh>;
    if constexpr (sizeof(T) < 8)
      if (s.has("wide")) return multiply_wide<T, false>;
    return nullptr;
  });
}

void decode_mad(Decoder& d, const Statement& s, Instr& i) {
  if (s.has("cc")) return decode_carry(d, s, i);
  const Type t = d.type_of(s);
  if (is_float(t)) {
    operands(d, s, i, t, 3);
    i.exec = float_op<Fma, 3>(s, t);
    return;
  }
  operands(d, s, i, t, 2);
  Type third = t;
  if (s.has("wide")) third.size = static_cast<uint8_t>(2 * t.size);
  i.c = d.source(s.operands[3], third);
  if (s.has("sat")) return;
  i.exec = for_integer(t, [&]<class T>() -> Exec {
    if (s.has("lo")) return ternary<T, Fma>;
    if (s.has("hi")) return ternary<T, MadHigh>;
    if constexpr (sizeof(T) < 8)
      if (s.has("wide")) return multiply_wide<T, true>;
    return nullptr;
  });
}

void decode_div(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 2);
  if (t.kind == Kind::kFloat)
    i.exec = for_float(t, []<class T>() -> Exec {
      if constexpr (sizeof(T) >= 4) return binary<T, Div>;
      return nullptr;
    });
  else
    i.exec = for_integer(t, []<class T>() -> Exec { return binary<T, Div>; });
}
void decode_rem(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 2);
  i.exec = for_integer(t, []<class T>() -> Exec { return binary<T, Rem>; });
}

template <bool kMax>
void decode_extreme(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, s.operands.size() == 4 ? 3 : 2);
  if (s.operands.size() != 3) return;
  if (!is_float(t)) {
    if (!s.has("relu")) i.exec = for_integer(t, []<class T>() -> Exec { return binary<T, Extreme<kMax, false>>; });
  } else {
    i.exec = for_float(
        t, [&]<class T>() -> Exec { return s.has("NaN") ? choose<Extreme<kMax, true>, T, 2>(t) : choose<Extreme<kMax, false>, T, 2>(t); });
  }
}

template <class Op>
void decode_sign(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 1);
  if (is_float(t))
    i.exec = for_float(t, [&]<class T>() -> Exec { return choose<Op, T, 1>(t); });
  else
    i.exec = for_integer(t, []<class T>() -> Exec { return unary<T, Op>; });
}

// ---- functions of one float. "approx" is computed exactly here: the GPU's last bits differ.
struct Rcp {
  template <class T>
  T operator()(T a) const {
    return T(1) / a;
  }
};
struct Sqrt {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Ex2 {
  template <class T>
  T operator()(T a) const {
    return from_wide<T>(static_cast<decltype(wide(a))>(std::exp2(double(wide(a)))));
  }
};

template <class Op>
void decode_function(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 1);
  i.exec = for_float(t, [&]<class T>() -> Exec {
    if constexpr (sizeof(T) >= 4) return choose<Op, T, 1>(t);
    if constexpr (sizeof(T) == 2 && std::is_same_v<Op, Ex2>) return choose<Op, T, 1>(t);
    return nullptr;
  });
}

struct CopySign {
  template <class T>
  T operator()(T a, T b) const {
    return std::copysign(b, a);
  }  // the sign of a, the magnitude of b
};
void decode_copysign(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 2);
  i.exec = t.size == 8 ? binary<double, CopySign> : binary<float, CopySign>;
}

const Opcodes opcodes{{"add", decode_arithmetic<Add>},
                      {"sub", decode_arithmetic<Sub>},
                      {"mul", decode_mul},
                      {"mad", decode_mad},
                      {"fma", decode_mad},
                      {"div", decode_div},
                      {"rem", decode_rem},
                      {"min", decode_extreme<false>},
                      {"max", decode_extreme<true>},
                      {"abs", decode_sign<Abs>},
                      {"neg", decode_sign<Neg>},
                      {"rcp", decode_function<Rcp>},
                      {"sqrt", decode_function<Sqrt>},
                      {"ex2", decode_function<Ex2>},
                      {"copysign", decode_copysign}};

}  // namespace
}  // namespace gpusim
