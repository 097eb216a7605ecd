// Instructions that do one thing per lane: results from one, two or three registers of one type.
#pragma once
#include <type_traits>

#include "decoder.h"
#include "floats.h"

namespace gpusim {

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
template <class T>
using Unsigned = std::make_unsigned_t<T>;

inline void operands(Decoder& d, const Statement& s, Instr& i, Type t, int count) {
  i.d = d.destination(s.operands[0]);
  i.a = d.source(s.operands[1], t);
  if (count > 1) i.b = d.source(s.operands[2], t);
  if (count > 2) i.c = d.source(s.operands[3], t);
}

}  // namespace gpusim
