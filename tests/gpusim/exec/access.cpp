#include "access.h"

#include <algorithm>

#include "race.h"

namespace gpusim {
namespace {

void check_alignment(Warp& w, const Instr& i, int lane, uint64_t address, int bytes) {
  const int access = bytes & (bytes - 1) ? 1 : bytes;  // vectors of three do not exist
  if (address % static_cast<uint64_t>(access))
    fail(w, i, lane, "misaligned access of " + std::to_string(bytes) + " bytes at address " + std::to_string(address));
}

// A whole word of the pattern that fresh memory holds: nothing was ever written there.
bool is_poison(const uint8_t* data, int bytes, uint64_t address) {
  if (bytes < 2 || address % 2) return false;
  for (int at = 0; at < bytes; at += 2)
    if (data[at] != (kPoison & 255) || data[at + 1] != kPoison >> 8) return false;
  return true;
}

uint8_t* global(Warp& w, const Instr& i, int lane, uint64_t address, int bytes, Access access) {
  Allocation* a = Memory::get().find(address, static_cast<size_t>(bytes));
  const bool stores =
      access == Access::kStore || access == Access::kAtomic || access == Access::kAsyncStore || access == Access::kSyncStore;
  if (!a) fail(w, i, lane, "global memory out of bounds: " + std::to_string(bytes) + " bytes at " + Memory::get().describe(address));
  if (stores && !a->writable) fail(w, i, lane, "a store to read-only memory (" + std::string(a->kind) + ")");
  auto* data = reinterpret_cast<uint8_t*>(address);
  if ((access == Access::kLoad || access == Access::kAtomic || access == Access::kSyncLoad) && is_poison(data, bytes, address))
    fail(w, i, lane, "global memory is read before it was written: " + Memory::get().describe(address));
  if (a->writable) race::global(w, i, lane, *a, address, bytes, access);
  if (access == Access::kMulticast || !a->writable) return data;  // parameters and constants have a cache of their own
  Counters& counters = w.cta->cluster->launch->counters;
  (stores ? counters.global_stored : counters.global_loaded) += static_cast<uint64_t>(bytes);
  std::vector<bool>& sectors = stores ? a->stored : a->loaded;
  if (sectors.empty()) sectors.resize((a->end - a->begin) / 32 + 2);
  for (uint64_t s = (address - a->begin / 32 * 32) / 32; s <= (address + static_cast<uint64_t>(bytes) - 1 - a->begin / 32 * 32) / 32; ++s)
    sectors[s] = true;
  return data;
}

}  // namespace

SharedPlace shared_place(Warp& w, const Instr& i, int lane, uint64_t address, int bytes) {
  if (address >= kWindow) address -= Memory::get().shared_window;
  const uint64_t rank = address >> kRankShift;
  const auto& ctas = w.cta->cluster->ctas;
  if (rank > ctas.size())
    fail(w, i, lane, "shared memory of a CTA outside the cluster, or out of bounds: address " + std::to_string(address));
  Cta* cta = rank ? ctas[rank - 1].get() : w.cta;
  const uint64_t offset = address & ((1u << kRankShift) - 1);
  if (offset < kSharedBase || offset + static_cast<uint64_t>(bytes) > cta->shared.size())
    fail(w, i, lane,
         "shared memory out of bounds: " + std::to_string(bytes) + " bytes at offset " +
             std::to_string(static_cast<int64_t>(offset) - kSharedBase) + " of " + std::to_string(cta->shared.size() - kSharedBase));
  if (!cta->live_warps) fail(w, i, lane, "shared memory of a CTA that has exited");
  return {cta, static_cast<uint32_t>(offset)};
}

uint8_t* resolve(Warp& w, const Instr& i, int lane, uint64_t address, Space space, int bytes, Access access) {
  if (space == kGeneric) {
    const Memory& memory = Memory::get();
    if (address - memory.shared_window < kWindow) {
      space = kShared;
      address -= memory.shared_window;
    } else if (address - memory.local_window < kWindow) {
      space = kLocal;
      address -= memory.local_window;
    }
  }
  check_alignment(w, i, lane, address, bytes);
  if (space != kGlobal && space != kGeneric)
    access = access == Access::kSyncLoad ? Access::kLoad : access == Access::kSyncStore ? Access::kStore : access;
  if (space == kShared) {
    const SharedPlace place = shared_place(w, i, lane, address, bytes);
    race::shared(w, i, lane, *place.cta, place.offset, bytes, access);
    uint8_t* data = place.cta->shared.data() + place.offset;
    if (access == Access::kLoad && bytes >= 4 && is_poison(data, bytes, place.offset))
      fail(w, i, lane, "shared memory is read before it was written, at offset " + std::to_string(place.offset - kSharedBase));
    return data;
  }
  if (space == kLocal) {
    const int64_t size = w.cta->cluster->launch->kernel->local_bytes;
    if (static_cast<int64_t>(address) + bytes > size) fail(w, i, lane, "local memory out of bounds");
    return w.cta->local.data() + w.thread(lane) * size + address;
  }
  return global(w, i, lane, address, bytes, access);
}

// PTX says nothing of banks: 32 of 4 bytes; lanes that read the same word share it; 8- and 16-byte accesses go by halves and quarters.
void count_banks(Launch& launch, const uint64_t* addresses, Mask m, int bytes) {
  const int words = std::max(1, bytes / 4), lanes = kLanes / words;
  for (int group = 0; group < words; ++group) {
    uint64_t seen[32][32];
    int used[32] = {}, most = 0;
    for (int l = group * lanes; l < (group + 1) * lanes; ++l) {
      if (!(m >> l & 1)) continue;
      for (int k = 0; k < words; ++k) {
        const uint64_t word = addresses[l] / 4 + static_cast<uint64_t>(k);
        const int bank = static_cast<int>(word % 32);
        if (std::find(seen[bank], seen[bank] + used[bank], word) != seen[bank] + used[bank]) continue;
        seen[bank][used[bank]++] = word;
        most = std::max(most, used[bank]);
      }
    }
    launch.counters.shared_accesses += most > 0;
    launch.counters.bank_conflicts += static_cast<uint64_t>(std::max(0, most - 1));
  }
}

}  // namespace gpusim
