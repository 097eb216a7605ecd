// Arithmetic, logic, comparison and selection. PTX ISA 9.7.1 (integer), 9.7.2 (extended precision), 9.7.3 (floating point),
// 9.7.4 (half precision), 9.7.6 and 9.7.7 (comparison and selection), 9.7.8 (logic and shift).
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "carry.h"
#include "decoder.h"
#include "floats.h"

namespace gpusim {
namespace {

template <class T, class Op>
Flow unary(Warp& w, const Instr& i, Mask m) {
  const T* a = w.reg<T>(i.a);
  each_lane<T>(w, i.d, m, [=](int l) { return Op()(a[l]); });
  return Flow::kNext;
}
template <class T, class Op>
Flow binary(Warp& w, const Instr& i, Mask m) {
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  each_lane<T>(w, i.d, m, [=](int l) { return Op()(a[l], b[l]); });
  return Flow::kNext;
}
template <class T, class Op>
Flow ternary(Warp& w, const Instr& i, Mask m) {
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b), *c = w.reg<T>(i.c);
  each_lane<T>(w, i.d, m, [=](int l) { return Op()(a[l], b[l], c[l]); });
  return Flow::kNext;
}
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

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// Integer arithmetic wraps, so it is done on unsigned numbers.
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(Unsigned<T>(a) + Unsigned<T>(b));
    else return from_wide<T>(wide(a) + wide(b));
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(Unsigned<T>(a) - Unsigned<T>(b));
    else return from_wide<T>(wide(a) - wide(b));
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(uint64_t(a) * uint64_t(b));
    else return from_wide<T>(wide(a) * wide(b));
  }
};
struct Fma {
  template <class T>
  T operator()(T a, T b, T c) const {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(uint64_t(a) * uint64_t(b) + uint64_t(c));
    else if constexpr (sizeof(T) == 2) return from_double<T>(double(wide(a)) * double(wide(b)) + double(wide(c)));
    else return std::fma(a, b, c);
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
  T operator()(T a, T b, T c) const { return Add()(MulHigh()(a, b), c); }
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
    if constexpr (std::is_integral_v<T>) return a < 0 ? static_cast<T>(Unsigned<T>(0) - Unsigned<T>(a)) : a;
    else if constexpr (sizeof(T) == 2) return T{static_cast<uint16_t>(a.bits & 0x7fff)};
    else return std::fabs(a);
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(Unsigned<T>(0) - Unsigned<T>(a));
    else if constexpr (sizeof(T) == 2) return T{static_cast<uint16_t>(a.bits ^ 0x8000)};
    else return -a;
  }
};
template <class Op>
struct Relu {
  template <class T, class... More>
  T operator()(T a, More... more) const {
    const T r = Op()(a, more...);
    return wide(r) != wide(r) ? canonical_nan<T>() : wide(r) > 0 ? r : T{};
  }
};
template <class Op>
struct Saturated {  // .sat of floats: to [0, 1], NaN to 0
  template <class T, class... More>
  T operator()(T a, More... more) const {
    const auto r = wide(Op()(a, more...));
    return from_wide<T>(r >= 1 ? 1 : r > 0 ? r : 0);
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
  if constexpr (kOperands == 1) return unary<T, Op>;
  else if constexpr (kOperands == 2) return binary<T, Op>;
  else return ternary<T, Op>;
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
    if (s.has("sat")) return choose<Saturated<Op>, T, kOperands>(t);
    if (s.has("relu")) return choose<Relu<Op>, T, kOperands>(t);
    return choose<Op, T, kOperands>(t);
  });
}

void operands(Decoder& d, const Statement& s, Instr& i, Type t, int count) {
  i.d = d.destination(s.operands[0]);
  i.a = d.source(s.operands[1], t);
  if (count > 1) i.b = d.source(s.operands[2], t);
  if (count > 2) i.c = d.source(s.operands[3], t);
}

