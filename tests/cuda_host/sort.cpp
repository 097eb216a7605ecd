// The sort's plan, executed step by step as the kernels do, gives the rows of a sequential stable sort; its counters hold every
// count; its shared memory and workspace are what it asks for.
#include <algorithm>

#include "check.h"
#include "kernels/cuda/sort_plan.h"

using namespace moe::cuda;

// f(slot, bin, rank) for 32 slots at a time; ranks as the device computes them, from the mask of equal lanes.
template <class F>
static void for_each_slot(const std::vector<int64_t>& ids, int64_t E, SlotRange run, const F& f) {
  for (int64_t s0 = run.begin; s0 < run.end; s0 += 32) {
    int bins[32], ranks[32];
    for (int lane = 0; lane < 32; ++lane) bins[lane] = s0 + lane < run.end ? bin_of(ids[s0 + lane], E) : static_cast<int>(E) + 1;
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t peers = 0;
      for (int other = 0; other < 32; ++other) peers |= bins[other] == bins[lane] ? 1u << other : 0;
      ranks[lane] = rank_among(peers, lane);
    }
    for (int lane = 0; lane < 32 && s0 + lane < run.end; ++lane) f(s0 + lane, bins[lane], ranks[lane]);
  }
}

static void check_sort(int64_t S, int64_t E, int kind, std::mt19937& random) {
  const std::vector<int64_t> ids = routing(kind, S, E, random);
  const SortPlan plan = sort_plan(S, E);
  const int64_t bins = E + 1, runs = plan.chunks * plan.warps;
  CHECK(plan.chunk() * plan.chunks >= S && plan.run % 32 == 0, "S=%ld E=%ld", S, E);
  std::vector<int32_t> first(bins * runs);  // slots of a run, then rows of its bin before it
  std::vector<int> covered(S);
  for (int64_t r = 0; r < runs; ++r) {
    for_each_slot(ids, E, warp_run(plan, S, r / plan.warps, r % plan.warps), [&](int64_t s, int bin, int) {
      ++first[bin * runs + r];
      ++covered[s];
    });
  }
  CHECK(std::all_of(covered.begin(), covered.end(), [](int n) { return n == 1; }), "S=%ld E=%ld", S, E);
  for (int64_t bin = 0, row = 0; bin < bins; ++bin) {
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      int64_t in_chunk = 0;
      for (int64_t r = chunk * plan.warps; r < (chunk + 1) * plan.warps; ++r) {
        CHECK(in_chunk <= UINT16_MAX && first[bin * runs + r] <= UINT16_MAX, "S=%ld E=%ld: a 16-bit counter overflows", S, E);
        const int32_t n = first[bin * runs + r];
        in_chunk += n;
        first[bin * runs + r] = static_cast<int32_t>(row);
        row += n;
      }
    }
  }
  std::vector<int64_t> wanted(S);
  for (int64_t s = 0; s < S; ++s) wanted[s] = s;
  std::stable_sort(wanted.begin(), wanted.end(), [&](int64_t a, int64_t b) { return bin_of(ids[a], E) < bin_of(ids[b], E); });
  for (int64_t r = 0; r < runs; ++r) {
    std::vector<int32_t> next(bins);
    for (int64_t bin = 0; bin < bins; ++bin) next[bin] = first[bin * runs + r];
    const SlotRange range = warp_run(plan, S, r / plan.warps, r % plan.warps);
    for (int64_t s0 = range.begin; s0 < range.end; s0 += 32) {
      std::vector<int32_t> after = next;
      for_each_slot(ids, E, {s0, std::min(s0 + 32, range.end)}, [&](int64_t s, int bin, int rank) {
        CHECK(wanted[next[bin] + rank] == s, "S=%ld E=%ld kind=%d: slot %ld", S, E, kind, s);
        after[bin] = std::max(after[bin], next[bin] + rank + 1);
      });
      next = after;
    }
  }
}

int main() {
  std::mt19937 random(2);
  for (int64_t E : {1, 3, 128, 512, 1024}) {
    for (int64_t S : {0, 1, 31, 33, 1000, 16384, 16385, 40000}) {
      for (int kind = 0; kind < kRoutings; ++kind) check_sort(S, E, kind, random);
    }
  }
  for (int64_t S : {0, 33, 20000}) check_sort(S, 9000, 4, random);
  for (int64_t E : {1, 128, 256, 512, 700, 1024, 2048, 4096, 8191, 8192, 100000}) {
    for (int64_t S : {int64_t{0}, int64_t{16384}, int64_t{16385}, int64_t{1} << 23, (int64_t{1} << 23) + 1, (int64_t{1} << 31) - 2}) {
      const SortPlan plan = sort_plan(S, E);
      const int64_t table = (E + 1) * (4 + 2 * plan.warps);
      CHECK(plan.in_shared == (E <= 8191) && (!plan.in_shared || table <= kSortShared), "E=%ld", E);
      CHECK(plan.chunk() <= UINT16_MAX && plan.chunk() * plan.chunks >= S &&
                plan.chunks * plan.chunk() - S < std::max<int64_t>(plan.chunk(), 1024 + 32),
            "S=%ld E=%ld", S, E);
      const int64_t histogram = plan.chunks == 1 ? 0 : (E + 1) * plan.chunks * 4,
                    all = histogram + (plan.in_shared ? 0 : plan.chunks * table);
      CHECK(sort_histogram_bytes(plan, E) >= histogram && sort_histogram_bytes(plan, E) % 16 == 0, "S=%ld E=%ld", S, E);
      CHECK(sort_workspace_bytes(plan, E) >= all && sort_workspace_bytes(plan, E) < all + 16 * (plan.chunks + 1), "S=%ld E=%ld", S, E);
      CHECK(plan.warps >= 1 && plan.warps <= 32 && plan.chunks <= INT32_MAX, "S=%ld E=%ld", S, E);
    }
  }
  return 0;
}
