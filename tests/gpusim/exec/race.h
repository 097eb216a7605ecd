// Races on shared memory: a vector clock per warp and, per two bytes, who wrote last and who has read since.
// Ordered by: CTA and cluster barriers, mbarriers, shared atomics, and, among the lanes of a warp, bar.warp.sync.
// shfl, vote and match order nothing. Single bytes are not followed. GPUSIM_RACE=0 switches the check off.
// Races on global memory: the same by two bytes, lanes of a warp taken as one. Clusters learn of one another through an atomic (or
// volatile, relaxed, release) access to one place, which carries what its CTA did before its last fence of gpu scope or wider.
#pragma once
#include "access.h"

namespace gpusim {

constexpr uint32_t kReading = 0xffffffffu;
struct ShadowEntry {
  uint32_t clock = 0;  // 0: nobody; kReading: an asynchronous read that has not been waited for
  uint32_t epoch = 0;  // of the warp's lanes; of an asynchronous read, its id
  uint16_t warp = 0;   // in the cluster
  uint8_t lane = 0;    // 255: several
};

class SharedShadow {
 public:
  explicit SharedShadow(size_t bytes) : units_(bytes / 2 + 1) {}
  struct Unit {
    ShadowEntry write, reads[4];
    bool atomic = false;         // the last write was one
    bool generic_write = false;  // by ordinary stores
  };
  Unit& unit(uint32_t offset) { return units_[offset / 2]; }
  size_t units() const { return units_.size(); }

 private:
  std::vector<Unit> units_;
};

// Shared memory that an asynchronous operation reads until its thread has waited for it.
struct SharedRead {
  Cta* cta;
  uint32_t offset, bytes, id;
};

namespace race {

bool enabled();
void start(Warp& w);
int number(const Warp& w);                           // of a warp in its cluster
void release(Warp& w, std::vector<uint32_t>* into);  // what the warp did so far is known to whoever acquires it
void acquire(Warp& w, const std::vector<uint32_t>& from);
void lanes_synchronised(Warp& w);
void fence(Warp& w);  // of gpu scope or wider
void global(Warp& w, const Instr& i, int lane, Allocation& a, uint64_t address, int bytes, Access access);
// fence.proxy.async: what the warp knows of was written becomes visible to asynchronous reads that know of the fence.
void proxy_fence(Warp& w);
// cp.async writes through the asynchronous machinery: no fence is asked for. GPUSIM_STRICT=1 asks for one.
void not_generic(Warp& w, const Instr& i, int lane, uint64_t address, int bytes);
// An asynchronous read (TMA store, wgmma): ordered after the writes, and with a fence between if those were ordinary stores.
void async_read(Warp& w, const Instr& i, int lane, Cta& owner, uint32_t offset, int bytes);
// Whether another warp's deed is ordered before what this warp does now; lanes of one warp are taken as ordered.
inline bool knows(const Warp& w, const ShadowEntry& e) { return e.warp == number(w) || w.clock[e.warp] >= e.clock; }
SharedRead begin_read(Warp& w, int lane, Cta& owner, uint32_t offset, int bytes);
void end_read(Warp& w, int lane, const SharedRead& read);
void shared(Warp& w, const Instr& i, int lane, Cta& owner, uint32_t offset, int bytes, Access access);
// An asynchronous write is about to be issued: everything that was done to these bytes must be known to the issuing warp.
void async_write(Warp& w, const Instr& i, int lane, Cta& owner, uint32_t offset, int bytes);

}  // namespace race
}  // namespace gpusim
