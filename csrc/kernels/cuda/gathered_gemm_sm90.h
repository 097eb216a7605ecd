// Plan and index maps of the gathered grouped GEMM for sm_90a (gathered_gemm_sm90.cuh):
//   acc[r, n] = sum over k of a[row r of the expert, k] * b[e][n, k]
// A producer warpgroup fills a ring of stages, rows of `a` by cp.async and boxes of `b` by TMA; two consumer warpgroups multiply
// (wgmma) and hand their accumulators to an epilogue. A stage is kDepth of k; all its tiles are swizzled in rows of 128 bytes.
#pragma once
#include "../params.h"
#include "host_device.h"
#include "mma_tile.h"
#include "rules.h"

namespace moe::cuda {

constexpr int kWarpgroup = 128;
constexpr int kGatheredThreads = 3 * kWarpgroup;  // a producer and two consumers
constexpr int kDepth = 64;                        // k per stage: 128 bytes
constexpr int kRowBytes = 128;
constexpr int64_t kSharedLimit = 227 * 1024;  // of a block on 9.0

// Registers per thread: the block is launched with 168, and no more than it was launched with can be handed out.
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168);

// The tile of a block: M rows of one expert by N columns. Cooperative: each consumer has half of the rows. Ping-pong: the consumers
// take turns at whole tiles, one multiplies while the other is in its epilogue. Blocks of a cluster have neighbouring rows of one
// expert and the same columns; each loads its part of b for all.
template <int M, int N, bool pingpong, int cluster, int stages>
struct GatheredTile {
  static constexpr int kM = M, kN = N, kCluster = cluster, kStages = stages;
  static constexpr bool kPingpong = pingpong;
  static constexpr int kConsumerM = pingpong ? M : M / 2;
  static constexpr int kProducts = kConsumerM / 64;  // wgmma instructions, one below the other
  static constexpr int kParts = N / 128;             // of b: what one block of a cluster loads
  static constexpr int kABytes = M * kRowBytes, kBBytes = N * kRowBytes, kStageBytes = kABytes + kBBytes;
  static constexpr int kCopies = M * 8 / kWarpgroup;  // of 16 bytes, per producer thread and stage
  static constexpr int kClusterM = M * cluster;       // rows of RowTiles
  static constexpr int kFullArrivals = kWarpgroup + 1;
  // cp.async writes and wgmma reads: by the letter of the PTX ISA two proxies, though common practice has no fence between them.
  static constexpr bool kFenceCopies = true;
  static constexpr int kEmptyArrivals = (pingpong ? 4 : 8) * cluster;  // consumer warps that read a stage
  static constexpr int kBarriers = 2 * stages + 2;                     // full, empty; whose turn it is

  // Behind the ring: a part for each consumer warp's epilogue (multiples of 1024 bytes, as swizzled tiles must be), the barriers.
  static MOE_HD constexpr int epilogue_at(int bytes_per_warp, int warp) { return stages * kStageBytes + warp * bytes_per_warp; }
  static MOE_HD constexpr int barriers_at(int bytes_per_warp) { return epilogue_at(bytes_per_warp, 8); }
  static MOE_HD constexpr int shared_bytes(int bytes_per_warp) { return barriers_at(bytes_per_warp) + 8 * kBarriers; }

  static_assert(kConsumerM % 64 == 0 && N % 128 == 0 && N <= 256 && kStageBytes % 1024 == 0);
  static_assert(kProducts * N <= 256, "accumulators: at most 128 registers");
  static_assert(cluster == 1 || cluster == kParts, "each block of a cluster loads one part of b");
};

template <class Tile>
constexpr bool matches(const KernelInfo& info) {
  return info.tile_m == Tile::kM && info.tile_n == Tile::kN && info.tile_k == kDepth;
}

// Byte of 16-byte chunk `chunk` in row `row` of a tile whose rows are 128 bytes.
MOE_HD constexpr uint32_t swizzled(int row, int chunk) { return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ (row & 7)) << 4)); }