template <class Op>
void decode_arithmetic(Decoder& d, const Statement& s, Instr& i) {
  if (s.has("cc")) return decode_carry(d, s, i);
  const Type t = d.type_of(s);
  operands(d, s, i, t, 2);
  if (is_float(t)) i.exec = float_op<Op, 2>(s, t);
  else if (!s.has("sat")) i.exec = for_integer(t, []<class T>() -> Exec { return binary<T, Op>; });
}

// d = a * b (+ c) at twice the width of the operands.
template <class T, bool kAdd>
Flow multiply_wide(Warp& w, const Instr& i, Mask m) {
  using Wide = std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 2, int32_t, int64_t>,
                                  std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>>;
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  const Wide* c = w.reg<Wide>(i.c);
  each_lane<Wide>(w, i.d, m, [=](int l) { return static_cast<Wide>(uint64_t(int64_t(a[l]) * int64_t(b[l])) + (kAdd ? uint64_t(c[l]) : 0)); });
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
  if (t.kind == Kind::kFloat) i.exec = for_float(t, []<class T>() -> Exec {
      if constexpr (sizeof(T) >= 4) return binary<T, Div>;
      return nullptr;
    });
  else i.exec = for_integer(t, []<class T>() -> Exec { return binary<T, Div>; });
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
    i.exec = for_float(t, [&]<class T>() -> Exec {
      return s.has("NaN") ? choose<Extreme<kMax, true>, T, 2>(t) : choose<Extreme<kMax, false>, T, 2>(t);
    });
  }
}

template <class Op>
void decode_sign(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 1);
  if (is_float(t)) i.exec = for_float(t, [&]<class T>() -> Exec { return choose<Op, T, 1>(t); });
  else i.exec = for_integer(t, []<class T>() -> Exec { return unary<T, Op>; });
}

// ---- functions of one float. "approx" is computed exactly here: the GPU's last bits differ.
struct Rcp { template <class T> T operator()(T a) const { return T(1) / a; } };
struct Sqrt { template <class T> T operator()(T a) const { return std::sqrt(a); } };
struct Rsqrt { template <class T> T operator()(T a) const { return T(1 / std::sqrt(double(a))); } };
struct Sin { template <class T> T operator()(T a) const { return T(std::sin(double(a))); } };
struct Cos { template <class T> T operator()(T a) const { return T(std::cos(double(a))); } };
struct Lg2 { template <class T> T operator()(T a) const { return T(std::log2(double(a))); } };
struct Ex2 { template <class T> T operator()(T a) const { return from_wide<T>(static_cast<decltype(wide(a))>(std::exp2(double(wide(a))))); } };
struct Tanh { template <class T> T operator()(T a) const { return from_wide<T>(static_cast<decltype(wide(a))>(std::tanh(double(wide(a))))); } };

template <class Op>
void decode_function(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 1);
  i.exec = for_float(t, [&]<class T>() -> Exec {
    if constexpr (sizeof(T) >= 4) return choose<Op, T, 1>(t);
    if constexpr (sizeof(T) == 2 && (std::is_same_v<Op, Ex2> || std::is_same_v<Op, Tanh>)) return choose<Op, T, 1>(t);
    return nullptr;
  });
}

struct CopySign {
  template <class T>
  T operator()(T a, T b) const { return std::copysign(b, a); }  // the sign of a, the magnitude of b
};
void decode_copysign(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 2);
  i.exec = t.size == 8 ? binary<double, CopySign> : binary<float, CopySign>;
}

// ---- logic and shifts
struct And { template <class T> T operator()(T a, T b) const { return a & b; } };
struct Or { template <class T> T operator()(T a, T b) const { return a | b; } };
struct Xor { template <class T> T operator()(T a, T b) const { return a ^ b; } };
struct Not { template <class T> T operator()(T a) const { return static_cast<T>(~a); } };
struct Cnot { template <class T> T operator()(T a) const { return a == 0; } };

