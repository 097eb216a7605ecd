// Plan and index maps of grouped_mm_wgrad for sm_90a without copies of gathered rows (grouped_mm_wgrad_gather_sm90.cu):
//   out[e][m, n] = sum over the rows r of e of a[r, m] * b[r, n]
// on the ring of the gathered GEMM: k is a row, so that both operands are MN-major and every row may lie anywhere. A stage has 64
// rows: 128 columns of a, then 256 of b, in chunks of 64 columns; row k of a chunk has 128 bytes.
#pragma once
#include "gathered_gemm_sm90.h"
#include "row_tiles.h"

namespace moe::cuda {

struct WgradTile : GatheredTile<128, 256, false, 1, 4> {
  static constexpr int kFullArrivals = kWarpgroup;  // only copies: no tensor map, no TMA
  static constexpr int kChunkBytes = kDepth * kRowBytes;
  static constexpr int kCopiedRows = kDepth * 8 / kWarpgroup;  // per producer thread; it copies as many chunks of each as there are
};

// A result is cut into tiles of M x N, each as much work as its expert has rows. All tiles of the expert with the most rows come first.
struct WgradPlan {
  int row_tiles = 0, column_tiles = 0;
  MOE_HD constexpr int per_expert() const { return row_tiles * column_tiles; }
};
MOE_HD constexpr WgradPlan wgrad_plan(int64_t M, int64_t N) {
  return {static_cast<int>(divide_up(M, WgradTile::kM)), static_cast<int>(divide_up(N, WgradTile::kN))};
}

// How many experts come before expert e.
MOE_HD constexpr int place_by_rows(const int32_t* expert_offsets, int E, int e) {
  const int rows = expert_offsets[e + 1] - expert_offsets[e];
  int before = 0;
  for (int f = 0; f < E; ++f) {
    const int others = expert_offsets[f + 1] - expert_offsets[f];
    before += others > rows || (others == rows && f < e) ? 1 : 0;
  }
  return before;
}

// The tile that a block computes in its turn `turn`: to and fro, so that who had the most work of one round has the least of the next.
// Work then differs between blocks by no more than the largest tile. Counted in steps, for Qwen3-30B-A3B's down projection with Zipf
// routing on 132 blocks, the busiest has 1.05 times the mean; with experts in their own order and no turning back, 1.3 to 1.4 times.
MOE_HD constexpr int tile_of_turn(int turn, int block, int blocks) { return turn * blocks + (turn % 2 ? blocks - 1 - block : block); }

// A producer warp copies 16 of the 64 rows of a step, those of gathered_chunk(): thread t its rows t / 8 + 16 i. Lanes 0 to 15 look up
// one source row each, so that a row's map entry is read and divided once; the others do as lane % 16.
MOE_HD constexpr int looked_up_row(int thread) { return thread / 32 * 4 + thread % 4 + 16 * (thread % 16 / 4); }
// The lane that has looked up the i-th row of `lane`.
MOE_HD constexpr int lane_of_row(int lane, int i) { return lane / 8 + 4 * i; }

// Of the chunks of 64 columns from `column`, how many begin before `end`: those in which a thread's 16 bytes are to be read.
MOE_HD constexpr int columns_inside(int column, int end) { return static_cast<int>(divide_up(greatest(end - column, 0), 64)); }

}  // namespace moe::cuda
