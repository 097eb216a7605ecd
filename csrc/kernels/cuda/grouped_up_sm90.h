// grouped_up for sm_90a: its tiles, how gate and up lie in the product's columns, and which thread holds what of them.
// A tile has 256 columns, those of 128 outputs. Halves: 128 columns of gate, then the 128 of up. Adjacent: gate and up of an output
// side by side, as in weights and pre-activations that are interleaved. Either way one thread holds gate and up of an output.
#pragma once
#include "gathered_gemm_sm90.h"
#include "grouped_up_config.h"

namespace moe::cuda {

constexpr int kUpOutputs = 128;  // of a tile
constexpr int kUpColumns = 2 * kUpOutputs;

using UpCooperative = GatheredTile<128, kUpColumns, false, 2, 4>;
using UpPingpong = GatheredTile<64, kUpColumns, true, 1, 4>;
static_assert(matches<UpCooperative>(info(UpKernel::kSm90Cooperative)) && matches<UpPingpong>(info(UpKernel::kSm90Pingpong)));

enum class Pairing { kHalves, kAdjacent };

// Where TMA reads the weights: two boxes of 128 columns per k-block.
struct UpOperands {
  Pairing pairing = Pairing::kHalves;
  MatrixView part[2];  // gate, up; or twice the matrix that has both
  int tile_columns = kUpOutputs, part_columns = 0;
  bool readable = false;
};

inline UpOperands up_operands(const GroupedUpParams& p) {
  UpOperands o;
  o.part[0] = matrix_view(p.gate_proj, p.E, p.I, p.H);
  o.part[1] = matrix_view(p.up_proj, p.E, p.I, p.H);
  if (p.activation.interleaved) {  // one matrix of 2I outputs, of which gate has every second
    WeightTable both = p.gate_proj;
    both.stride_n /= 2;
    const char* second = static_cast<const char*>(both.base) + both.stride_n * element_size(p.dtype);
    o.pairing = Pairing::kAdjacent;
    o.tile_columns = kUpColumns;
    o.part_columns = kUpOutputs;
    o.part[0] = o.part[1] = matrix_view(both, p.E, 2 * p.I, p.H);
    o.readable = o.part[0].readable && !both.list && !p.up_proj.list && p.gate_proj.stride_n % 2 == 0 && p.up_proj.base == second &&
                 p.up_proj.stride_n == p.gate_proj.stride_n && p.up_proj.stride_k == p.gate_proj.stride_k &&
                 p.up_proj.stride_e == p.gate_proj.stride_e;
  } else {
    o.readable = o.part[0].readable && o.part[1].readable && o.part[0].major == o.part[1].major && !o.part[0].list == !o.part[1].list;
  }
  return o;
}

// A thread's accumulators as pairs: pair 2j + h holds columns 8j + 2q and the next, q = lane % 4, of row lane / 4 + 8h. Those of half
// of the outputs are 32 pairs; in halves, the 16 of up follow the 16 of gate.
constexpr int kHalfPairs = kUpColumns / 8;
template <Pairing pairing>
MOE_HD constexpr int accumulator_pair(int half, int i) {
  if (pairing == Pairing::kAdjacent) return half * kHalfPairs + i;
  return i / (kHalfPairs / 2) * kHalfPairs + half * (kHalfPairs / 2) + i % (kHalfPairs / 2);
}
// The first of the half's 64 outputs that pair i of a lane is part of.
template <Pairing pairing>
MOE_HD constexpr int output_of_pair(int lane, int i) {
  return pairing == Pairing::kHalves ? i / 2 % 8 * 8 + 2 * (lane % 4) : 4 * (i / 2) + lane % 4;
}

// Adjacent: a lane forms outputs 4j + q from pair 2j + h, but must store outputs 8i + 2q and 8i + 2q + 1. It packs those of j = 2i and
// 2i + 1 in one word, low half first, and takes from each of two lanes of its quad, in order, one half of theirs.
MOE_HD constexpr int exchange_source(int lane, int which) { return lane / 4 * 4 + 2 * (lane % 2) + which; }
MOE_HD constexpr bool exchange_high(int lane) { return lane % 4 >= 2; }

}  // namespace moe::cuda