template <class Op>
Flow predicate_logic(Warp& w, const Instr& i, Mask m) {
  const Mask a = w.pred(i.a), b = w.pred(i.b), r = Op()(a, b);
  w.pred(i.d) = (w.pred(i.d) & ~m) | (r & m);
  return Flow::kNext;
}
struct First { Mask operator()(Mask a, Mask) const { return a; } };
struct NotFirst { Mask operator()(Mask a, Mask) const { return ~a; } };

template <class Op>
void decode_logic(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 2);
  i.exec = t.kind == Kind::kPredicate ? predicate_logic<Op> : for_integer(t, []<class T>() -> Exec { return binary<T, Op>; });
}
void decode_not(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 1);
  i.exec = t.kind == Kind::kPredicate ? predicate_logic<NotFirst> : for_integer(t, []<class T>() -> Exec { return unary<T, Not>; });
}
void decode_cnot(Decoder& d, const Statement& s, Instr& i) {
  operands(d, s, i, d.type_of(s), 1);
  i.exec = for_integer(d.type_of(s), []<class T>() -> Exec { return unary<T, Cnot>; });
}

// The amount has 32 bits and is clamped at the width.
template <class T, bool kLeft>
Flow shift(Warp& w, const Instr& i, Mask m) {
  const T* a = w.reg<T>(i.a);
  const uint32_t* n = w.reg<uint32_t>(i.b);
  constexpr uint32_t bits = 8 * sizeof(T);
  each_lane<T>(w, i.d, m, [=](int l) -> T {
    if (kLeft) return n[l] >= bits ? T(0) : static_cast<T>(uint64_t(a[l]) << n[l]);
    const uint32_t most = std::is_signed_v<T> ? bits - 1 : bits;
    return n[l] >= most ? static_cast<T>(std::is_signed_v<T> ? a[l] >> (bits - 1) : 0) : static_cast<T>(a[l] >> n[l]);
  });
  return Flow::kNext;
}
template <bool kLeft>
void decode_shift(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  i.d = d.destination(s.operands[0]);
  i.a = d.source(s.operands[1], t);
  i.b = d.source(s.operands[2], kU32);
  i.exec = for_integer(t, []<class T>() -> Exec { return shift<T, kLeft>; });
}

// Funnel shift: the 64-bit number b:a, its upper or lower half after the shift. flags: 1 left, 2 wrap.
Flow funnel(Warp& w, const Instr& i, Mask m) {
  const uint32_t *a = w.reg<uint32_t>(i.a), *b = w.reg<uint32_t>(i.b), *c = w.reg<uint32_t>(i.c);
  each_lane<uint32_t>(w, i.d, m, [&](int l) {
    const uint32_t n = i.flags & 2 ? c[l] & 31 : std::min(c[l], 32u);
    const uint64_t both = uint64_t(b[l]) << 32 | a[l];
    return static_cast<uint32_t>(i.flags & 1 ? (both << n) >> 32 : both >> n);
  });
  return Flow::kNext;
}
void decode_shf(Decoder& d, const Statement& s, Instr& i) {
  operands(d, s, i, kU32, 3);
  i.flags = static_cast<uint8_t>((s.has("l") ? 1 : 0) | (s.has("wrap") ? 2 : 0));
  i.exec = funnel;
}

Flow lop3(Warp& w, const Instr& i, Mask m) {
  const uint32_t *a = w.reg<uint32_t>(i.a), *b = w.reg<uint32_t>(i.b), *c = w.reg<uint32_t>(i.c);
  each_lane<uint32_t>(w, i.d, m, [=, t = i.imm](int l) {
    uint32_t r = 0;
    for (int k = 0; k < 8; ++k)
      if (t >> k & 1) r |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
    return r;
  });
  return Flow::kNext;
}
void decode_lop3(Decoder& d, const Statement& s, Instr& i) {
  if (s.words[1] != "b32") return;
  operands(d, s, i, kU32, 3);
  i.imm = parse_integer(s.operands[4]);
  i.exec = lop3;
}

