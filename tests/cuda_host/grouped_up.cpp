// grouped_up: gate and up of an output meet in one thread, results leave in the order of memory, and each layout of the weights is
// read as the pairing it is.
#include <array>
#include <set>

#include "check.h"
#include "kernels/cuda/grouped_up_sm90.h"

using namespace moe;
using namespace moe::cuda;

struct Element {
  int row, column;  // of the product's tile
};
static Element accumulator(int lane, int index) {
  return {accumulator_row(lane, index % 4), index / 4 * 8 + accumulator_column(lane, index % 4)};
}
template <Pairing pairing>
static int column_of(int output, bool up) {
  return pairing == Pairing::kHalves ? output + (up ? kUpOutputs : 0) : 2 * output + up;
}

template <Pairing pairing>
static void check_bias() {
  for (int half = 0; half < 2; ++half) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < kHalfPairs; ++i) {
        const Element e = accumulator(lane, 2 * accumulator_pair<pairing>(half, i));
        const bool up = pairing == Pairing::kHalves && i >= kHalfPairs / 2;
        const int output = half * 64 + output_of_pair<pairing>(lane, i);
        CHECK(e.column == column_of<pairing>(output, up), "lane %d pair %d of half %d is column %d", lane, i, half, e.column);
        CHECK(e.row == lane / 4 + 8 * (i % 2), "lane %d pair %d", lane, i);
      }
    }
  }
}

// The outputs (row, output) that each lane stores as pair i of a half, as UpEpilogue forms them.
static void check_halves() {
  for (int half = 0; half < 2; ++half) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < kHalfPairs / 2; ++i) {
        const Element gate = accumulator(lane, 2 * accumulator_pair<Pairing::kHalves>(half, i));
        const Element up = accumulator(lane, 2 * accumulator_pair<Pairing::kHalves>(half, i + kHalfPairs / 2));
        CHECK(up.column == gate.column + kUpOutputs && up.row == gate.row, "lane %d pair %d", lane, i);
        CHECK(gate.column == half * 64 + i / 2 * 8 + 2 * (lane % 4), "lane %d stores pair %d", lane, i);
      }
    }
  }
}

static void check_adjacent() {
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < kHalfPairs / 2; ++i) {
      std::array<std::array<Element, 2>, 32> packed;  // by lane: the gate's place of the outputs in the low and the high half
      const int j = i / 2 * 4 + i % 2;
      for (int lane = 0; lane < 32; ++lane) {
        for (int high = 0; high < 2; ++high) {
          packed[lane][high] = accumulator(lane, 2 * accumulator_pair<Pairing::kAdjacent>(half, j + 2 * high));
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int which = 0; which < 2; ++which) {
          const Element e = packed[exchange_source(lane, which)][exchange_high(lane)];
          const int output = half * 64 + i / 2 * 8 + 2 * (lane % 4) + which;
          CHECK(e.column == 2 * output && e.row == lane / 4 + 8 * (i % 2), "lane %d pair %d: column %d", lane, i, e.column);
        }
      }
    }
  }
}

static void check_operands() {
  alignas(16) static char memory[1 << 16];
  constexpr int64_t E = 3, H = 16, I = 24;
  GroupedUpParams p;
  p.dtype = DType::kBFloat16;
  p.E = E, p.H = H, p.I = I;
  const auto tables = [&](int64_t up_at, int64_t stride_n, int64_t stride_k, bool interleaved) {
    p.activation.interleaved = interleaved;
    p.gate_proj = {memory, 2 * I * H, nullptr, stride_n, stride_k};
    p.up_proj = p.gate_proj;
    p.up_proj.base = memory + 2 * up_at;
    return up_operands(p);
  };
  const UpOperands halves = tables(I * H, H, 1, false), columns = tables(I, 1, 2 * I, false);
  CHECK(halves.readable && halves.pairing == Pairing::kHalves && halves.part[1].base == memory + 2 * I * H, "[E, 2I, H]");
  CHECK(columns.readable && columns.part[0].major == Major::kMN && columns.part[0].inner == I && columns.part[0].stride == 2 * I,
        "[E, H, 2I]");
  const UpOperands rows = tables(H, 2 * H, 1, true), pairs = tables(1, 2, 2 * I, true);
  CHECK(rows.readable && rows.pairing == Pairing::kAdjacent && rows.part[1].base == memory && rows.part[0].outer == 2 * I, "rows g0 u0");
  CHECK(rows.part[0].stride == H && rows.tile_columns == 256 && rows.part_columns == 128, "rows g0 u0");
  CHECK(pairs.readable && pairs.part[0].major == Major::kMN && pairs.part[0].inner == 2 * I && pairs.part[0].stride == 2 * I, "gpt-oss");
  CHECK(tables(H, 2 * H, 1, false).readable, "every second row, but a pre-activation in halves");
  CHECK(!tables(I * H, H, 1, true).readable, "halves, but a pre-activation in pairs");
  CHECK(!tables(1, 2, 2 * I, false).readable, "every second column, but a pre-activation in halves");
}

int main() {
  check_bias<Pairing::kHalves>();
  check_bias<Pairing::kAdjacent>();
  check_halves();
  check_adjacent();
  check_operands();
  return 0;
}
