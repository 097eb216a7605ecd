// The stable counting sort's division of labour. A block sorts one chunk of slots; each of its warps owns a run of consecutive
// slots and a histogram of its own, so that counts, prefixes and ranks are those of a sequential sort whatever the warps' order.
#pragma once
#include "../params.h"
#include "host_device.h"

namespace moe::cuda {

constexpr int64_t kSortOneBlock = 16384;    // up to here one block sorts everything
constexpr int64_t kSortShared = 48 * 1024;  // shared memory that every device grants without being asked

struct SortPlan {
  int warps = 32;         // per block
  int64_t run = 0;        // slots per warp, a multiple of 32
  int64_t chunks = 1;     // blocks
  bool in_shared = true;  // whether a block's table is in shared memory; from 8192 experts on it is in the workspace

  MOE_HD int64_t chunk() const { return run * warps; }
};

// A block's table: the first row of every bin (E experts and the dropped slots), then one 16-bit counter per warp and bin.
MOE_HD int64_t sort_table_bytes(int warps, int64_t E) { return round_up((E + 1) * (4 + 2 * static_cast<int64_t>(warps)), 16); }

// Counters are 16 bits wide: no chunk has more than 65535 slots.
MOE_HD SortPlan sort_plan(int64_t S, int64_t E) {
  SortPlan plan;
  while (plan.warps > 1 && sort_table_bytes(plan.warps, E) > kSortShared) plan.warps /= 2;
  plan.in_shared = sort_table_bytes(plan.warps, E) <= kSortShared;
  if (!plan.in_shared) plan.warps = 8;
  const int64_t chunk = S <= kSortOneBlock ? S : S <= int64_t{1} << 23 ? 8192 : 32768;
  plan.run = round_up(divide_up(chunk, plan.warps), 32);
  plan.chunks = S <= kSortOneBlock ? 1 : divide_up(S, plan.chunk());
  return plan;
}

// [E+1][chunks] counters, only with several chunks.
MOE_HD int64_t sort_histogram_bytes(const SortPlan& plan, int64_t E) {
  return plan.chunks == 1 ? 0 : round_up((E + 1) * plan.chunks * 4, 16);
}

// The histogram, then the tables that do not fit into shared memory.
MOE_HD int64_t sort_workspace_bytes(const SortPlan& plan, int64_t E) {
  return sort_histogram_bytes(plan, E) + (plan.in_shared ? 0 : plan.chunks * sort_table_bytes(plan.warps, E));
}

struct SlotRange {
  int64_t begin, end;
};
MOE_HD SlotRange warp_run(const SortPlan& plan, int64_t S, int64_t chunk, int warp) {
  const int64_t begin = chunk * plan.chunk() + warp * plan.run;
  return {least(begin, S), least(begin + plan.run, S)};
}

// Where a slot is counted: its expert, or E when it is dropped.
MOE_HD int bin_of(int64_t id, int64_t E) { return static_cast<int>(id >= 0 && id < E ? id : E); }

// Among the lanes of a warp that have the same bin (`peers`, itself included): how many come before this one.
MOE_HD int rank_among(uint32_t peers, int lane) {
  const uint32_t before = peers & ((1u << lane) - 1);
#if defined(__CUDA_ARCH__)
  return __popc(before);
#else
  return __builtin_popcount(before);
#endif
}

}  // namespace moe::cuda
