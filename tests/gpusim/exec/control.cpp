// Control flow and barriers. PTX ISA, "Control Flow Instructions", "Parallel Synchronization and Communication Instructions: bar, barrier,
// bar.warp.sync, barrier.cluster". Lanes of a warp may be anywhere; .aligned instructions wait until all living lanes are there.
#include "decoder.h"
#include "race.h"

namespace gpusim {
namespace {

Flow branch(Warp& w, const Instr& i, Mask m) {
  if (m != w.now->mask) w.split(w.now->mask & ~m, w.now->pc + 1);
  w.now->pc = static_cast<uint32_t>(i.imm);
  return Flow::kJump;
}
void decode_bra(Decoder& d, const Statement& s, Instr& i) {
  d.jump(s.operands[0], i);
  i.exec = branch;
}

Flow exit_lanes(Warp& w, const Instr&, Mask m) {
  w.live &= ~m;
  w.now->mask &= ~m;
  ++w.cta->cluster->launch->progress;
  return Flow::kJump;
}
void decode_exit(Decoder&, const Statement&, Instr& i) {
  i.whole = true;
  i.exec = exit_lanes;
}
Flow return_lanes(Warp& w, const Instr& i, Mask m) {
  if (w.now->depth == 0) return exit_lanes(w, i, m);
  w.now->pc = w.now->stack[--w.now->depth];
  return Flow::kJump;
}
void decode_ret(Decoder&, const Statement&, Instr& i) {
  i.whole = true;
  i.exec = return_lanes;
}
Flow trap(Warp& w, const Instr& i, Mask m) { fail(w, i, lowest(m), "trap"); }
void decode_trap(Decoder&, const Statement&, Instr& i) {
  i.whole = true;
  i.exec = trap;
}
Flow yield(Warp&, const Instr&, Mask) { return Flow::kYield; }
void decode_nanosleep(Decoder&, const Statement&, Instr& i) {
  i.whole = true;
  i.exec = yield;
}
Flow nothing(Warp&, const Instr&, Mask) { return Flow::kNext; }
void decode_nothing(Decoder&, const Statement&, Instr& i) { i.exec = nothing; }

// ---- barriers of the CTA
bool complete(Warp& w, Barrier& b) {
  if (!b.arrived || b.arrived < b.expected) return false;
  b.released_clock = b.clock;
  b.clock.clear();
  b.arrived = b.expected = 0;
  ++b.phase;
  ++w.cta->cluster->launch->progress;
  return true;
}

enum BarrierFlags : uint8_t { kArrive = 1, kHasCount = 2 };

// a: barrier number; b: count of threads.
Flow barrier(Warp& w, const Instr& i, Mask m) {
  Fragment& f = *w.now;
  const uint32_t id = w.reg<uint32_t>(i.a)[lowest(m)];
  if (id > 15) fail(w, i, lowest(m), "barrier " + std::to_string(id) + " does not exist");
  Barrier& b = w.cta->barriers[id];
  if (!f.waiting) {
    if (f.mask != w.live) {
      f.why = "the other lanes of its warp at an .aligned barrier";
      return Flow::kWait;
    }
    const uint32_t count = i.flags & kHasCount ? w.reg<uint32_t>(i.b)[lowest(m)] : 0;
    if (count % kLanes) fail(w, i, lowest(m), "the thread count of a barrier is no multiple of 32");
    if (count && count > w.cta->warps.size() * kLanes) fail(w, i, lowest(m), "a barrier waits for more threads than the CTA has");
    const uint32_t expected = count ? count : static_cast<uint32_t>(w.cta->live_warps) * kLanes;
    if (count && b.arrived && b.expected && b.expected != count) fail(w, i, lowest(m), "a barrier is used with two thread counts at once");
    b.expected = expected;
    b.arrived += kLanes;
    if (b.arrived > expected) fail(w, i, lowest(m), "more threads arrive at a barrier than it expects");
    race::release(w, &b.clock);
    f.waiting = true;
    f.barrier_phase = b.phase;
    ++w.cta->cluster->launch->progress;
    complete(w, b);
    if (i.flags & kArrive) {
      f.waiting = false;
      return Flow::kNext;
    }
    ++w.cta->cluster->launch->counters.barrier_waits;
  }
  if (b.phase == f.barrier_phase) {
    if (!(i.flags & kHasCount)) {  // warps that exit are not waited for
      b.expected = static_cast<uint32_t>(w.cta->live_warps) * kLanes;
      complete(w, b);
    }
    if (b.phase == f.barrier_phase) {
      f.why = "a barrier of its CTA";
      return Flow::kWait;
    }
  }
  f.waiting = false;
  race::acquire(w, b.released_clock);
  return Flow::kNext;
}

// ---- among the lanes of a warp: every lane that is named must be at some bar.warp.sync
Flow warp_barrier(Warp& w, const Instr& i, Mask m) {
  Fragment& f = *w.now;
  if (f.released) {
    f.released = f.waiting = false;
    return Flow::kNext;
  }
  f.waiting = true;
  const Mask members = w.reg<uint32_t>(i.a)[lowest(m)];
  for (int l = 0; l < kLanes; ++l)
    if (m >> l & 1 && !(w.reg<uint32_t>(i.a)[l] >> l & 1)) fail(w, i, l, "bar.warp.sync of a lane that its mask does not name");
  Mask there = 0;
  for (const Fragment& other : w.fragments)
    if (other.waiting && w.cta->cluster->launch->kernel->code[other.pc].exec == warp_barrier) there |= other.mask;
  if (members & w.live & ~there) {
    f.why = "the lanes named at bar.warp.sync";
    return Flow::kWait;
  }
  for (Fragment& other : w.fragments)
    if (other.waiting && other.mask & members && w.cta->cluster->launch->kernel->code[other.pc].exec == warp_barrier) {
      other.released = true;
      other.tried = false;
    }
  race::lanes_synchronised(w);
  f.released = f.waiting = false;
  return Flow::kNext;
}

void decode_bar(Decoder& d, const Statement& s, Instr& i) {
  i.whole = true;
  if (s.has("warp")) {
    i.a = d.source(s.operands[0], kU32);
    i.exec = warp_barrier;
    return;
  }
  if (s.has("red")) return;
  i.a = d.source(s.operands[0], kU32);
  if (s.operands.size() > 1) {
    i.flags |= kHasCount;
    i.b = d.source(s.operands[1], kU32);
  }
  if (s.has("arrive")) i.flags |= kArrive;
  i.exec = barrier;
}

// ---- barrier.cluster: arrive counts lanes, so that warps may be diverged
Flow cluster_arrive(Warp& w, const Instr& i, Mask m) {
  Barrier& b = w.cta->cluster->barrier;
  b.arrived += static_cast<uint32_t>(__builtin_popcount(m));
  race::release(w, &b.clock);
  ++w.cta->cluster->launch->progress;
  uint32_t living = 0;
  for (const auto& cta : w.cta->cluster->ctas) living += static_cast<uint32_t>(cta->live_threads());
  b.expected = living;
  if (b.arrived > living) fail(w, i, lowest(m), "a thread arrives twice at the cluster barrier");
  complete(w, b);
  return Flow::kNext;
}
Flow cluster_wait(Warp& w, const Instr&, Mask m) {
  Fragment& f = *w.now;
  Barrier& b = w.cta->cluster->barrier;
  // A thread waits for the phase it arrived in. Its own arrivals and waits alternate, so counting its waits gives the phase.
  uint32_t* waits = w.cluster_waits.data();
  const uint32_t wanted = waits[lowest(m)] + 1;
  if (b.phase < wanted) {
    uint32_t living = 0;
    for (const auto& cta : w.cta->cluster->ctas) living += static_cast<uint32_t>(cta->live_threads());
    b.expected = living;
    complete(w, b);
  }
  if (b.phase < wanted) {
    f.why = "the barrier of its cluster";
    return Flow::kWait;
  }
  for_lanes(m, [&](int l) { ++waits[l]; });
  ++w.cta->cluster->launch->counters.barrier_waits;
  race::acquire(w, b.released_clock);
  return Flow::kNext;
}
void decode_barrier(Decoder& d, const Statement& s, Instr& i) {
  if (s.words[1] != "cluster") return decode_bar(d, s, i);
  i.whole = true;
  i.exec = s.has("arrive") ? cluster_arrive : cluster_wait;
}

// PTX ISA, "Miscellaneous Instructions: setmaxnreg": registers go back to the CTA's pool, or come from it; .inc waits until it has them.
Flow release_registers(Warp& w, const Instr& i, Mask m) {
  if (w.registers_held < i.imm) fail(w, i, lowest(m), "setmaxnreg.dec to more than the " + std::to_string(w.registers_held) + " held");
  w.cta->register_pool += w.registers_held - static_cast<int>(i.imm);
  w.registers_held = static_cast<int>(i.imm);
  ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}
Flow request_registers(Warp& w, const Instr& i, Mask m) {
  const int wanted = static_cast<int>(i.imm) - w.registers_held;
  if (wanted < 0) fail(w, i, lowest(m), "setmaxnreg.inc to fewer than the " + std::to_string(w.registers_held) + " held");
  if (wanted > w.cta->register_pool) {
    w.now->why = "registers: the CTA's pool has too few";
    return Flow::kWait;
  }
  w.cta->register_pool -= wanted;
  w.registers_held = static_cast<int>(i.imm);
  return Flow::kNext;
}
Flow set_registers(Warp& w, const Instr& i, Mask m) {
  if (w.now->mask == w.live) return i.flags ? request_registers(w, i, m) : release_registers(w, i, m);
  w.now->why = "the other lanes of its warp at an .aligned instruction";
  return Flow::kWait;
}
void decode_setmaxnreg(Decoder& d, const Statement& s, Instr& i) {
  i.imm = parse_integer(s.operands[0]);
  if (i.imm % 8 || i.imm < 24 || i.imm > 256) d.unknown(s, "setmaxnreg takes multiples of 8 from 24 to 256");
  if (!d.kernel().registers) d.unknown(s, "without .maxnreg, .maxntid or .reqntid, ptxas ignores setmaxnreg");
  i.flags = s.has("inc");
  i.whole = true;
  i.exec = set_registers;
}

const Opcodes opcodes{{"bra", decode_bra},
                      {"exit", decode_exit},
                      {"ret", decode_ret},
                      {"trap", decode_trap},
                      {"nanosleep", decode_nanosleep},
                      {"bar", decode_bar},
                      {"barrier", decode_barrier},
                      {"setmaxnreg", decode_setmaxnreg},
                      {"griddepcontrol", decode_nothing}};

}  // namespace
}  // namespace gpusim
