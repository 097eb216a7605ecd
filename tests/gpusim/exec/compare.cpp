// Comparison and selection. PTX ISA 9.7.6 (set, setp, selp, slct), 9.7.7 (half precision), 9.7.3.1 (testp).
#include <cmath>

#include "elementwise.h"

namespace gpusim {
namespace {

struct Eq {
  template <class T>
  bool operator()(T a, T b) const {
    return a == b;
  }
};
struct Ne {
  template <class T>
  bool operator()(T a, T b) const {
    return a < b || a > b;
  }
};  // false with NaN
struct Lt {
  template <class T>
  bool operator()(T a, T b) const {
    return a < b;
  }
};
struct Le {
  template <class T>
  bool operator()(T a, T b) const {
    return a <= b;
  }
};
struct Gt {
  template <class T>
  bool operator()(T a, T b) const {
    return a > b;
  }
};
struct Ge {
  template <class T>
  bool operator()(T a, T b) const {
    return a >= b;
  }
};
struct Equ {
  template <class T>
  bool operator()(T a, T b) const {
    return !(a < b || a > b);
  }
};
struct Neu {
  template <class T>
  bool operator()(T a, T b) const {
    return !(a == b);
  }
};
struct Ltu {
  template <class T>
  bool operator()(T a, T b) const {
    return !(a >= b);
  }
};
struct Leu {
  template <class T>
  bool operator()(T a, T b) const {
    return !(a > b);
  }
};
struct Gtu {
  template <class T>
  bool operator()(T a, T b) const {
    return !(a <= b);
  }
};
struct Geu {
  template <class T>
  bool operator()(T a, T b) const {
    return !(a < b);
  }
};
struct Num {
  template <class T>
  bool operator()(T a, T b) const {
    return a == a && b == b;
  }
};
struct Nan {
  template <class T>
  bool operator()(T a, T b) const {
    return a != a || b != b;
  }
};

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
struct Setp {
  static constexpr Exec exec = setp<T, Op>;
};
template <class T, class Op>
struct Set {
  static constexpr Exec exec = set<T, Op>;
};
template <class T, class Op>
struct SetpPacked {
  static constexpr Exec exec = setp_packed<T, Op>;
};

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
  if (s.words[0] == "set")
    i.exec = t.packed == 1 ? comparison<Set>(s.words[1], visit) : nullptr;
  else
    i.exec = t.packed == 1 ? comparison<Setp>(s.words[1], visit) : comparison<SetpPacked>(s.words[1], halves);
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

const Opcodes opcodes{{"setp", decode_setp}, {"set", decode_setp}, {"selp", decode_selp}, {"slct", decode_slct}, {"testp", decode_testp}};

}  // namespace
}  // namespace gpusim