// PTX ISA 9.7.9.7: byte permutation, default mode only.
Flow prmt(Warp& w, const Instr& i, Mask m) {
  const uint32_t *a = w.reg<uint32_t>(i.a), *b = w.reg<uint32_t>(i.b), *c = w.reg<uint32_t>(i.c);
  each_lane<uint32_t>(w, i.d, m, [=](int l) {
    const uint64_t both = uint64_t(b[l]) << 32 | a[l];
    uint32_t r = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t selector = c[l] >> (4 * k) & 15, byte = both >> (8 * (selector & 7)) & 255;
      r |= (selector & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * k);
    }
    return r;
  });
  return Flow::kNext;
}
void decode_prmt(Decoder& d, const Statement& s, Instr& i) {
  operands(d, s, i, kU32, 3);
  if (s.words.size() == 2) i.exec = prmt;
}

template <class T>
Flow bfe(Warp& w, const Instr& i, Mask m) {
  const T* a = w.reg<T>(i.a);
  const uint32_t *p = w.reg<uint32_t>(i.b), *n = w.reg<uint32_t>(i.c);
  constexpr int bits = 8 * sizeof(T);
  each_lane<T>(w, i.d, m, [=](int l) -> T {
    const int at = p[l] & 255, length = n[l] & 255;
    T r = 0;
    const int sign_at = std::min(at + length - 1, bits - 1);
    const bool sign = std::is_signed_v<T> && length && (a[l] >> sign_at & 1);
    for (int k = 0; k < bits; ++k) {
      const bool bit = k < length && at + k < bits ? a[l] >> (at + k) & 1 : sign;
      r |= static_cast<T>(Unsigned<T>(bit) << k);
    }
    return r;
  });
  return Flow::kNext;
}
void decode_bfe(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  i.d = d.destination(s.operands[0]);
  i.a = d.source(s.operands[1], t);
  i.b = d.source(s.operands[2], kU32);
  i.c = d.source(s.operands[3], kU32);
  i.exec = for_integer(t, []<class T>() -> Exec { return bfe<T>; });
}
template <class T>
Flow bfi(Warp& w, const Instr& i, Mask m) {
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  const uint32_t *p = w.reg<uint32_t>(i.c), *n = w.reg<uint32_t>(i.list[0]);
  each_lane<T>(w, i.d, m, [=](int l) -> T {
    T r = b[l];
    for (uint32_t k = 0; k < (n[l] & 255) && (p[l] & 255) + k < 8 * sizeof(T); ++k) {
      const T bit = T(1) << ((p[l] & 255) + k);
      r = a[l] >> k & 1 ? r | bit : r & ~bit;
    }
    return r;
  });
  return Flow::kNext;
}
void decode_bfi(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  i.d = d.destination(s.operands[0]);
  i.a = d.source(s.operands[1], t);
  i.b = d.source(s.operands[2], t);
  i.c = d.source(s.operands[3], kU32);
  i.list = d.list({d.source(s.operands[4], kU32)});
  i.exec = t.size == 8 ? bfi<uint64_t> : bfi<uint32_t>;
}

