// mbarrier objects and fences. PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier.*, fence".
// The object's state is kept beside shared memory; its 8 bytes only name it.
#include "../exec/access.h"
#include "../exec/decoder.h"
#include "../exec/race.h"
#include "queue.h"

namespace gpusim {
namespace {

AsyncQueue& queue(Warp& w) { return *w.cta->cluster->async; }

AsyncQueue::Key key_of(Warp& w, const Instr& i, int lane, uint64_t address) {
  if (address % 8) fail(w, i, lane, "an mbarrier is not aligned to 8 bytes");
  const SharedPlace place = shared_place(w, i, lane, address, 8);
  return AsyncQueue::key(*place.cta, place.offset);
}
AsyncQueue::Key existing(Warp& w, const Instr& i, int lane) {
  const auto key = key_of(w, i, lane, w.address(i, i.a, lane));
  const auto found = queue(w).barriers.find(key);
  if (found == queue(w).barriers.end()) fail(w, i, lane, "an mbarrier is used before mbarrier.init");
  if (race::enabled() && !race::knows(w, found->second.made)) fail(w, i, lane, "an mbarrier is used unordered with mbarrier.init");
  return key;
}

Flow init(Warp& w, const Instr& i, Mask m) {
  for_lanes(m, [&](int l) {
    MBarrier b;
    b.pending = b.initial = static_cast<int32_t>(w.reg<uint32_t>(i.b)[l]);
    b.made = {w.clock[static_cast<size_t>(race::number(w))], 0, static_cast<uint16_t>(race::number(w)), 255};
    queue(w).barriers[key_of(w, i, l, w.address(i, i.a, l))] = b;
  });
  ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}
enum ArriveFlags : uint8_t { kExpect = 1, kHasCount = 2 };

// b: count, or bytes with expect_tx. d: the state, whose only content here is the phase.
Flow arrive(Warp& w, const Instr& i, Mask m) {
  for_lanes(m, [&](int l) {
    const auto key = existing(w, i, l);
    MBarrier& b = queue(w).barriers[key];
    const uint32_t value = i.flags & (kHasCount | kExpect) ? w.reg<uint32_t>(i.b)[l] : 1;
    if (i.d) w.reg<uint64_t>(i.d)[l] = b.phase;
    if (i.flags & kExpect) b.bytes += value;
    const int count = i.flags & kExpect ? 1 : static_cast<int>(value);
    if (count > b.pending) fail(w, i, l, "more arrivals at an mbarrier than its phase expects");
    race::release(w, &b.clock);
    queue(w).arrive(key, count, 0);
  });
  ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}

// try_wait and test_wait: d = whether the phase named by parity or state has ended.
Flow wait(Warp& w, const Instr& i, Mask m) {
  Mask done = 0;
  const auto test = [&](int l) {
    const MBarrier& b = queue(w).barriers[existing(w, i, l)];
    if (i.flags) return (b.phase & 1) != w.reg<uint32_t>(i.b)[l];  // parity
    return b.phase != static_cast<uint32_t>(w.reg<uint64_t>(i.b)[l]);
  };
  for_lanes(m, [&](int l) {
    if (!test(l)) {
      queue(w).perform(existing(w, i, l));
      if (!test(l)) return;
    }
    done |= 1u << l;
    race::acquire(w, queue(w).barriers[existing(w, i, l)].released);
  });
  w.pred(i.d) = (w.pred(i.d) & ~m) | done;
  w.cta->cluster->launch->counters.barrier_waits += done != 0;
  if (done == m) return Flow::kNext;
  w.now->why = "an mbarrier";
  return Flow::kYield;
}

void decode_mbarrier(Decoder& d, const Statement& s, Instr& i) {
  const std::string& op = s.words[1];
  i.whole = true;
  if (op == "init") {
    d.address(s.operands[0], i);
    i.b = d.source(s.operands[1], kU32);
    i.exec = init;
  } else if (op == "try_wait" || op == "test_wait") {
    i.d = d.destination(s.operands[0]);
    d.address(s.operands[1], i);
    i.flags = s.has("parity");
    i.b = d.source(s.operands[2], i.flags ? kU32 : kU64);
    i.exec = wait;
  } else if (op == "arrive") {
    size_t at = 0;
    if (s.operands[0][0] != '[') {
      if (s.operands[0] != "_") i.d = d.destination(s.operands[0]);
      at = 1;
    }
    d.address(s.operands[at], i);
    if (at + 1 < s.operands.size()) {
      i.b = d.source(s.operands[at + 1], kU32);
      i.flags |= kHasCount;
    }
    if (s.has("expect_tx")) i.flags |= kExpect;
    if (!s.has("noComplete")) i.exec = arrive;
  }
}

Flow proxy_fence(Warp& w, const Instr&, Mask) {
  race::proxy_fence(w);
  return Flow::kNext;
}
Flow map_fence(Warp& w, const Instr& i, Mask m) {
  for_lanes(m, [&](int l) { queue(w).forget_descriptor(*w.cta, w.address(i, i.a, l)); });
  return Flow::kNext;
}
Flow memory_fence(Warp& w, const Instr&, Mask) {
  race::fence(w);
  return Flow::kNext;
}
Flow nothing(Warp&, const Instr&, Mask) { return Flow::kNext; }
void decode_fence(Decoder& d, const Statement& s, Instr& i) {
  if (s.has("proxy") && s.has("async")) {
    i.exec = proxy_fence;
  } else if (s.has("tensormap::generic") && s.has("acquire")) {
    d.address(s.operands[0], i);
    i.exec = map_fence;
  } else {
    i.exec = s.has("gpu") || s.has("sys") ? memory_fence : nothing;
  }
}

const Opcodes opcodes{{"mbarrier", decode_mbarrier}, {"fence", decode_fence}};

}  // namespace
}  // namespace gpusim
