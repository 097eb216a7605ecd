// The simulated machine: decoded kernels, warps of independent threads, CTAs, clusters, one launch at a time.
// A register is 32 lanes side by side; a predicate is a mask of lanes; immediates and special registers are registers too.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "../ptx/module.h"
#include "memory.h"

namespace gpusim {

using Mask = uint32_t;
constexpr int kLanes = 32;
constexpr Mask kAll = 0xffffffffu;

struct Warp;
struct Cta;
struct Cluster;
struct Launch;

// What an instruction says about the way on.
enum class Flow : uint8_t {
  kNext,   // to the next instruction
  kJump,   // pc, mask or the set of fragments has been changed
  kWait,   // not yet: try again later
  kYield,  // to the next instruction, after the others had a turn
};

struct Instr;
using Exec = Flow (*)(Warp&, const Instr&, Mask);

struct Instr {
  Exec exec = nullptr;
  uint32_t d = 0, a = 0, b = 0, c = 0;  // registers: offsets into the warp's file
  uint32_t guard = 0;                   // predicate register + 1, or 0
  bool guard_negated = false;
  bool whole = false;  // its lanes leave the fragment of those whose guard is false (control flow, waiting)
  uint8_t width = 4;   // bytes of a memory access or register, as the instruction needs it
  uint8_t count = 1;   // elements of a vector
  uint8_t space = 0;   // Space of an address
  uint8_t flags = 0;
  bool address32 = false;          // the address register has 32 bits
  const uint32_t* list = nullptr;  // further registers
  int64_t imm = 0;                 // displacement, target, count
  int32_t line = 0;
};

// clang-format off
enum class SpecialId : uint8_t {
  kTid, kNtid, kCtaid, kNctaid, kClusterCtaid, kClusterNctaid, kClusterid, kNclusterid,  // + dimension
  kLaneid, kWarpid, kNwarpid, kSmid, kNsmid, kGridid, kMaskEq, kMaskLt, kMaskLe, kMaskGt, kMaskGe, kClusterCtarank, kClusterNctarank,
  kExplicitCluster, kDynamicShared, kTotalShared, kZero,
};
// clang-format on

struct Kernel {
  struct Constant {
    uint32_t slot;
    uint8_t width;
    bool parameter;  // relative to this launch's parameters
    uint64_t bits;
  };
  struct Special {
    uint32_t slot;
    SpecialId id;
    uint8_t dimension;
  };
  std::string name;
  const Module* module = nullptr;
  std::vector<Instr> code;
  std::vector<std::string> text;  // beside code
  std::vector<std::unique_ptr<uint32_t[]>> lists;
  std::vector<Constant> constants;
  std::vector<Special> specials;
  uint32_t register_bytes = 64;
  int64_t static_shared = 0, dynamic_shared_at = 0, local_bytes = 0, parameter_bytes = 0;
  std::vector<std::pair<int64_t, int64_t>> parameters;  // offset and size of each
  int max_threads = 0;
  int registers = 0;  // of a thread at its start, as ptxas plans them for setmaxnreg; 0: the directives do not say
  int cluster[3] = {0, 0, 0};
};

// Lanes of a warp that are at one place.
struct Fragment {
  uint32_t pc = 0;
  Mask mask = 0;
  int depth = 0;
  uint32_t stack[6] = {};
  bool tried = false;     // has nothing to do in this turn
  bool waiting = false;   // has arrived at a barrier and is not through it
  bool released = false;  // of a warp barrier
  uint32_t barrier_phase = 0;
  const char* why = nullptr;  // what it waits for, for the report of a deadlock

  bool same_place(const Fragment& other) const {
    return pc == other.pc && depth == other.depth && waiting == other.waiting && !std::memcmp(stack, other.stack, sizeof(stack[0]) * depth);
  }
};

struct Warp {
  Cta* cta = nullptr;
  int index = 0;  // in its CTA
  Mask live = 0;  // lanes that have not exited
  uint8_t* registers = nullptr;
  int registers_held = 0;  // per thread: setmaxnreg
  std::vector<Fragment> fragments;
  Fragment* now = nullptr;                       // the one that runs
  std::vector<uint32_t> clock;                   // of each warp of the cluster, as this warp knows it (races)
  uint32_t lane_epoch = 0;                       // counts what orders the lanes of this warp
  uint32_t reads_begun = 0;                      // of shared memory, asynchronously
  std::array<uint32_t, kLanes> cluster_waits{};  // of each lane, at the barrier of the cluster
  struct AsyncState* async = nullptr;