struct Popc { template <class T> uint32_t operator()(T a) const { return __builtin_popcountll(Unsigned<T>(a)); } };
struct Clz { template <class T> uint32_t operator()(T a) const { return a ? __builtin_clzll(Unsigned<T>(a)) - (64 - 8 * sizeof(T)) : 8 * sizeof(T); } };
struct Bfind {
  template <class T>
  uint32_t operator()(T a) const {
    if (std::is_signed_v<T> && a < 0) a = ~a;
    return a ? 63 - __builtin_clzll(Unsigned<T>(a)) : 0xffffffffu;
  }
};
template <class T, class Op>
Flow count_bits(Warp& w, const Instr& i, Mask m) {
  const T* a = w.reg<T>(i.a);
  each_lane<uint32_t>(w, i.d, m, [&](int l) { return i.flags && Op()(a[l]) < 64 ? 8 * sizeof(T) - 1 - Op()(a[l]) : Op()(a[l]); });
  return Flow::kNext;
}
template <class Op>
void decode_count(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 1);
  i.flags = s.has("shiftamt");
  i.exec = for_integer(t, []<class T>() -> Exec { return count_bits<T, Op>; });
}
struct Reverse {
  template <class T>
  T operator()(T a) const {
    T r = 0;
    for (unsigned k = 0; k < 8 * sizeof(T); ++k) r |= (a >> k & T(1)) << (8 * sizeof(T) - 1 - k);
    return r;
  }
};
void decode_brev(Decoder& d, const Statement& s, Instr& i) {
  operands(d, s, i, d.type_of(s), 1);
  i.exec = d.type_of(s).size == 8 ? unary<uint64_t, Reverse> : unary<uint32_t, Reverse>;
}

// ---- comparison
struct Eq { template <class T> bool operator()(T a, T b) const { return a == b; } };
struct Ne { template <class T> bool operator()(T a, T b) const { return a < b || a > b; } };  // false with NaN
struct Lt { template <class T> bool operator()(T a, T b) const { return a < b; } };
struct Le { template <class T> bool operator()(T a, T b) const { return a <= b; } };
struct Gt { template <class T> bool operator()(T a, T b) const { return a > b; } };
struct Ge { template <class T> bool operator()(T a, T b) const { return a >= b; } };
struct Equ { template <class T> bool operator()(T a, T b) const { return !(a < b || a > b); } };
struct Neu { template <class T> bool operator()(T a, T b) const { return !(a == b); } };
struct Ltu { template <class T> bool operator()(T a, T b) const { return !(a >= b); } };
struct Leu { template <class T> bool operator()(T a, T b) const { return !(a > b); } };
struct Gtu { template <class T> bool operator()(T a, T b) const { return !(a <= b); } };
struct Geu { template <class T> bool operator()(T a, T b) const { return !(a < b); } };
struct Num { template <class T> bool operator()(T a, T b) const { return a == a && b == b; } };
struct Nan { template <class T> bool operator()(T a, T b) const { return a != a || b != b; } };

enum CombineFlags : uint8_t { kAnd = 1, kOr = 2, kXor = 3, kNegated = 4 };

template <class T, class Op>
Mask compare(Warp& w, const Instr& i) {
  Mask r = 0;
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  for (int l = 0; l < kLanes; ++l) r |= static_cast<Mask>(Op()(wide(a[l]), wide(b[l]))) << l;
  return r;
}
Mask combine(Warp& w, const Instr& i, Mask r) {
  if (!(i.flags & 3)) return r;
  const Mask c = i.flags & kNegated ? ~w.pred(i.c) : w.pred(i.c);
  return (i.flags & 3) == kAnd ? r & c : (i.flags & 3) == kOr ? r | c : r ^ c;
}
// d = (a op b) combined with c; the second result, list[0], the same with not (a op b).
template <class T, class Op>
Flow setp(Warp& w, const Instr& i, Mask m) {
  const Mask r = compare<T, Op>(w, i), first = combine(w, i, r), second = i.list ? combine(w, i, ~r) : 0;
  w.pred(i.d) = (w.pred(i.d) & ~m) | (first & m);
  if (i.list) w.pred(i.list[0]) = (w.pred(i.list[0]) & ~m) | (second & m);
  return Flow::kNext;
}
template <class T, class Op>
Flow set(Warp& w, const Instr& i, Mask m) {
  const Mask r = combine(w, i, compare<T, Op>(w, i));
  each_lane<uint32_t>(w, i.d, m, [&](int l) { return r >> l & 1 ? i.width == 1 ? 0x3f800000u : 0xffffffffu : 0u; });
  return Flow::kNext;
}
// f16x2: two predicates, one per half.
template <class T, class Op>
Flow setp_packed(Warp& w, const Instr& i, Mask m) {
  Mask low = 0, high = 0;
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  for (int l = 0; l < kLanes; ++l) {
    low |= static_cast<Mask>(Op()(wide(a[2 * l]), wide(b[2 * l]))) << l;
    high |= static_cast<Mask>(Op()(wide(a[2 * l + 1]), wide(b[2 * l + 1]))) << l;
  }
  w.pred(i.d) = (w.pred(i.d) & ~m) | (low & m);
  if (i.list) w.pred(i.list[0]) = (w.pred(i.list[0]) & ~m) | (high & m);
  return Flow::kNext;
}

