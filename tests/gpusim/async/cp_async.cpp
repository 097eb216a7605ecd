// Copies of single threads. PTX ISA, "Data Movement and Conversion Instructions: cp.async, cp.async.commit_group,
// cp.async.wait_group", "Parallel Synchronization and Communication Instructions: cp.async.mbarrier.arrive".
// Bulk copies, which share the first words of their opcodes, are in bulk.cpp.
#include "../exec/access.h"
#include "../exec/race.h"
#include "bulk.h"
#include "queue.h"

namespace gpusim {
namespace {

AsyncQueue& queue(Warp& w) { return *w.cta->cluster->async; }

// a: shared address; list: register and displacement of the global one; width: bytes; b: bytes read (or, flags, ignore-src predicate).
enum CopyFlags : uint8_t { kHasSize = 1, kIgnore = 2 };

Flow copy(Warp& w, const Instr& i, Mask m) {
  AsyncQueue& q = queue(w);
  AsyncState& state = q.state(w);
  uint64_t addresses[kLanes];
  for_lanes(m, [&](int l) {
    uint8_t filled = i.width;
    if (i.flags & kHasSize) filled = static_cast<uint8_t>(std::min<uint32_t>(w.reg<uint32_t>(i.b)[l], i.width));
    if (i.flags & kIgnore && w.pred(i.b) >> l & 1) filled = 0;
    addresses[l] = w.address(i, i.a, l);
    uint8_t* to = resolve(w, i, l, addresses[l], kShared, i.width, Access::kStore);
    race::not_generic(w, i, l, addresses[l], i.width);
    const uint64_t source = w.reg<uint64_t>(i.list[0])[l] + static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(i.list[1])));
    if (source % i.width) fail(w, i, l, "the source of cp.async is misaligned");
    const uint8_t* from =
        filled ? resolve(w, i, l, source, kGeneric, filled & (filled - 1) ? i.width : filled, Access::kAsyncLoad) : nullptr;
    ThreadCopies& mine = state.copies[l];
    mine.pending.push_back({to, from, i.width, filled});
    if (q.now()) mine.perform(mine.next());
  });
  count_banks(*w.cta->cluster->launch, addresses, m, i.width);
  return Flow::kNext;
}
Flow commit(Warp& w, const Instr&, Mask m) {
  AsyncState& state = queue(w).state(w);
  for_lanes(m, [&](int l) { state.copies[l].groups.push_back(state.copies[l].next()); });
  return Flow::kNext;
}
// imm: how many groups may stay pending; -1: none, not even what was not committed.
Flow wait_group(Warp& w, const Instr& i, Mask m) {
  AsyncState& state = queue(w).state(w);
  for_lanes(m, [&](int l) {
    ThreadCopies& mine = state.copies[l];
    if (i.imm < 0) {
      mine.perform(mine.next());
      mine.groups.clear();
    }
    while (static_cast<int64_t>(mine.groups.size()) > std::max<int64_t>(i.imm, 0)) {
      mine.perform(mine.groups.front());
      mine.groups.pop_front();
    }
  });
  ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}
// An arrival that happens once the thread's copies so far have landed. Without .noinc it is expected on top of the others.
Flow arrive(Warp& w, const Instr& i, Mask m) {
  AsyncQueue& q = queue(w);
  AsyncState& state = q.state(w);
  for_lanes(m, [&](int l) {
    const SharedPlace place = shared_place(w, i, l, w.address(i, i.a, l), 8);
    const auto key = AsyncQueue::key(*place.cta, place.offset);
    if (!q.barriers.count(key)) fail(w, i, l, "an mbarrier is used before mbarrier.init");
    if (!i.flags) ++q.barriers[key].pending;
    race::release(w, &q.barriers[key].clock);
    ThreadCopies* mine = &state.copies[l];
    q.add(key, [&q, key, mine, end = mine->next()] {
      mine->perform(end);
      q.arrive(key, 1, 0);
    });
  });
  return Flow::kNext;
}

void decode_cp(Decoder& d, const Statement& s, Instr& i) {
  if (s.has("bulk") || s.has("reduce")) return decode_bulk(d, s, i);
  if (s.has("mbarrier")) {
    d.address(s.operands[0], i);
    i.flags = s.has("noinc");
    i.exec = arrive;
  } else if (s.has("commit_group")) {
    i.exec = commit;
  } else if (s.has("wait_group") || s.has("wait_all")) {
    i.imm = s.has("wait_all") ? -1 : parse_integer(s.operands[0]);
    i.whole = true;
    i.exec = wait_group;
  } else {
    Instr source;
    d.address(s.operands[1], source);
    d.address(s.operands[0], i);
    i.list = d.list({source.a, static_cast<uint32_t>(source.imm)});
    i.width = static_cast<uint8_t>(parse_integer(s.operands[2]));
    size_t extra = s.operands.size();
    if (s.has("L2::cache_hint")) --extra;
    if (extra > 3) {
      const Slot size = d.slot(s.operands[3], kU32);
      i.b = size.offset;
      i.flags = size.predicate ? kIgnore : kHasSize;
    }
    i.exec = copy;
  }
}

const Opcodes opcodes{{"cp", decode_cp}};

}  // namespace
}  // namespace gpusim
