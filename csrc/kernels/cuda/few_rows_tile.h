// Index maps of the kernels for few rows per expert (grouped_mm_few_rows.cu). In mma.m16n8k16 the 16 rows are those of x, and the
// weights are the other operand, two registers a lane: 16 bytes go from global memory to a lane's registers and are operands
// there, with no shared memory in between. For that the order of k within a sum is free, and so is which output a column stands for.
// A slice is 32 k of every output of a tile: two steps of 16 k, in which lane l holds the k from l % 4 * 8 on, of both operands.
#pragma once
#include "mma_tile.h"

namespace moe::cuda {

constexpr int kFewRows = 16;  // of x, in a tile
constexpr int kSliceDepth = 32;
constexpr int kSliceWarps = 8;  // warp w takes the slices w, w + 8, ...; their sums are added in the order of w

// The two halves of a tile's outputs may be those of two matrices.
template <Major major>
struct FewRowsTile {
  static constexpr bool kIsKMajor = major == Major::kK;
  static constexpr int kOutputs = kIsKMajor ? 32 : 64, kHalf = kOutputs / 2;
  static constexpr int kLoads = kOutputs / 8;     // of 16 bytes, per lane and slice
  static constexpr int kProducts = kOutputs / 8;  // m16n8k16, per step

  // The output of a load's first element, whose k is lane % 4 * 8 of the slice, plus the number of the load where outputs are contiguous;
  // the other seven follow in k, or in the outputs.
  static MOE_HD constexpr int load_output(int lane, int load) { return kIsKMajor ? lane / 4 + 8 * load : lane / 4 * 8; }

  // The output that a column of a product stands for.
  static MOE_HD constexpr int output(int product, int column) { return kIsKMajor ? 8 * product + column : 8 * column + product; }

  // A product's two registers of weights, each a pair of k, from a lane's loads.
  static MOE_HD void weights(const unsigned (&loads)[kLoads][4], int product, int step, unsigned (&b)[2]) {
    for (int pair = 0; pair < 2; ++pair) {
      if (kIsKMajor) {
        b[pair] = loads[product][2 * step + pair];
      } else {  // the same 16 bits of two rows of k
        const unsigned low = loads[4 * step + 2 * pair][product / 2], high = loads[4 * step + 2 * pair + 1][product / 2];
        b[pair] = product % 2 ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
      }
    }
  }

  // Sums of a warp in shared memory, in floats. Rows are 8 banks apart: 16 lanes write their pairs of columns without conflict.
  static constexpr int kRowFloats = kOutputs + 8, kWarpFloats = kFewRows * kRowFloats;
  static MOE_HD constexpr int sum_position(int row, int product, int column) { return row * kRowFloats + 8 * product + column; }
  static MOE_HD constexpr int sum_position(int row, int output) {
    return kIsKMajor ? sum_position(row, output / 8, output % 8) : sum_position(row, output % 8, output / 8);
  }
};

// The registers of the other operand: rows lane/4 and +8 of x, 16 bytes each, two pairs of k of each row in a step.
MOE_HD void few_rows_operand(const unsigned (&x)[2][4], int step, unsigned (&a)[4]) {
  for (int i = 0; i < 4; ++i) a[i] = x[i % 2][2 * step + i / 2];
}

// How many tiles of outputs a block computes, one after the other without a pause in its loads: a power of two, more than one as
// soon as that leaves eight blocks for each multiprocessor, so that blocks without rows, which only find that out, are few.
MOE_HD constexpr int tiles_per_block(int64_t row_tiles, int64_t output_tiles, int64_t multiprocessors) {
  int tiles = 1;
  while (tiles < 8 && row_tiles * output_tiles >= 2 * tiles * 8 * multiprocessors && tiles < output_tiles) tiles *= 2;
  return tiles;
}

}  // namespace moe::cuda