// The i-th chunk that a producer thread copies: eight threads read 128 consecutive bytes of a row.
MOE_HD constexpr ChunkIndex gathered_chunk(int thread, int i) { return {thread / 8 + 16 * i, thread % 8}; }
// How many of a thread's rows lie before `rows`.
MOE_HD constexpr int gathered_rows(int thread, int rows) { return static_cast<int>(divide_up(greatest(rows - thread / 8, 0), 16)); }

// What wgmma is told of a tile that begins at byte `address` of shared memory. K-major: rows of 64 k, eight rows every 1024 bytes.
// MN-major: chunks of 64 columns (m or n) every 8192 bytes, in which each k has a row of 128 bytes.
template <Major major>
class MatrixDescriptor {
 public:
  MOE_HD constexpr explicit MatrixDescriptor(uint32_t address) : low_(address >> 4 | kLeading << 16) {}

  // The 16 k from 16 * product, and rows from `row` (K-major only: a multiple of 8).
  MOE_HD constexpr uint64_t at(int product, int row) const {
    const int bytes = product * (major == Major::kK ? 32 : 16 * kRowBytes) + row * kRowBytes;
    return uint64_t{kHigh} << 32 | (low_ + static_cast<uint32_t>(bytes / 16));
  }

 private:
  static constexpr uint32_t kLeading = major == Major::kK ? 1 : 8192 / 16;  // K-major: not used
  static constexpr uint32_t kStride = 1024 / 16, kSwizzle128 = 1, kHigh = kStride | kSwizzle128 << 30;
  uint32_t low_;  // the first address stays below 2^14 units of 16 bytes, so that additions do not carry
};

// The chunk of a 16-row tile whose address `lane` gives stmatrix.x4 for two m16n8 accumulators side by side, the first at `chunk`.
MOE_HD constexpr ChunkIndex stmatrix_chunk(int lane, int chunk) { return {lane % 16, chunk + lane / 16}; }

// Position in the ring; a wait for the phase's parity ends when the stage has been filled (or, from the other side, freed) again.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  MOE_HD void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  MOE_HD void skip(int steps) {
    parity ^= static_cast<uint32_t>((stage + steps) / kStages) & 1;
    stage = (stage + steps) % kStages;
  }
};

// What a cluster's tile leaves for one of its blocks, and that for 16 rows of one warp: possibly no rows at all.
MOE_HD constexpr int rows_from(int rows, int first, int at_most) { return least(greatest(rows - first, 0), at_most); }

// Matrices of E experts as a tensor map sees them: `outer` rows of `inner` consecutive elements. Strides count elements.
struct MatrixView {
  const void* base = nullptr;
  const void* const* list = nullptr;
  int64_t inner = 0, outer = 0, stride = 0, stride_e = 0;
  Major major = Major::kK;  // of the operand: inner is k, or n
  bool readable = false;    // by TMA: multiples of 16 bytes, and no expert lies upon another
};

// `table` as E x (N, K).
inline MatrixView matrix_view(const WeightTable& table, int64_t E, int64_t N, int64_t K) {
  MatrixView v{table.base, table.list};
  v.major = table.stride_k == 1 ? Major::kK : Major::kMN;
  const bool k_major = v.major == Major::kK;
  v.inner = k_major ? K : N;
  v.outer = k_major ? N : K;
  v.stride = k_major ? table.stride_n : table.stride_k;
  v.stride_e = table.list || E == 1 ? v.outer * v.stride : table.stride_e;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  v.readable = (k_major || table.stride_n == 1) && v.inner > 0 && v.outer > 0 && v.inner % 8 == 0 && v.stride % 8 == 0 &&
               v.stride >= v.inner && v.stride_e % 8 == 0 && v.stride_e > 0;
  if (!table.list) v.readable = v.readable && aligned(table.base);
  for (int64_t e = 0; table.list && e < E; ++e) v.readable = v.readable && aligned(table.list[e]);
  return v;
}

}  // namespace moe::cuda
