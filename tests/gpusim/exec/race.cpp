#include "race.h"

#include <algorithm>
#include <cstdlib>

namespace gpusim::race {

bool enabled() {
  static const bool on = [] {
    const char* setting = std::getenv("GPUSIM_RACE");
    return !setting || std::string(setting) != "0";
  }();
  return on;
}

int number(const Warp& w) { return w.cta->rank * static_cast<int>(w.cta->warps.size()) + w.index; }

void start(Warp& w) {
  // Twice: what is known to have been done, and up to where fence.proxy.async covers it.
  w.clock.assign(2 * w.cta->cluster->ctas.size() * w.cta->warps.size(), 0);
  w.clock[number(w)] = 1;
}

void release(Warp& w, std::vector<uint32_t>* into) {
  if (!enabled()) return;
  into->resize(w.clock.size());
  for (size_t k = 0; k < w.clock.size(); ++k) (*into)[k] = std::max((*into)[k], w.clock[k]);
  ++w.clock[number(w)];
}

void acquire(Warp& w, const std::vector<uint32_t>& from) {
  if (!enabled()) return;
  for (size_t k = 0; k < from.size(); ++k) w.clock[k] = std::max(w.clock[k], from[k]);
  ++w.lane_epoch;
}

void lanes_synchronised(Warp& w) { ++w.lane_epoch; }

void proxy_fence(Warp& w) {
  if (!enabled()) return;
  const size_t n = w.clock.size() / 2;
  for (size_t k = 0; k < n; ++k) w.clock[n + k] = std::max(w.clock[n + k], w.clock[k]);
  ++w.clock[number(w)];
}

namespace {

std::string describe(const Warp& w, const ShadowEntry& e, const char* verb) {
  const int per_cta = static_cast<int>(w.cta->warps.size());
  return std::string(verb) + " by warp " + std::to_string(e.warp % per_cta) + (e.lane == 255 ? "" : " lane " + std::to_string(e.lane)) +
         " of CTA rank " + std::to_string(e.warp / per_cta);
}

// Whether what `e` stands for is ordered before what this lane does now.
bool ordered(const Warp& w, int self, int lane, const ShadowEntry& e) {
  if (!e.clock) return true;
  if (e.clock == kReading) return false;
  if (e.warp != self) return w.clock[e.warp] >= e.clock;
  return e.lane == lane || e.epoch != w.lane_epoch;
}

void check(Warp& w, const Instr& i, int lane, const SharedShadow::Unit& u, uint32_t offset, bool writes, bool atomic) {
  const int self = number(w);
  if (!(atomic && u.atomic) && !ordered(w, self, lane, u.write))
    fail(w, i, lane, "race on shared memory at " + std::to_string(offset) + ": unordered with a " + describe(w, u.write, "write"));
  if (!writes) return;
  for (const ShadowEntry& r : u.reads)
    if (r.clock == kReading)
      fail(w, i, lane,
           "shared memory at " + std::to_string(offset) + " is written before " + describe(w, r, "an asynchronous read") +
               " has been waited for");
    else if (!ordered(w, self, lane, r))
      fail(w, i, lane, "race on shared memory at " + std::to_string(offset) + ": unordered with a " + describe(w, r, "read"));
}

// Where a read of this warp is noted: in its own place, or in that of the oldest other.
ShadowEntry& place_of_read(SharedShadow::Unit& u, uint16_t warp) {
  ShadowEntry* place = &u.reads[0];
  for (ShadowEntry& r : u.reads) {
    if (r.clock && r.clock != kReading && r.warp == warp) return r;
    if (!r.clock || r.clock < place->clock) place = &r;
  }
  return *place;
}

}  // namespace

SharedRead begin_read(Warp& w, int lane, Cta& owner, uint32_t offset, int bytes) {
  const SharedRead read{&owner, offset, static_cast<uint32_t>(bytes), ++w.reads_begun};
  const auto self = static_cast<uint16_t>(number(w));
  if (enabled())
    for (uint32_t at = offset; at < offset + read.bytes; at += 2)
      place_of_read(owner.shadow->unit(at), self) = {kReading, read.id, self, static_cast<uint8_t>(lane)};
  return read;
}

void end_read(Warp& w, int lane, const SharedRead& read) {
  if (!enabled()) return;
  const auto self = static_cast<uint16_t>(number(w));
  for (uint32_t at = read.offset; at < read.offset + read.bytes; at += 2)
    for (ShadowEntry& r : read.cta->shadow->unit(at).reads)
      if (r.clock == kReading && r.warp == self && r.epoch == read.id)
        r = {w.clock[static_cast<size_t>(number(w))], w.lane_epoch, self, static_cast<uint8_t>(lane)};
}

void shared(Warp& w, const Instr& i, int lane, Cta& owner, uint32_t offset, int bytes, Access access) {
  if (!enabled() || bytes < 2) return;
  const bool atomic = access == Access::kAtomic, writes = atomic || access == Access::kStore;
  const ShadowEntry mine{w.clock[number(w)], w.lane_epoch, static_cast<uint16_t>(number(w)), static_cast<uint8_t>(lane)};
  for (uint32_t at = offset; at < offset + static_cast<uint32_t>(bytes); at += 2) {
    SharedShadow::Unit& u = owner.shadow->unit(at);
    check(w, i, lane, u, at, writes, atomic);
    if (writes) {
      u.write = mine;
      u.atomic = atomic;
      u.generic_write = true;
      std::fill(std::begin(u.reads), std::end(u.reads), ShadowEntry{});
      continue;
    }
    ShadowEntry& place = place_of_read(u, mine.warp);
    const bool several = place.clock && place.warp == mine.warp && place.lane != mine.lane && place.epoch == mine.epoch;
    place = mine;
    if (several) place.lane = 255;
  }
}

void not_generic(Warp& w, const Instr& i, int lane, uint64_t address, int bytes) {
  if (!enabled() || w.cta->cluster->launch->strict) return;
  const SharedPlace place = shared_place(w, i, lane, address, bytes);
  for (int at = 0; at < bytes; at += 2) place.cta->shadow->unit(place.offset + static_cast<uint32_t>(at)).generic_write = false;
}

void async_read(Warp& w, const Instr& i, int lane, Cta& owner, uint32_t offset, int bytes) {
  if (!enabled()) return;
  for (uint32_t at = offset; at < offset + static_cast<uint32_t>(bytes); at += 2) {
    const SharedShadow::Unit& u = owner.shadow->unit(at);
    check(w, i, lane, u, at, false, false);
    if (u.generic_write && u.write.clock && w.clock[w.clock.size() / 2 + u.write.warp] < u.write.clock)
      fail(w, i, lane,
           "shared memory at " + std::to_string(at) + " is read asynchronously without fence.proxy.async after a " +
               describe(w, u.write, "write"));
  }
}

void async_write(Warp& w, const Instr& i, int lane, Cta& owner, uint32_t offset, int bytes) {
  if (!enabled()) return;
  for (uint32_t at = offset; at < offset + static_cast<uint32_t>(bytes); at += 2) {
    SharedShadow::Unit& u = owner.shadow->unit(at);
    check(w, i, lane, u, at, true, false);
    u = {};
  }
}

}  // namespace gpusim::race
