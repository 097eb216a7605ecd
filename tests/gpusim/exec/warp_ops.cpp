// Exchange among the lanes of a warp. PTX ISA, "Data Movement and Conversion Instructions: shfl.sync", "Parallel Synchronization and
// Communication Instructions: vote.sync, match.sync, redux.sync, elect.sync, activemask". Each waits until all living lanes it names are
// there.
#include <algorithm>

#include "decoder.h"

namespace gpusim {
namespace {

// c: the register of the member mask. False: somebody is missing.
bool all_there(Warp& w, const Instr& i, Mask m, uint32_t mask_register) {
  const uint32_t* members = w.reg<uint32_t>(mask_register);
  Mask named = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(m >> l & 1)) continue;
    if (!(members[l] >> l & 1)) fail(w, i, l, "a lane runs a .sync instruction whose mask does not name it");
    named |= members[l];
  }
  if (!(named & w.live & ~m)) return true;
  w.now->why = "the lanes named by a .sync instruction";
  return false;
}

enum ShuffleMode : uint8_t { kUp, kDown, kBfly, kIdx };

// d|list[0] = a of another lane; b: lane or delta; c: clamp and segment; imm: register of the member mask.
Flow shuffle(Warp& w, const Instr& i, Mask m) {
  const uint32_t mask_register = static_cast<uint32_t>(i.imm);
  if (!all_there(w, i, m, mask_register)) return Flow::kWait;
  uint32_t a[kLanes];
  std::copy_n(w.reg<uint32_t>(i.a), kLanes, a);
  const uint32_t *b = w.reg<uint32_t>(i.b), *c = w.reg<uint32_t>(i.c);
  Mask inside = 0;
  uint32_t result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const int delta = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    const int most = (l & segment) | (clamp & ~segment), least = l & segment;
    int from = 0;
    bool in = true;
    switch (i.flags) {
      case kUp:
        from = l - delta;
        in = from >= most;
        break;
      case kDown:
        from = l + delta;
        in = from <= most;
        break;
      case kBfly:
        from = l ^ delta;
        in = from <= most;
        break;
      default:
        from = least | (delta & ~segment);
        in = from <= most;
    }
    if (!in) from = l;
    if (m >> l & 1 && !(m >> from & 1)) fail(w, i, l, "shfl reads lane " + std::to_string(from) + ", which is not taking part");
    result[l] = a[from & 31];
    inside |= Mask(in) << l;
  }
  each_lane<uint32_t>(w, i.d, m, [&](int l) { return result[l]; });
  if (i.list) w.pred(i.list[0]) = (w.pred(i.list[0]) & ~m) | (inside & m);
  return Flow::kNext;
}
void decode_shfl(Decoder& d, const Statement& s, Instr& i) {
  if (!s.has("sync")) return;
  const auto [first, second] = split_pair(s.operands[0]);
  i.d = d.destination(first);
  if (!second.empty()) i.list = d.list({d.destination(second)});
  i.a = d.source(s.operands[1], kU32);
  i.b = d.source(s.operands[2], kU32);
  i.c = d.source(s.operands[3], kU32);
  i.imm = d.source(s.operands[4], kU32);
  i.flags = s.has("up") ? kUp : s.has("down") ? kDown : s.has("bfly") ? kBfly : kIdx;
  i.whole = true;
  i.exec = shuffle;
}

enum VoteMode : uint8_t { kVoteAll, kVoteAny, kBallot };

Flow vote(Warp& w, const Instr& i, Mask m) {
  if (!all_there(w, i, m, i.b)) return Flow::kWait;
  const Mask p = i.count ? ~w.pred(i.a) : w.pred(i.a);
  Mask r = 0;
  uint32_t ballots[kLanes];
  for_lanes(m, [&](int l) {
    const Mask members = w.reg<uint32_t>(i.b)[l] & w.live, yes = p & members;
    const bool answer = i.flags == kVoteAll ? yes == members : yes != 0;
    r |= Mask(answer) << l;
    ballots[l] = yes;
  });
  if (i.flags == kBallot)
    each_lane<uint32_t>(w, i.d, m, [&](int l) { return ballots[l]; });
  else
    w.pred(i.d) = (w.pred(i.d) & ~m) | r;
  return Flow::kNext;
}
void decode_vote(Decoder& d, const Statement& s, Instr& i) {
  if (!s.has("sync") || s.has("uni")) return;
  bool negated;
  i.d = d.destination(s.operands[0]);
  i.a = d.predicate(s.operands[1], &negated);
  i.b = d.source(s.operands[2], kU32);
  i.count = negated;
  i.flags = s.has("all") ? kVoteAll : s.has("any") ? kVoteAny : kBallot;
  i.whole = true;
  i.exec = vote;
}