template <template <class, class> class Run, class Visit>
Exec comparison(const std::string& op, const Visit& visit) {
#define GPUSIM_COMPARE(name, Op) \
  if (op == name) return visit([]<class T>() -> Exec { return Run<T, Op>::exec; });
  GPUSIM_COMPARE("eq", Eq)
  GPUSIM_COMPARE("ne", Ne)
  GPUSIM_COMPARE("lt", Lt)
  GPUSIM_COMPARE("lo", Lt)
  GPUSIM_COMPARE("le", Le)
  GPUSIM_COMPARE("ls", Le)
  GPUSIM_COMPARE("gt", Gt)
  GPUSIM_COMPARE("hi", Gt)
  GPUSIM_COMPARE("ge", Ge)
  GPUSIM_COMPARE("hs", Ge)
  GPUSIM_COMPARE("equ", Equ)
  GPUSIM_COMPARE("neu", Neu)
  GPUSIM_COMPARE("ltu", Ltu)
  GPUSIM_COMPARE("leu", Leu)
  GPUSIM_COMPARE("gtu", Gtu)
  GPUSIM_COMPARE("geu", Geu)
  GPUSIM_COMPARE("num", Num)
  GPUSIM_COMPARE("nan", Nan)
#undef GPUSIM_COMPARE
  return nullptr;
}
template <class T, class Op>
struct Setp { static constexpr Exec exec = setp<T, Op>; };
template <class T, class Op>
struct Set { static constexpr Exec exec = set<T, Op>; };
template <class T, class Op>
struct SetpPacked { static constexpr Exec exec = setp_packed<T, Op>; };

// setp.op{.bool}.type p{|q}, a, b{, c}
void decode_setp(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  if (s.words[0] == "setp") {
    const std::string& results = s.operands[0];
    const size_t bar = results.find('|');
    i.d = d.destination(std::string(trim(results.substr(0, bar))));
    if (bar != std::string::npos) i.list = d.list({d.destination(std::string(trim(results.substr(bar + 1))))});
  } else {
    i.d = d.destination(s.operands[0]);
    i.width = d.type_of(s, 1).kind == Kind::kFloat ? 1 : 4;
  }
  i.a = d.source(s.operands[1], t);
  i.b = d.source(s.operands[2], t);
  if (s.operands.size() > 3) {
    bool negated;
    i.c = d.predicate(s.operands[3], &negated);
    i.flags = static_cast<uint8_t>((s.has("and") ? kAnd : s.has("or") ? kOr : kXor) | (negated ? kNegated : 0));
  }
  const auto visit = [&](const auto& f) -> Exec { return is_float(t) ? for_float(t, f) : for_integer(t, f); };
  const auto halves = [&](const auto& f) -> Exec {
    return t.kind == Kind::kHalf ? f.template operator()<Half>() : f.template operator()<BFloat>();
  };
  if (s.words[0] == "set") i.exec = t.packed == 1 ? comparison<Set>(s.words[1], visit) : nullptr;
  else i.exec = t.packed == 1 ? comparison<Setp>(s.words[1], visit) : comparison<SetpPacked>(s.words[1], halves);
}

