// grouped_down_backward for sm_90a: its tile, and how its epilogue cuts the pre-activation. A warp has 16 rows of a tile, and goes over
// its 128 outputs in steps of 32. Of each step it keeps a box of gate and up, 16 rows of 8 chunks, in shared memory: in halves the
// chunks 0..3 are gate and 4..7 up, a part of 64-byte rows each; interleaved, the rows are 128 bytes of pairs. Gradients replace them
// there.
#pragma once
#include "gathered_gemm_sm90.h"
#include "grouped_down_backward_config.h"

namespace moe::cuda {

using DownBackwardTile = GatheredTile<128, 128, true, 1, 5>;
static_assert(matches<DownBackwardTile>(info(DownBackwardKernel::kSm90Pingpong)));

constexpr int kStepOutputs = 32;
constexpr int kSteps = DownBackwardTile::kN / kStepOutputs;
constexpr int kPreBoxBytes = 16 * kRowBytes;
constexpr int kPreBoxes = 3;  // one in work, one being filled, one being written to memory

// Byte of a chunk in the box, as TMA finds it there.
MOE_HD constexpr uint32_t pre_place(bool interleaved, int row, int chunk) {
  if (interleaved) return swizzled(row, chunk);
  return static_cast<uint32_t>(chunk / 4 * (kPreBoxBytes / 2) + row * (kRowBytes / 2) + ((chunk % 4 ^ (row / 2 & 3)) << 4));
}

// Column of a chunk in a row of the pre-activation; -1 when there is no such output. `output` is the step's first.
MOE_HD constexpr int pre_column(bool interleaved, int output, int chunk, int I) {
  const int first = output + (interleaved ? chunk * (kChunkElements / 2) : chunk % 4 * kChunkElements);
  if (first >= I) return -1;
  return interleaved ? 2 * first : chunk / 4 * I + first;
}

// The i-th of the four chunks that a lane brings into the box; each eight lanes write to all banks.
MOE_HD constexpr ChunkIndex pre_copy(bool interleaved, int lane, int i) {
  if (interleaved) return {lane / 8 + 4 * i, lane % 8};
  return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4};
}

// A lane's pairs of 16 outputs, in the order of stmatrix and ldmatrix: pair 2j + h holds outputs 8j + 2q and the next of row
// lane / 4 + 8h. Interleaved, these are gate, up, gate, up: eight bytes of one chunk.
struct PairPlace {
  int row, chunk, byte;
};
MOE_HD constexpr PairPlace interleaved_pair(int lane, int i) { return {lane / 4 + 8 * (i % 2), i / 2 * 2 + lane % 4 / 2, lane % 2 * 8}; }

}  // namespace moe::cuda
