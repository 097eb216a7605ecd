// Races on global memory (race.h). PTX ISA, "Memory Consistency Model: Race-freedom".
#include <algorithm>

#include "race.h"

namespace gpusim::race {
namespace {

void merge(Knowledge* into, const Knowledge& from) {
  for (const auto& [cluster, clocks] : from) {
    std::vector<uint32_t>& mine = (*into)[cluster];
    mine.resize(std::max(mine.size(), clocks.size()));
    for (size_t k = 0; k < clocks.size(); ++k) mine[k] = std::max(mine[k], clocks[k]);
  }
}

bool ordered(const Warp& w, const GlobalEntry& e) {
  const Cluster& mine = *w.cta->cluster;
  if (!e.clock) return true;
  if (e.cluster == mine.index && (e.warp == static_cast<unsigned>(number(w)) || w.clock[e.warp] >= e.clock)) return true;
  const auto known = mine.known.find(e.cluster);
  return known != mine.known.end() && known->second[e.warp] >= e.clock;
}

void check(const Warp& w, const Instr& i, int lane, const GlobalEntry& e, const char* verb, uint64_t address) {
  if (ordered(w, e)) return;
  const auto per_cta = static_cast<unsigned>(w.cta->warps.size());
  fail(w, i, lane,
       "race on global memory at " + Memory::get().describe(address) + ": unordered with a " + verb + " by warp " +
           std::to_string(e.warp % per_cta) + " of CTA rank " + std::to_string(e.warp / per_cta) + " of cluster " +
           std::to_string(e.cluster));
}

// Of the two readers that are kept, the one of the same cluster is replaced, or else the older.
void remember(GlobalUnit& u, const GlobalEntry& reader) {
  if (u.reads[0].clock && u.reads[0].cluster != reader.cluster) u.reads[1] = u.reads[0];
  u.reads[0] = reader;
}

}  // namespace

void fence(Warp& w) {
  if (!enabled()) return;
  Cluster& cluster = *w.cta->cluster;
  Knowledge now = cluster.known;
  now[cluster.index].assign(w.clock.begin(), w.clock.begin() + static_cast<std::ptrdiff_t>(w.clock.size() / 2));
  merge(&cluster.fenced, now);
  ++w.clock[static_cast<size_t>(number(w))];
}

void global(Warp& w, const Instr& i, int lane, Allocation& a, uint64_t address, int bytes, Access access) {
  if (!enabled() || bytes < 2) return;
  const bool sync = access == Access::kAtomic || access == Access::kSyncLoad || access == Access::kSyncStore;
  const bool writes =
      access == Access::kAtomic || access == Access::kSyncStore || access == Access::kStore || access == Access::kAsyncStore;
  Cluster& cluster = *w.cta->cluster;
  if (sync) {
    Knowledge& told = cluster.launch->told[address];
    merge(&cluster.known, told);
    if (writes) merge(&told, cluster.fenced);
  }
  if (a.units.empty()) a.units.resize((a.end - a.begin) / 2 + 1);
  // An asynchronous read may be performed long after it was issued, and is ordered by what waited for it: its clock says little.
  const bool late = access == Access::kAsyncLoad || access == Access::kMulticast;
  const GlobalEntry mine{late ? 1 : w.clock[static_cast<size_t>(number(w))], sync, cluster.index, static_cast<unsigned>(number(w))};
  for (uint64_t at = (address - a.begin) / 2; at < (address - a.begin + static_cast<uint64_t>(bytes)) / 2; ++at) {
    GlobalUnit& u = a.units[at];
    if (!(sync && u.write.atomic)) check(w, i, lane, u.write, "write", a.begin + 2 * at);
    if (!writes) {
      if (!sync) remember(u, mine);
      continue;
    }
    for (const GlobalEntry& reader : u.reads) check(w, i, lane, reader, "read", a.begin + 2 * at);
    u = {mine, {}};
  }
}

}  // namespace gpusim::race
