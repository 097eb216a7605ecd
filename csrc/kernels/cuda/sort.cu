// Stable counting sort of slots by expert id; the division of labour is in sort_plan.h.
//   up to 16384 slots    one block counts, scans and places
//   above                count per chunk | scan the chunks' counts, one block | place per chunk: three launches
// Lanes of a warp with equal ids find each other with match_any; a lane's rank among them follows from the mask alone, so the
// order is that of the slots, without atomics on rows.
#include "element.cuh"
#include "kernels.h"
#include "sort_plan.h"

namespace moe::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// One warp's 32 slots at a time: f(slot, bin, peers, lane) for every lane; bin is E+1 where there is no slot.
template <class Id, class F>
__device__ void for_each_slot(const SortParams& p, SlotRange run, const F& f) {
  const int lane = threadIdx.x % 32;
  for (int64_t s0 = run.begin; s0 < run.end; s0 += 32) {
    const int64_t s = s0 + lane;
    const int bin = s < run.end ? bin_of(static_cast<const Id*>(p.ids)[s], p.E) : static_cast<int>(p.E) + 1;
    f(s, bin, __match_any_sync(kAllLanes, bin), lane);
  }
}

// What a sorting block keeps: in shared memory, or its part of the workspace.
struct Table {
  int32_t* first_row;  // [E+1]
  uint16_t* counts;    // [warps][E+1]: slots of a warp, then slots of the warps before it
};

template <bool kInShared>
__device__ __forceinline__ Table table_of(const SortParams& p, const SortPlan& plan, char* tables) {
  extern __shared__ __align__(16) char shared[];
  char* mine = kInShared ? shared : tables + blockIdx.x * sort_table_bytes(plan.warps, p.E);
  int32_t* first_row = reinterpret_cast<int32_t*>(mine);
  return {first_row, reinterpret_cast<uint16_t*>(first_row + p.E + 1)};
}

template <class Id>
__device__ void count_runs(const SortParams& p, const SortPlan& plan, int64_t chunk, const Table& table) {
  const int64_t bins = p.E + 1, warp = threadIdx.x / 32;
  for (int64_t i = threadIdx.x; i < plan.warps * bins; i += blockDim.x) table.counts[i] = 0;
  __syncthreads();
  uint16_t* mine = table.counts + warp * bins;
  for_each_slot<Id>(p, warp_run(plan, p.S, chunk, static_cast<int>(warp)), [&](int64_t, int bin, unsigned peers, int lane) {
    if (bin < bins && rank_among(peers, lane) == 0) mine[bin] = static_cast<uint16_t>(mine[bin] + __popc(peers));
    __syncwarp();
  });
  __syncthreads();
}

// Counts -> slots of earlier warps; the chunk's totals go to `totals` unless it is null.
__device__ void scan_warps(const SortParams& p, const SortPlan& plan, const Table& table, int32_t* totals) {
  const int64_t bins = p.E + 1;
  for (int64_t e = threadIdx.x; e < bins; e += blockDim.x) {
    int sum = 0;
    for (int w = 0; w < plan.warps; ++w) {
      const int n = table.counts[w * bins + e];
      table.counts[w * bins + e] = static_cast<uint16_t>(sum);
      sum += n;
    }
    if (totals) totals[e] = sum;
  }
  __syncthreads();
}

// Inclusive sum over the lanes up to this one.
__device__ int32_t scan_lanes(int32_t v) {
  const int lane = threadIdx.x % 32;
  for (int delta = 1; delta < 32; delta *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, v, delta);
    if (lane >= delta) v += other;
  }
  return v;
}

// values[i] -> values[0] + ... + values[i-1]; by one warp. Returns the sum of all.
__device__ int32_t exclusive_scan(int32_t* values, int64_t count) {
  int32_t carry = 0;
  for (int64_t i0 = 0; i0 < count; i0 += 32) {
    const int64_t i = i0 + threadIdx.x % 32;
    const int32_t v = i < count ? values[i] : 0, sum = scan_lanes(v);
    if (i < count) values[i] = carry + sum - v;
    carry += __shfl_sync(kAllLanes, sum, 31);
  }
  return carry;
}

template <class Id>
__device__ void place(const SortParams& p, const SortPlan& plan, int64_t chunk, const Table& table) {
  const int64_t bins = p.E + 1, warp = threadIdx.x / 32;
  uint16_t* mine = table.counts + warp * bins;
  for_each_slot<Id>(p, warp_run(plan, p.S, chunk, static_cast<int>(warp)), [&](int64_t s, int bin, unsigned peers, int lane) {
    const int rank = rank_among(peers, lane);
    const int before = bin < bins ? mine[bin] : 0;
    __syncwarp();
    if (bin < bins) {
      const int32_t row = table.first_row[bin] + before + rank;
      const bool kept = bin < bins - 1;
      p.row_to_slot[row] = kept ? static_cast<int32_t>(s) : -1;
      p.slot_to_row[s] = kept ? row : -1;
      if (rank == 0) mine[bin] = static_cast<uint16_t>(before + __popc(peers));
    }
    __syncwarp();
  });
}

