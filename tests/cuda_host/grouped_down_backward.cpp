// grouped_down_backward: which calls have a kernel, and how a warp's box of pre-activations lies in shared memory: one chunk per place,
// where TMA's swizzle looks for it, every column of the pre-activation once, and in each lane gate and up of the outputs it has sums of.
// Compiled with and without MOE_CUDA_SM90: without it there is no kernel.
#include <set>

#include "check.h"
#include "kernels/cuda/grouped_down_backward_sm90.h"

using namespace moe;
using namespace moe::cuda;

static void check_rules() {
  std::set<const char*> reached;
  for (int capability : {0, 80, 89, 90, 100, 120}) {
    for (int64_t rows : {0, 1, 16 * 128 - 1, 16 * 128, 100000}) {
      for (int bits = 0; bits < 64; ++bits) {
        KernelQuery q{bits & 1 ? DType::kFloat32 : DType::kFloat16, capability, rows, 128, bits & 2 ? 100 : 768, 2048};
        q.aligned = !(bits & 4);
        q.aligned_out = !(bits & 8);
        q.tensor_maps = !(bits & 16);
        q.gated = !(bits & 32);
        const auto& rule = choose(kDownBackwardRules, q);
        reached.insert(rule.reason);
        const bool expected = kHasSm90 && capability == 90 && rows >= 16 * 128 && !bits;
        CHECK((rule.kernel == DownBackwardKernel::kSm90Pingpong) == expected, "capability %d, %ld rows, %d", capability,
              static_cast<long>(rows), bits);
      }
    }
  }
  CHECK(reached.size() == (kHasSm90 ? std::size(kDownBackwardRules) : 1), "%zu lines are reached", reached.size());
}

// TMA writes row r of part p, of `row_bytes`, at linear addresses, in which bits 4.. are then combined with bits 7.. .
static uint32_t swizzle(uint32_t linear, uint32_t row_bytes) { return linear ^ (linear >> 7 & (row_bytes / 16 - 1)) << 4; }

static void check_places(bool interleaved) {
  std::set<uint32_t> places;
  for (int row = 0; row < 16; ++row) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      const uint32_t place = pre_place(interleaved, row, chunk);
      const uint32_t expected =
          interleaved ? swizzle(row * 128 + chunk * 16, 128) : chunk / 4 * 1024 + swizzle(row * 64 + chunk % 4 * 16, 64);
      CHECK(place == expected, "row %d chunk %d at %u, not %u", row, chunk, place, expected);
      places.insert(place);
    }
  }
  CHECK(places.size() == 128 && *places.rbegin() == kPreBoxBytes - 16, "%zu places", places.size());
}

// The lanes' copies fill the box, and eight lanes that copy together write to different banks.
static void check_copies(bool interleaved) {
  std::set<uint32_t> places;
  for (int i = 0; i < 4; ++i) {
    for (int lane = 0; lane < 32; lane += 8) {
      std::set<uint32_t> banks;
      for (int l = lane; l < lane + 8; ++l) {
        const ChunkIndex at = pre_copy(interleaved, l, i);
        const uint32_t place = pre_place(interleaved, at.row, at.chunk);
        banks.insert(place % 128);
        places.insert(place);
      }
      CHECK(banks.size() == 8, "copy %d of lanes from %d", i, lane);
    }
  }
  CHECK(places.size() == 128, "%zu places", places.size());
}

static void check_columns(bool interleaved, int I) {
  std::set<int> columns;
  for (int output = 0; output < static_cast<int>(round_up(I, DownBackwardTile::kN)); output += kStepOutputs) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      const int column = pre_column(interleaved, output, chunk, I);
      if (column < 0) continue;
      CHECK(column % 8 == 0 && column + 8 <= 2 * I && columns.insert(column).second, "column %d of I = %d", column, I);
    }
  }
  CHECK(static_cast<int>(columns.size()) * 8 == 2 * I, "%zu chunks for I = %d", columns.size(), I);
}

// A lane reads, for output o of a step, columns o of the gate's part and of the up's part (halves), or 2 o and 2 o + 1 (interleaved).
static void check_pairs() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int group = 0; group < 2; ++group) {
      for (int i = 0; i < 4; ++i) {
        const PairPlace at = interleaved_pair(lane, i);
        const int output = group * 16 + i / 2 * 8 + accumulator_column(lane, 0), row = accumulator_row(lane, 2 * (i % 2));
        CHECK(at.row == row, "lane %d pair %d", lane, i);
        CHECK((4 * group + at.chunk) * 8 + at.byte / 2 == 2 * output, "lane %d pair %d of group %d", lane, i, group);
      }
    }
  }
}

int main() {
  check_rules();
  for (const bool interleaved : {false, true}) {
    check_places(interleaved);
    check_copies(interleaved);
    for (int I = 8; I <= 400; I += 8) check_columns(interleaved, I);
  }
  check_pairs();
  return 0;
}