  template <class T>
  T* reg(uint32_t offset) const {
    return reinterpret_cast<T*>(registers + offset);
  }
  Mask& pred(uint32_t offset) const { return *reinterpret_cast<Mask*>(registers + offset); }
  uint64_t address(const Instr& i, uint32_t slot, int lane) const {
    return (i.address32 ? reg<uint32_t>(slot)[lane] : reg<uint64_t>(slot)[lane]) + static_cast<uint64_t>(i.imm);
  }
  int thread(int lane) const { return index * kLanes + lane; }
  bool run(int budget);                  // until nothing is left to do in this turn; whether anything was done
  void split(Mask others, uint32_t pc);  // these lanes of the running fragment go on elsewhere
  Fragment* pick();
};

struct Barrier {
  uint32_t arrived = 0, expected = 0, phase = 0;
  std::vector<uint32_t> clock, released_clock;
};

struct Cta {
  Cluster* cluster = nullptr;
  int rank = 0;
  uint32_t id[3] = {};
  std::vector<uint8_t> shared;
  std::vector<uint8_t> local;
  std::vector<Warp> warps;
  std::vector<uint8_t> registers;
  Barrier barriers[16];
  std::unique_ptr<class SharedShadow> shadow;
  int live_warps = 0;
  int register_pool = 0;  // what warps have given back, per thread of a warp: setmaxnreg

  int live_threads() const;
};

// What is known of other clusters: the clocks of their warps, by number of the cluster.
using Knowledge = std::map<uint32_t, std::vector<uint32_t>>;

struct Cluster {
  Launch* launch = nullptr;
  Knowledge known, fenced;  // fenced: what its next atomic tells
  uint32_t index = 0;
  std::vector<std::unique_ptr<Cta>> ctas;
  Barrier barrier;  // barrier.cluster
  std::shared_ptr<class AsyncQueue> async;
  bool done() const;
};

// What was counted while one kernel ran: instructions of warps; bytes of global memory, and of the 32-byte sectors they touch; barrier
// waits that ended. Parameters and constants are not counted, a multicast's bytes once.
struct Counters {
  uint64_t instructions = 0, global_loaded = 0, global_stored = 0, unique_loaded = 0, unique_stored = 0, tensor_macs = 0;
  uint64_t shared_accesses = 0, bank_conflicts = 0, barrier_waits = 0;
};

struct Launch {
  const Kernel* kernel = nullptr;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster[3] = {1, 1, 1};
  int64_t dynamic_shared = 0;
  uint8_t* parameters = nullptr;
  int threads = 0, warps = 0, sms = 4, ctas_per_sm = 2;
  Counters counters;
  uint64_t progress = 0;                         // counts everything another thread could be waiting for
  std::unordered_map<uint64_t, Knowledge> told;  // by address of an atomic
  std::mt19937 random;
  bool random_schedule = false;
  bool strict = false;  // cp.async asks for a proxy fence, too

  void run();  // throws Failure
};

// Stops the simulation: `what`, with the instruction and the thread.
[[noreturn]] void fail(const Warp& w, const Instr& i, int lane, const std::string& what);

inline int lowest(Mask m) { return __builtin_ctz(m); }

// One result per active lane. Full warps take the loop the compiler turns into vector code.
template <class T, class F>
inline void each_lane(Warp& w, uint32_t d, Mask m, const F& f) {
  T* out = w.reg<T>(d);
  if (m == kAll) {
    for (int l = 0; l < kLanes; ++l) out[l] = f(l);
  } else {
    for (int l = 0; l < kLanes; ++l)
      if (m >> l & 1) out[l] = f(l);
  }
}

template <class F>
inline void for_lanes(Mask m, const F& f) {
  for (; m; m &= m - 1) f(lowest(m));
}

// The value of a lane of a register of any width, and back (extended or cut).
inline uint64_t get(const Warp& w, uint32_t slot, int width, int lane) {
  switch (width) {
    case 2:
      return w.reg<uint16_t>(slot)[lane];
    case 4:
      return w.reg<uint32_t>(slot)[lane];
    default:
      return w.reg<uint64_t>(slot)[lane];
  }
}
inline void put(Warp& w, uint32_t slot, int width, int lane, uint64_t value) {
  switch (width) {
    case 2:
      w.reg<uint16_t>(slot)[lane] = static_cast<uint16_t>(value);
      break;
    case 4:
      w.reg<uint32_t>(slot)[lane] = static_cast<uint32_t>(value);
      break;
    default:
      w.reg<uint64_t>(slot)[lane] = value;
  }
}

}  // namespace gpusim