template <class Id, bool kInShared>
__global__ void __launch_bounds__(1024, 1) sort_kernel(SortParams p, SortPlan plan, char* tables) {
  const Table table = table_of<kInShared>(p, plan, tables);
  count_runs<Id>(p, plan, 0, table);
  scan_warps(p, plan, table, table.first_row);
  if (threadIdx.x < 32) exclusive_scan(table.first_row, p.E + 1);
  __syncthreads();
  for (int64_t e = threadIdx.x; e <= p.E; e += blockDim.x) p.expert_offsets[e] = table.first_row[e];
  place<Id>(p, plan, 0, table);
}

// histogram[bin][chunk]
template <class Id, bool kInShared>
__global__ void __launch_bounds__(1024, 1) count_kernel(SortParams p, SortPlan plan, char* tables, int32_t* histogram) {
  const Table table = table_of<kInShared>(p, plan, tables);
  count_runs<Id>(p, plan, blockIdx.x, table);
  scan_warps(p, plan, table, table.first_row);
  for (int64_t e = threadIdx.x; e <= p.E; e += blockDim.x) histogram[e * plan.chunks + blockIdx.x] = table.first_row[e];
}

// Counts of chunks -> rows of the same bin in earlier chunks, a warp per bin; and the first row of every bin.
template <bool kInShared>
__global__ void __launch_bounds__(1024, 1) scan_kernel(SortParams p, SortPlan plan, int32_t* histogram) {
  extern __shared__ __align__(16) char shared[];
  int32_t* totals = kInShared ? reinterpret_cast<int32_t*>(shared) : p.expert_offsets;
  for (int64_t e = threadIdx.x / 32; e <= p.E; e += blockDim.x / 32) {
    const int32_t total = exclusive_scan(histogram + e * plan.chunks, plan.chunks);
    if (threadIdx.x % 32 == 0) totals[e] = total;
  }
  __syncthreads();
  if (threadIdx.x < 32) exclusive_scan(totals, p.E + 1);
  __syncthreads();
  for (int64_t e = threadIdx.x; kInShared && e <= p.E; e += blockDim.x) p.expert_offsets[e] = totals[e];
}

template <class Id, bool kInShared>
__global__ void __launch_bounds__(1024, 1) place_kernel(SortParams p, SortPlan plan, char* tables, const int32_t* histogram) {
  const Table table = table_of<kInShared>(p, plan, tables);
  for (int64_t e = threadIdx.x; e <= p.E; e += blockDim.x) {
    table.first_row[e] = p.expert_offsets[e] + histogram[e * plan.chunks + blockIdx.x];
  }
  count_runs<Id>(p, plan, blockIdx.x, table);
  scan_warps(p, plan, table, nullptr);
  place<Id>(p, plan, blockIdx.x, table);
}

template <class Id, bool kInShared>
Status run(const SortParams& p, const SortPlan& plan, const Launch& launch) {
  int32_t* histogram = static_cast<int32_t*>(launch.workspace);
  char* tables = static_cast<char*>(launch.workspace) + sort_histogram_bytes(plan, p.E);
  const Grid grid{plan.chunks, dim3(plan.warps * 32), kInShared ? static_cast<int>(sort_table_bytes(plan.warps, p.E)) : 0};
  const Grid scan{1, dim3(1024), kInShared ? static_cast<int>((p.E + 1) * 4) : 0};
  if (plan.chunks == 1) return launch_grid(sort_kernel<Id, kInShared>, grid, launch, p, plan, tables);
  if (const Status s = launch_grid(count_kernel<Id, kInShared>, grid, launch, p, plan, tables, histogram); s != Status::kOk) return s;
  if (const Status s = launch_grid(scan_kernel<kInShared>, scan, launch, p, plan, histogram); s != Status::kOk) return s;
  return launch_grid(place_kernel<Id, kInShared>, grid, launch, p, plan, tables, histogram);
}

template <class Id>
Status run(const SortParams& p, const Launch& launch) {
  const SortPlan plan = sort_plan(p.S, p.E);
  return plan.in_shared ? run<Id, true>(p, plan, launch) : run<Id, false>(p, plan, launch);
}

int64_t workspace(const SortParams& p, int) { return sort_workspace_bytes(sort_plan(p.S, p.E), p.E); }

Status launch(const SortParams& p, const Launch& launch) { return p.ids_int64 ? run<int64_t>(p, launch) : run<int32_t>(p, launch); }

}  // namespace

const Kernel<SortParams> sort_by_expert = {nullptr, workspace, launch};

}  // namespace moe::cuda
