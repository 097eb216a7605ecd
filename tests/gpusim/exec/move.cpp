// Moves and conversions. PTX ISA, "Data Movement and Conversion Instructions: mov, cvt, cvta, mapa".
#include <algorithm>
#include <cmath>
#include <limits>

#include "decoder.h"
#include "floats.h"

namespace gpusim {
namespace {

template <class T>
Flow move(Warp& w, const Instr& i, Mask m) {
  const T* a = w.reg<T>(i.a);
  each_lane<T>(w, i.d, m, [=](int l) { return a[l]; });
  return Flow::kNext;
}
Flow move_predicate(Warp& w, const Instr& i, Mask m) {
  w.pred(i.d) = (w.pred(i.d) & ~m) | (w.pred(i.a) & m);
  return Flow::kNext;
}
// d = {list[0], list[1], ...}, `width` bytes each.
Flow pack(Warp& w, const Instr& i, Mask m) {
  for_lanes(m, [&](int l) {
    uint64_t value = 0;
    for (int k = 0; k < i.count; ++k) value |= (get(w, i.list[k], i.width, l)) << (8 * i.width * k);
    put(w, i.d, i.width * i.count, l, value);
  });
  return Flow::kNext;
}
Flow unpack(Warp& w, const Instr& i, Mask m) {
  for_lanes(m, [&](int l) {
    const uint64_t value = get(w, i.a, i.width * i.count, l);
    for (int k = 0; k < i.count; ++k)
      if (i.list[k]) put(w, i.list[k], i.width, l, value >> (8 * i.width * k));
  });
  return Flow::kNext;
}
// The clock counts this launch's instructions: it rises, and that is all a program may rely on.
Flow move_clock(Warp& w, const Instr& i, Mask m) {
  const uint64_t now = w.cta->cluster->launch->counters.instructions;
  for_lanes(m, [&](int l) { put(w, i.d, i.width, l, now); });
  return Flow::kNext;
}

void decode_mov(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  const std::string &to = s.operands[0], &from = s.operands[1];
  if (t.kind == Kind::kPredicate) {
    i.d = d.destination(to);
    i.a = d.source(from, t);
    i.exec = move_predicate;
    return;
  }
  if (from.rfind("%clock", 0) == 0 || from.rfind("%globaltimer", 0) == 0) {
    i.d = d.destination(to);
    i.width = t.size;
    i.exec = move_clock;
    return;
  }
  if (from[0] == '{' || to[0] == '{') {
    std::vector<uint32_t> registers;
    const bool packing = from[0] == '{';
    const auto parts = Decoder::elements(packing ? from : to);
    i.count = static_cast<uint8_t>(parts.size());
    i.width = static_cast<uint8_t>(t.bytes() / i.count);
    if (i.width < 2 || t.bytes() > 8) return;
    const Type part{Kind::kBits, i.width};
    for (const std::string& p : parts) registers.push_back(packing ? d.source(p, part) : p == "_" ? 0 : d.destination(p));
    i.list = d.list(registers);
    (packing ? i.d : i.a) = packing ? d.destination(to) : d.source(from, t);
    i.exec = packing ? pack : unpack;
    return;
  }
  const Slot slot = d.slot(from, t);
  if (slot.predicate) {  // mov.u32 %r, %is_explicit_cluster does not exist; a predicate is moved as one
    i.d = d.destination(to);
    i.a = slot.offset;
    i.exec = move_predicate;
    return;
  }
  i.d = d.destination(to);
  i.a = d.source(from, t);
  i.exec = t.bytes() == 2 ? move<uint16_t> : t.bytes() == 4 ? move<uint32_t> : move<uint64_t>;
}

// ---- cvt. flags of an Instr: rounding in the low bits, then:
enum CvtFlags : uint8_t { kSaturate = 16, kRelu = 32, kIntegral = 64 };

template <class S>
double as_double(S v) {
  return static_cast<double>(wide(v));
}

template <class D, class S>
D convert(S v, uint8_t flags) {
  const Rounding r = static_cast<Rounding>(flags & 15);
  if constexpr (std::is_integral_v<D> && std::is_integral_v<S>) {
    if (flags & kSaturate) {
      const __int128 low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
      return static_cast<D>(std::clamp<__int128>(v, low, high));
    }
    return static_cast<D>(v);
  } else if constexpr (std::is_integral_v<D>) {  // float to integer always saturates; NaN is 0 (the sign bit for 64 bits)
    const double x = round_units(as_double(v), r);
    if (x != x) return sizeof(D) == 8 ? static_cast<D>(uint64_t{1} << 63) : D(0);
    if (x >= std::ldexp(1.0, std::numeric_limits<D>::digits)) return std::numeric_limits<D>::max();
    if (x <= static_cast<double>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
    return static_cast<D>(x);
  } else {
    if constexpr (std::is_same_v<D, S>)
      if (!(flags & (kIntegral | kSaturate | kRelu))) return v;
    if constexpr (std::is_integral_v<S> && sizeof(S) == 8) {  // 64 bits do not fit into a double: round once, from the integer
      if constexpr (std::is_same_v<D, float> || std::is_same_v<D, double>)
        if (r == Rounding::kNearest) return static_cast<D>(v);
    }
    double x = as_double(v);
    if (flags & kIntegral) x = round_units(x, r);
    if (flags & kSaturate) x = x >= 1 ? 1 : x > 0 ? x : 0;
    if ((flags & kRelu) && x < 0) x = 0;
    const Rounding rounding = flags & kIntegral ? Rounding::kNearest : r;
    if constexpr (std::is_same_v<D, Half>)
      return to_half(x, rounding);
    else if constexpr (std::is_same_v<D, BFloat>)
      return to_bfloat(x, rounding);
    else if constexpr (std::is_same_v<D, float>)
      return rounding == Rounding::kNearest ? static_cast<float>(x) : static_cast<float>(round_to_format(x, 23, -126, 127, rounding));
    else
      return x;
  }
}

// The usual case: registers exactly as wide as the types.
template <class D, class S>
Flow cvt(Warp& w, const Instr& i, Mask m) {
  const S* a = w.reg<S>(i.a);
  each_lane<D>(w, i.d, m, [a, flags = i.flags](int l) { return convert<D>(a[l], flags); });
  return Flow::kNext;
}
// Registers of other widths (width: of the destination, count: of the source); a signed result is extended by its sign.
template <class D, class S>
Flow cvt_wide(Warp& w, const Instr& i, Mask m) {
  for_lanes(m, [&](int l) {
    const uint64_t raw = get(w, i.a, i.count, l);
    S value;
    std::memcpy(&value, &raw, sizeof(S));
    const D result = convert<D>(value, i.flags);
    if constexpr (std::is_integral_v<D>) {
      put(w, i.d, i.width, l, static_cast<uint64_t>(static_cast<int64_t>(result)));
    } else {
      uint64_t bits = 0;
      std::memcpy(&bits, &result, sizeof(D));
      put(w, i.d, i.width, l, bits);
    }
  });
  return Flow::kNext;
}

template <class F>
Exec for_any(Type t, const F& f) {
  if (t.kind == Kind::kSigned && t.size == 1) return f.template operator()<int8_t>();
  if (t.size == 1) return f.template operator()<uint8_t>();
  return is_float(t) ? for_float(t, f) : for_integer(t, f);
}

// cvt.f16x2.f32 d, a, b: a becomes the upper half.
template <class D>
Flow cvt_pair(Warp& w, const Instr& i, Mask m) {
  const float *a = w.reg<float>(i.a), *b = w.reg<float>(i.b);
  each_lane<uint32_t>(w, i.d, m,
                      [=, flags = i.flags](int l) { return uint32_t{convert<D>(a[l], flags).bits} << 16 | convert<D>(b[l], flags).bits; });
  return Flow::kNext;
}
void decode_cvt(Decoder& d, const Statement& s, Instr& i) {
  const Type from = d.type_of(s), to = d.type_of(s, 1);
  Rounding r = Rounding::kNearest;
  bool integral = false;
  for (const std::string& word : s.words) {
    if (word == "rz" || word == "rzi") r = Rounding::kZero;
    if (word == "rm" || word == "rmi") r = Rounding::kDown;
    if (word == "rp" || word == "rpi") r = Rounding::kUp;
    if (word == "rna") r = Rounding::kAway;
    integral |= word == "rni" || word == "rzi" || word == "rmi" || word == "rpi";
  }
  i.flags = static_cast<uint8_t>(static_cast<int>(r) | (s.has("sat") ? kSaturate : 0) | (s.has("relu") ? kRelu : 0) |
                                 (integral && is_float(from) && is_float(to) ? kIntegral : 0));
  i.d = d.destination(s.operands[0]);
  if (to.packed == 2 && from.kind == Kind::kFloat && s.operands.size() == 3) {
    i.a = d.source(s.operands[1], from);
    i.b = d.source(s.operands[2], from);
    i.exec = to.kind == Kind::kHalf ? cvt_pair<Half> : cvt_pair<BFloat>;
    return;
  }
  if (to.packed == 2 || from.packed == 2 || to.kind == Kind::kTf32) return;
  const Slot a = d.slot(s.operands[1], from), result = d.slot(s.operands[0], to);
  i.a = a.offset;
  i.count = a.width;
  i.width = result.width;
  const bool same = a.width == from.size && result.width == to.size;
  i.exec = for_any(to, [&]<class D>() { return for_any(from, [&]<class S>() -> Exec { return same ? cvt<D, S> : cvt_wide<D, S>; }); });
}

// ---- addresses
uint64_t window_of(uint8_t space) {
  return space == kShared ? Memory::get().shared_window : space == kLocal ? Memory::get().local_window : 0;
}
Flow cvta(Warp& w, const Instr& i, Mask m) {
  const uint64_t window = window_of(i.space);
  for_lanes(m, [&](int l) {
    const uint64_t a = get(w, i.a, i.count, l);
    put(w, i.d, i.width, l, i.flags ? a - window : a + window);
  });
  return Flow::kNext;
}
void decode_cvta(Decoder& d, const Statement& s, Instr& i) {
  i.flags = s.has("to");
  i.space = space_of(s);
  i.d = d.destination(s.operands[0]);
  const Slot a = d.slot(s.operands[1], d.type_of(s));
  i.a = a.offset;
  i.count = a.width;
  i.width = d.slot(s.operands[0], kU64).width;
  i.exec = cvta;
}
// mapa: the same offset in the shared memory of another CTA of the cluster.
Flow mapa(Warp& w, const Instr& i, Mask m) {
  for_lanes(m, [&](int l) {
    const uint64_t a = get(w, i.a, i.width, l);
    const uint64_t window = i.flags ? window_of(kShared) : 0, offset = (a - window) & ((1u << kRankShift) - 1);
    put(w, i.d, i.width, l, window + (uint64_t{w.reg<uint32_t>(i.b)[l] + 1} << kRankShift) + offset);
  });
  return Flow::kNext;
}
void decode_mapa(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  i.flags = !s.has("shared::cluster");
  i.d = d.destination(s.operands[0]);
  i.a = d.source(s.operands[1], t);
  i.b = d.source(s.operands[2], kU32);
  i.width = t.size;
  i.exec = mapa;
}
const Opcodes opcodes{{"mov", decode_mov}, {"cvt", decode_cvt}, {"cvta", decode_cvta}, {"mapa", decode_mapa}};

}  // namespace
}  // namespace gpusim
