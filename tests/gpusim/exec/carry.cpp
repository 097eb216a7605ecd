// Extended-precision integer arithmetic: add.cc, addc, sub.cc, subc, mad.cc, madc. PTX ISA,
// "Extended-Precision Integer Arithmetic Instructions". The carry is one predicate.
#include "carry.h"

namespace gpusim {
namespace {

enum CarryFlags : uint8_t { kIn = 1, kOut = 2, kSubtract = 4, kLow = 8, kHigh = 16 };

template <class T>
Flow with_carry(Warp& w, const Instr& i, Mask m) {
  using Wide = unsigned __int128;
  Mask& carry = w.pred(i.list[0]);
  Mask out = 0;
  for_lanes(m, [&](int l) {
    T x = w.reg<T>(i.a)[l], y = w.reg<T>(i.flags & (kLow | kHigh) ? i.c : i.b)[l];
    if (i.flags & (kLow | kHigh)) {
      if (i.count) {  // signed
        const auto product = static_cast<__int128>(std::make_signed_t<T>(x)) * std::make_signed_t<T>(w.reg<T>(i.b)[l]);
        x = static_cast<T>(i.flags & kHigh ? product >> (8 * sizeof(T)) : product);
      } else {
        const Wide product = static_cast<Wide>(x) * w.reg<T>(i.b)[l];
        x = static_cast<T>(i.flags & kHigh ? product >> (8 * sizeof(T)) : product);
      }
    }
    const Wide in = i.flags & kIn ? carry >> l & 1 : 0;
    const Wide sum = i.flags & kSubtract ? static_cast<Wide>(x) - y - in : static_cast<Wide>(x) + y + in;
    w.reg<T>(i.d)[l] = static_cast<T>(sum);
    out |= static_cast<Mask>(sum >> (8 * sizeof(T)) & 1) << l;
  });
  if (i.flags & kOut) carry = (carry & ~m) | out;
  return Flow::kNext;
}

}  // namespace

void decode_carry(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  const std::string& op = s.words[0];
  const bool multiply = op.rfind("mad", 0) == 0;
  i.flags = static_cast<uint8_t>((op.back() == 'c' ? kIn : 0) | (s.has("cc") ? kOut : 0) | (op.rfind("sub", 0) == 0 ? kSubtract : 0) |
                                 (multiply ? s.has("hi") ? kHigh : kLow : 0));
  i.d = d.destination(s.operands[0]);
  i.a = d.source(s.operands[1], t);
  i.b = d.source(s.operands[2], t);
  if (multiply) i.c = d.source(s.operands[3], t);
  i.count = t.kind == Kind::kSigned;
  i.list = d.list({d.carry()});
  i.exec = t.size == 8 ? with_carry<uint64_t> : with_carry<uint32_t>;
}

namespace {
const Opcodes opcodes{{"addc", decode_carry}, {"subc", decode_carry}, {"madc", decode_carry}};
}

}  // namespace gpusim