template <class T>
Flow selp(Warp& w, const Instr& i, Mask m) {
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  const Mask p = i.flags ? ~w.pred(i.c) : w.pred(i.c);
  each_lane<T>(w, i.d, m, [=](int l) { return p >> l & 1 ? a[l] : b[l]; });
  return Flow::kNext;
}
void decode_selp(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  operands(d, s, i, t, 2);
  bool negated;
  i.c = d.predicate(s.operands[3], &negated);
  i.flags = negated;
  i.exec = t.bytes() == 2 ? selp<uint16_t> : t.bytes() == 4 ? selp<uint32_t> : selp<uint64_t>;
}
template <class T, class C>
Flow slct(Warp& w, const Instr& i, Mask m) {
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  const C* c = w.reg<C>(i.c);
  each_lane<T>(w, i.d, m, [=](int l) { return c[l] >= 0 ? a[l] : b[l]; });
  return Flow::kNext;
}
void decode_slct(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s, 1), c = d.type_of(s);
  operands(d, s, i, t, 2);
  i.c = d.source(s.operands[3], c);
  if (t.size == 4) i.exec = c.kind == Kind::kFloat ? slct<uint32_t, float> : slct<uint32_t, int32_t>;
  if (t.size == 8) i.exec = c.kind == Kind::kFloat ? slct<uint64_t, float> : slct<uint64_t, int32_t>;
}

Flow testp(Warp& w, const Instr& i, Mask m) {
  Mask r = 0;
  for (int l = 0; l < kLanes; ++l) {
    const double v = i.width == 8 ? w.reg<double>(i.a)[l] : w.reg<float>(i.a)[l];
    const bool is[] = {std::isfinite(v), std::isinf(v), v == v, v != v};
    r |= static_cast<Mask>(is[i.flags]) << l;
  }
  w.pred(i.d) = (w.pred(i.d) & ~m) | (r & m);
  return Flow::kNext;
}
void decode_testp(Decoder& d, const Statement& s, Instr& i) {
  operands(d, s, i, d.type_of(s), 1);
  i.width = d.type_of(s).size;
  const std::string& test = s.words[1];
  i.flags = test == "finite" ? 0 : test == "infinite" ? 1 : test == "number" ? 2 : 3;
  if (test == "finite" || test == "infinite" || test == "number" || test == "notanumber") i.exec = testp;
}

const Opcodes opcodes{
    {"add", decode_arithmetic<Add>}, {"sub", decode_arithmetic<Sub>}, {"mul", decode_mul}, {"mad", decode_mad}, {"fma", decode_mad},
    {"div", decode_div}, {"rem", decode_rem}, {"min", decode_extreme<false>}, {"max", decode_extreme<true>}, {"abs", decode_sign<Abs>},
    {"neg", decode_sign<Neg>}, {"rcp", decode_function<Rcp>}, {"sqrt", decode_function<Sqrt>}, {"rsqrt", decode_function<Rsqrt>},
    {"sin", decode_function<Sin>}, {"cos", decode_function<Cos>}, {"lg2", decode_function<Lg2>}, {"ex2", decode_function<Ex2>},
    {"tanh", decode_function<Tanh>}, {"copysign", decode_copysign}, {"testp", decode_testp}, {"and", decode_logic<And>},
    {"or", decode_logic<Or>}, {"xor", decode_logic<Xor>}, {"not", decode_not}, {"cnot", decode_cnot}, {"shl", decode_shift<true>},
    {"shr", decode_shift<false>}, {"shf", decode_shf}, {"lop3", decode_lop3}, {"prmt", decode_prmt}, {"bfe", decode_bfe},
    {"bfi", decode_bfi}, {"popc", decode_count<Popc>}, {"clz", decode_count<Clz>}, {"bfind", decode_count<Bfind>}, {"brev", decode_brev},
    {"setp", decode_setp}, {"set", decode_setp}, {"selp", decode_selp}, {"slct", decode_slct}};

}  // namespace
}  // namespace gpusim
