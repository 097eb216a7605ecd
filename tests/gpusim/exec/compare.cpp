// Comparison and selection. PTX ISA, "Comparison and Selection Instructions: setp, selp", and setp of half precision.
#include <array>
#include <utility>

#include "elementwise.h"

namespace gpusim {
namespace {

// Two numbers are less, equal, greater, or, with a NaN, unordered; a comparison says which of these it accepts.
enum Relation : uint8_t { kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8 };
const std::map<std::string, int> kComparisons = {
    {"eq", kEqual},
    {"ne", kLess | kGreater},
    {"lt", kLess},
    {"lo", kLess},
    {"le", kLess | kEqual},
    {"ls", kLess | kEqual},
    {"gt", kGreater},
    {"hi", kGreater},
    {"ge", kGreater | kEqual},
    {"hs", kGreater | kEqual},
    {"equ", kEqual | kUnordered},
    {"neu", kLess | kGreater | kUnordered},
    {"ltu", kLess | kUnordered},
    {"leu", kLess | kEqual | kUnordered},
    {"gtu", kGreater | kUnordered},
    {"geu", kGreater | kEqual | kUnordered},
    {"num", kLess | kEqual | kGreater},
    {"nan", kUnordered},
};

template <int kAccepted, class T>
bool related(T a, T b) {
  constexpr bool less = kAccepted & kLess, equal = kAccepted & kEqual, greater = kAccepted & kGreater;
  if constexpr (kAccepted & kUnordered) return !related<15 - kAccepted>(a, b);
  return (less && a < b) || (equal && a == b) || (greater && a > b);
}

enum CombineFlags : uint8_t { kAnd = 1, kOr = 2, kXor = 3, kNegated = 4 };

Mask combine(Warp& w, const Instr& i, Mask r) {
  if (!(i.flags & 3)) return r;
  const Mask c = i.flags & kNegated ? ~w.pred(i.c) : w.pred(i.c);
  return (i.flags & 3) == kAnd ? r & c : (i.flags & 3) == kOr ? r | c : r ^ c;
}
// d = (a op b) combined with c; the second result, list[0], the same with not (a op b).
template <class T, int kAccepted>
Flow setp(Warp& w, const Instr& i, Mask m) {
  Mask r = 0;
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  for (int l = 0; l < kLanes; ++l) r |= static_cast<Mask>(related<kAccepted>(wide(a[l]), wide(b[l]))) << l;
  const Mask first = combine(w, i, r), second = i.list ? combine(w, i, ~r) : 0;
  w.pred(i.d) = (w.pred(i.d) & ~m) | (first & m);
  if (i.list) w.pred(i.list[0]) = (w.pred(i.list[0]) & ~m) | (second & m);
  return Flow::kNext;
}
template <class T, int... kAccepted>
Exec choose(int accepted, std::integer_sequence<int, kAccepted...>) {
  return std::array<Exec, sizeof...(kAccepted)>{setp<T, kAccepted>...}[static_cast<size_t>(accepted)];
}

// setp.op{.bool}.type p{|q}, a, b{, c}
void decode_setp(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  const auto comparison = kComparisons.find(s.words[1]);
  if (comparison == kComparisons.end() || t.packed != 1) return;
  const auto [first, second] = split_pair(s.operands[0]);
  i.d = d.destination(first);
  if (!second.empty()) i.list = d.list({d.destination(second)});
  i.a = d.source(s.operands[1], t);
  i.b = d.source(s.operands[2], t);
  if (s.operands.size() > 3) {
    bool negated;
    i.c = d.predicate(s.operands[3], &negated);
    i.flags = static_cast<uint8_t>((s.has("and") ? kAnd : s.has("or") ? kOr : kXor) | (negated ? kNegated : 0));
  }
  const auto visit = [&]<class T>() -> Exec { return choose<T>(comparison->second, std::make_integer_sequence<int, 15>()); };
  i.exec = is_float(t) ? for_float(t, visit) : for_integer(t, visit);
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
const Opcodes opcodes{{"setp", decode_setp}, {"selp", decode_selp}};

}  // namespace
}  // namespace gpusim