// d = the lanes that hold the same value (any), or all lanes if they agree (all, with a predicate).
Flow match(Warp& w, const Instr& i, Mask m) {
  if (!all_there(w, i, m, i.b)) return Flow::kWait;
  uint32_t result[kLanes] = {};
  Mask agree = 0;
  for_lanes(m, [&](int l) {
    const Mask members = w.reg<uint32_t>(i.b)[l] & w.live;
    Mask same = 0;
    for_lanes(members, [&](int other) { same |= Mask(get(w, i.a, i.width, other) == get(w, i.a, i.width, l)) << other; });
    if (i.flags) {
      agree |= Mask(same == members) << l;
      result[l] = same == members ? members : 0;
    } else {
      result[l] = same;
    }
  });
  each_lane<uint32_t>(w, i.d, m, [&](int l) { return result[l]; });
  if (i.list) w.pred(i.list[0]) = (w.pred(i.list[0]) & ~m) | (agree & m);
  return Flow::kNext;
}
void decode_match(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  const auto [first, second] = split_pair(s.operands[0]);
  i.d = d.destination(first);
  if (!second.empty()) i.list = d.list({d.destination(second)});
  i.a = d.source(s.operands[1], t);
  i.b = d.source(s.operands[2], kU32);
  i.width = t.size;
  i.flags = s.has("all");
  i.whole = true;
  i.exec = match;
}

enum ReduxMode : uint8_t { kReduxAdd, kReduxMin, kReduxMax, kReduxAnd, kReduxOr, kReduxXor };

template <class T>
Flow redux(Warp& w, const Instr& i, Mask m) {
  if (!all_there(w, i, m, i.b)) return Flow::kWait;
  T result[kLanes] = {};
  for_lanes(m, [&](int l) {
    bool first = true;
    for_lanes(w.reg<uint32_t>(i.b)[l] & w.live, [&](int other) {
      const T v = w.reg<T>(i.a)[other];
      T& r = result[l];
      if (first)
        r = v;
      else if (i.flags == kReduxAdd)
        r = static_cast<T>(uint32_t(r) + uint32_t(v));
      else if (i.flags == kReduxMin)
        r = std::min(r, v);
      else if (i.flags == kReduxMax)
        r = std::max(r, v);
      else if (i.flags == kReduxAnd)
        r &= v;
      else if (i.flags == kReduxOr)
        r |= v;
      else
        r ^= v;
      first = false;
    });
  });
  each_lane<T>(w, i.d, m, [&](int l) { return result[l]; });
  return Flow::kNext;
}
void decode_redux(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  if (is_float(t)) return;
  i.d = d.destination(s.operands[0]);
  i.a = d.source(s.operands[1], t);
  i.b = d.source(s.operands[2], kU32);
  i.flags = s.has("add")   ? kReduxAdd
            : s.has("min") ? kReduxMin
            : s.has("max") ? kReduxMax
            : s.has("and") ? kReduxAnd
            : s.has("or")  ? kReduxOr
                           : kReduxXor;
  i.whole = true;
  i.exec = t.kind == Kind::kSigned ? redux<int32_t> : redux<uint32_t>;
}

// elect.sync d|p, members: the lowest member.
Flow elect(Warp& w, const Instr& i, Mask m) {
  if (!all_there(w, i, m, i.a)) return Flow::kWait;
  Mask leaders = 0;
  each_lane<uint32_t>(w, i.d, m, [&](int l) {
    const int leader = lowest(w.reg<uint32_t>(i.a)[l] & w.live);
    leaders |= Mask(leader == l) << l;
    return static_cast<uint32_t>(leader);
  });
  w.pred(i.list[0]) = (w.pred(i.list[0]) & ~m) | leaders;
  return Flow::kNext;
}
void decode_elect(Decoder& d, const Statement& s, Instr& i) {
  const auto [first, second] = split_pair(s.operands[0]);
  i.d = d.destination(first);
  i.list = d.list({d.destination(second)});
  i.a = d.source(s.operands[1], kU32);
  i.whole = true;
  i.exec = elect;
}

Flow activemask(Warp& w, const Instr& i, Mask m) {
  each_lane<uint32_t>(w, i.d, m, [=](int) { return m; });
  return Flow::kNext;
}
void decode_activemask(Decoder& d, const Statement& s, Instr& i) {
  i.d = d.destination(s.operands[0]);
  i.exec = activemask;
}

const Opcodes opcodes{{"shfl", decode_shfl},   {"vote", decode_vote},   {"match", decode_match},
                      {"redux", decode_redux}, {"elect", decode_elect}, {"activemask", decode_activemask}};

}  // namespace
}  // namespace gpusim
