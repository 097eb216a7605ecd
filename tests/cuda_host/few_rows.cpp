// The index maps for few rows per expert, put together as the kernel does with mma.m16n8k16 written down from the PTX ISA, multiply
// whole numbers exactly: every weight is loaded once and meets its k. Sums lie apart in shared memory, without bank conflicts.
#include <set>

#include "check.h"
#include "kernels/cuda/few_rows_tile.h"

using namespace moe::cuda;

// Elements are 16-bit whole numbers, two in a register.
static unsigned pack(int low, int high) { return static_cast<uint16_t>(low) | static_cast<unsigned>(static_cast<uint16_t>(high)) << 16; }
static int element(unsigned pair, int i) { return static_cast<int16_t>(i ? pair >> 16 : pair & 0xffff); }

static int weight(int output, int k) { return (output * 7 + k * 13) % 211 - 105; }
static int x_value(int row, int k) { return (row * 5 + k * 3 + 2) % 109 - 54; }

template <Major major>
static void check_products() {
  using Tile = FewRowsTile<major>;
  unsigned weights[32][Tile::kLoads][4], x[32][2][4];
  std::vector<int> loaded(Tile::kOutputs * kSliceDepth);
  for (int lane = 0; lane < 32; ++lane) {
    for (int load = 0; load < Tile::kLoads; ++load) {
      for (int j = 0; j < 8; ++j) {
        const int output = Tile::load_output(lane, load) + (Tile::kIsKMajor ? 0 : j);
        const int k = lane % 4 * 8 + (Tile::kIsKMajor ? j : load);
        CHECK(output < Tile::kOutputs && k < kSliceDepth, "lane %d load %d", lane, load);
        ++loaded[output * kSliceDepth + k];
        const unsigned pair = j % 2 ? weights[lane][load][j / 2] : 0;
        weights[lane][load][j / 2] = j % 2 ? pack(element(pair, 0), weight(output, k)) : pack(weight(output, k), 0);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        const int row = lane / 4 + 8 * i, k = lane % 4 * 8 + 2 * j;
        x[lane][i][j] = pack(x_value(row, k), x_value(row, k + 1));
      }
    }
  }
  for (int count : loaded) CHECK(count == 1, "a weight is loaded %d times", count);

  std::vector<long> sums(kFewRows * Tile::kOutputs);
  std::vector<int> written(sums.size());
  for (int product = 0; product < Tile::kProducts; ++product) {
    for (int step = 0; step < 2; ++step) {
      int A[16][16], B[16][8];  // m x k and k x n, as the PTX ISA spreads them over the lanes
      for (int lane = 0; lane < 32; ++lane) {
        unsigned a[4], b[2];
        few_rows_operand(x[lane], step, a);
        Tile::weights(weights[lane], product, step, b);
        for (int h = 0; h < 2; ++h) {
          for (int i = 0; i < 4; ++i) A[lane / 4 + 8 * (i % 2)][lane % 4 * 2 + h + 8 * (i / 2)] = element(a[i], h);
          for (int i = 0; i < 2; ++i) B[lane % 4 * 2 + h + 8 * i][lane / 4] = element(b[i], h);
        }
      }
      for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 8; ++column) {
          const int output = Tile::output(product, column);
          for (int k = 0; k < 16; ++k) sums[row * Tile::kOutputs + output] += A[row][k] * B[k][column];
          ++written[row * Tile::kOutputs + output];
        }
      }
    }
  }
  for (int row = 0; row < kFewRows; ++row) {
    for (int output = 0; output < Tile::kOutputs; ++output) {
      long wanted = 0;
      for (int k = 0; k < kSliceDepth; ++k) wanted += x_value(row, k) * weight(output, k);
      CHECK(sums[row * Tile::kOutputs + output] == wanted && written[row * Tile::kOutputs + output] == 2, "row %d output %d", row, output);
    }
  }
}

template <Major major>
static void check_sums() {
  using Tile = FewRowsTile<major>;
  std::set<int> places;
  for (int row = 0; row < kFewRows; ++row) {
    for (int product = 0; product < Tile::kProducts; ++product) {
      for (int column = 0; column < 8; ++column) {
        const int place = Tile::sum_position(row, product, column);
        CHECK(place == Tile::sum_position(row, Tile::output(product, column)), "product %d column %d", product, column);
        CHECK(place >= 0 && place < Tile::kWarpFloats && places.insert(place).second, "row %d: place %d", row, place);
      }
    }
  }
  for (int product = 0; product < Tile::kProducts; ++product) {  // pairs of floats go by half warps
    for (int half = 0; half < 2; ++half) {
      std::set<int> banks;
      for (int lane = 16 * half; lane < 16 * half + 16; ++lane) {
        const int place = Tile::sum_position(accumulator_row(lane, 0), product, accumulator_column(lane, 0));
        CHECK(place % 2 == 0, "a pair of floats at %d", place);
        banks.insert({place % 32, place % 32 + 1});
      }
      CHECK(banks.size() == 32, "product %d: %zu banks", product, banks.size());
    }
  }
}

static void check_tiles_per_block() {
  for (int64_t row_tiles : {1, 8, 137, 161, 100000}) {
    for (int64_t output_tiles : {1, 3, 48, 64, 900}) {
      for (int64_t sms : {0, 4, 132}) {
        const int tiles = tiles_per_block(row_tiles, output_tiles, sms);
        CHECK(tiles == 1 || tiles == 2 || tiles == 4 || tiles == 8, "%d tiles", tiles);
        CHECK(tiles == 1 || row_tiles * divide_up(output_tiles, tiles) >= 8 * sms, "%ld x %ld", row_tiles, output_tiles);
        CHECK(tiles < 2 * output_tiles, "%d of %ld tiles", tiles, output_tiles);
      }
    }
  }
  CHECK(tiles_per_block(8, 48, 132) == 1 && tiles_per_block(137, 48, 132) == 4 && tiles_per_block(161, 64, 132) == 8, "Qwen3-30B-A3B");
}

int main() {
  check_products<Major::kK>();
  check_products<Major::kMN>();
  check_sums<Major::kK>();
  check_sums<Major::kMN>();
  check_tiles_per_block();
  return 0;
}
