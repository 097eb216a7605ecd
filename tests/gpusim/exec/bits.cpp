// Logic, shifts and bit fields. PTX ISA, "Logic and Shift Instructions", "Integer Arithmetic Instructions: popc, clz, bfind,
// brev, bfe, bfi", "Data Movement and Conversion Instructions: prmt".
#include <algorithm>

#include "elementwise.h"

namespace gpusim {
namespace {

struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
};

template <class Op>
Flow predicate_logic(Warp& w, const Instr& i, Mask m) {
  const Mask a = w.pred(i.a), b = w.pred(i.b), r = Op()(a, b);
  w.pred(i.d) = (w.pred(i.d) & ~m) | (r & m);
  return Flow::kNext;
}
struct First {
  Mask operator()(Mask a, Mask) const { return a; }
};
struct NotFirst {
  Mask operator()(Mask a, Mask) const { return ~a; }
};

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

// Byte permutation, default mode only.
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

struct Popc {
  template <class T>
  uint32_t operator()(T a) const {
    return __builtin_popcountll(Unsigned<T>(a));
  }
};
struct Clz {
  template <class T>
  uint32_t operator()(T a) const {
    return a ? __builtin_clzll(Unsigned<T>(a)) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
  }
};
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

const Opcodes opcodes{{"and", decode_logic<And>},  {"or", decode_logic<Or>},
                      {"xor", decode_logic<Xor>},  {"not", decode_not},
                      {"shl", decode_shift<true>}, {"shr", decode_shift<false>},
                      {"shf", decode_shf},         {"lop3", decode_lop3},
                      {"prmt", decode_prmt},       {"bfe", decode_bfe},
                      {"bfi", decode_bfi},         {"popc", decode_count<Popc>},
                      {"clz", decode_count<Clz>},  {"bfind", decode_count<Bfind>},
                      {"brev", decode_brev}};

}  // namespace
}  // namespace gpusim
