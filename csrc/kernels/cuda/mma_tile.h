// Index maps of the tensor-core tile: where operands lie in shared memory, what ldmatrix and mma.sync.m16n8k16 hand to which
// lane, and which part of the output a thread holds. An operand is K-major (rows of consecutive k) or MN-major (rows of
// consecutive m or n, one row per k); shared memory keeps the order of global memory, in chunks of 16 bytes, swizzled so that
// the eight rows that ldmatrix reads at once lie in different banks.
#pragma once
#include "host_device.h"

namespace moe::cuda {

enum class Major { kK, kMN };

constexpr int kMmaThreads = 256;
constexpr int kMmaDepth = 32;  // k per stage
constexpr int kMmaStages = 4;  // of the ring buffer
constexpr int kChunkElements = 8;

// Rows of an operand with `extent` rows (m or n) of one stage, and chunks in each.
template <Major major>
MOE_HD constexpr int tile_rows(int extent) {
  return major == Major::kK ? extent : kMmaDepth;
}
template <Major major>
MOE_HD constexpr int row_chunks(int extent) {
  return major == Major::kK ? kMmaDepth / kChunkElements : extent / kChunkElements;
}

// Position, in chunks, of one chunk of a stage.
template <Major major>
MOE_HD constexpr int chunk_position(int extent, int row, int chunk) {
  // K-major rows are 64 bytes: two of them fill the banks, so every second row takes another chunk order.
  const int swizzle = major == Major::kK ? (row >> 1) & 3 : row & 7;
  return row * row_chunks<major>(extent) + (chunk ^ swizzle);
}

struct ChunkIndex {
  int row, chunk;
};

// The i-th chunk of a stage that a thread brings in: neighbouring threads, neighbouring chunks of global memory.
template <Major major>
MOE_HD constexpr ChunkIndex copied_chunk(int extent, int thread, int i) {
  const int index = thread + i * kMmaThreads, chunks = row_chunks<major>(extent);
  return {index / chunks, index % chunks};
}
template <Major major>
MOE_HD constexpr int copies_per_thread(int extent) {
  return tile_rows<major>(extent) * row_chunks<major>(extent) / kMmaThreads;
}

// ldmatrix.x4 of the 16 (m or n) x 16 (k) block at (mn, k): the chunk whose address `lane` gives. Matrices 1 and 2 are the
// lower left and upper right quarters of A; for B, whose two n8 halves are separate operands, the other way round.
template <Major major, bool is_a>
MOE_HD constexpr ChunkIndex ldmatrix_chunk(int lane, int mn, int k) {
  const int matrix = lane >> 3, first = matrix & 1, second = matrix >> 1;
  const int mn8 = is_a ? first : second, k8 = is_a ? second : first;
  if (major == Major::kK) return {mn + 8 * mn8 + (lane & 7), k / 8 + k8};
  return {k + 8 * k8 + (lane & 7), mn / 8 + mn8};
}

// Element i of an m16n8 accumulator.
MOE_HD constexpr int accumulator_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
MOE_HD constexpr int accumulator_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Where a tile's sums wait in shared memory to leave row by row, in floats from the tile's first. Eight neighbouring columns, one
// 16-byte store of results, are two chunks half a row apart, and rows are swizzled: neither the pairs that threads hold nor the
// rows that they read back meet in a bank.
template <int BN>
MOE_HD constexpr int staged_position(int row, int column) {
  const int eight = column / 8, half = column / 4 % 2;
  return row * BN + half * (BN / 2) + (eight ^ (row & 3) ^ (half << 2)) * 4 + column % 4;
}

// A block's tile of BM x BN outputs: 2 x 4 warps.
template <int BM, int BN>
struct MmaTile {
  static constexpr int kM = BM, kN = BN, kWarpM = BM / 2, kWarpN = BN / 4, kStepsM = kWarpM / 16, kStepsN = kWarpN / 8;
  static constexpr int kABytes = BM * kMmaDepth * 2, kBBytes = BN * kMmaDepth * 2, kStageBytes = kABytes + kBBytes;
  static constexpr int kSharedBytes = kMmaStages * kStageBytes;
  static_assert(BM * BN * 4 <= kSharedBytes);  // the sums, once the stages are used up

  static MOE_HD constexpr int warp_m(int warp) { return warp / 4 * kWarpM; }
  static MOE_HD constexpr int warp_n(int warp) { return warp % 4 * kWarpN; }
};

// How many of a chunk's elements lie before `end`.
MOE_HD constexpr int valid_elements(int64_t first, int64_t end) {
  return end <= first ? 0 : end - first < kChunkElements ? static_cast<int>(end - first) : kChunkElements;
}

}  // namespace moe::cuda
