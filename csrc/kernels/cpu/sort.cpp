// Stable counting sort of slots by expert id, in three passes over fixed chunks: count, prefix, place.
// Chunk boundaries depend on S alone, so the result does not depend on the number of threads (a stable sort has only one).
// Workspace: one histogram of E+1 counters per chunk; the last counter collects dropped slots.
#include <cstring>

#include "float_types.h"
#include "kernels.h"

namespace moe::cpu::MOE_ISA {
namespace {

constexpr int64_t kChunk = 16384;

int64_t chunks(const SortParams& p) { return (p.S + kChunk - 1) / kChunk; }

int64_t workspace(const SortParams& p, int) { return chunks(p) * (p.E + 1) * int64_t{sizeof(int32_t)}; }

template <class Id>
void count(const SortParams& p, int64_t chunk, int32_t* histogram) {
  const Id* ids = static_cast<const Id*>(p.ids);
  std::memset(histogram, 0, sizeof(int32_t) * (p.E + 1));
  const int64_t end = chunk * kChunk + kChunk < p.S ? chunk * kChunk + kChunk : p.S;
  for (int64_t s = chunk * kChunk; s < end; ++s) {
    const int64_t id = ids[s];
    ++histogram[id >= 0 && id < p.E ? id : p.E];
  }
}

template <class Id>
void place(const SortParams& p, int64_t chunk, int32_t* next) {
  const Id* ids = static_cast<const Id*>(p.ids);
  const int64_t end = chunk * kChunk + kChunk < p.S ? chunk * kChunk + kChunk : p.S;
  for (int64_t s = chunk * kChunk; s < end; ++s) {
    const int64_t id = ids[s];
    const bool kept = id >= 0 && id < p.E;
    const int32_t row = next[kept ? id : p.E]++;
    p.row_to_slot[row] = kept ? static_cast<int32_t>(s) : -1;
    p.slot_to_row[s] = kept ? row : -1;
  }
}

// Turns counts into each chunk's first row per expert; dropped slots take the rows after the last expert's.
void prefix(const SortParams& p, int32_t* histograms) {
  int32_t row = 0;
  for (int64_t e = 0; e <= p.E; ++e) {
    p.expert_offsets[e] = row;
    for (int64_t c = 0; c < chunks(p); ++c) {
      int32_t& cell = histograms[c * (p.E + 1) + e];
      const int32_t n = cell;
      cell = row;
      row += n;
    }
  }
}

template <class Id>
void run(const SortParams& p, const Launch& launch) {
  int32_t* histograms = static_cast<int32_t*>(launch.workspace);
  for_each_task(launch, chunks(p), [&](int64_t c, int) { count<Id>(p, c, histograms + c * (p.E + 1)); });
  prefix(p, histograms);
  for_each_task(launch, chunks(p), [&](int64_t c, int) { place<Id>(p, c, histograms + c * (p.E + 1)); });
}

Status launch(const SortParams& p, const Launch& l) {
  if (p.ids_int64) {
    run<int64_t>(p, l);
  } else {
    run<int32_t>(p, l);
  }
  return Status::kOk;
}

}  // namespace

const Kernel<SortParams> sort_by_expert = {nullptr, workspace, launch};

}  // namespace moe::cpu::MOE_ISA
