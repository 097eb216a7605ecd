// Checked access to the memory of a thread: from an address and a space to bytes of the host.
#pragma once
#include "machine.h"

namespace gpusim {

enum class Access : uint8_t {
  kLoad,
  kStore,
  kAtomic,
  kAsyncLoad,
  kAsyncStore,
  kSyncLoad,  // volatile, relaxed, acquire: like an atomic, where the memory is global
  kSyncStore,
  kMulticast,  // an asynchronous load's bytes for a further CTA: checked, and counted once only
};

// The bytes behind an address, after every check: bounds, alignment, who else uses it. Never null.
uint8_t* resolve(Warp& w, const Instr& i, int lane, uint64_t address, Space space, int bytes, Access access);

// A place in the shared memory of the cluster, for asynchronous operations: which CTA, and the offset in it.
struct SharedPlace {
  Cta* cta;
  uint32_t offset;
};
SharedPlace shared_place(Warp& w, const Instr& i, int lane, uint64_t address, int bytes);

// Bank conflicts of one warp-wide access to shared memory: the accesses it needs beyond the least.
void count_banks(Launch& launch, const uint64_t* addresses, Mask m, int bytes);

}  // namespace gpusim
