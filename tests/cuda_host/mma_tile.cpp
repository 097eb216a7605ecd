// The tensor-core tile's index maps, put together as the kernel does with ldmatrix and mma.m16n8k16 written down from the PTX
// ISA, multiply two matrices of whole numbers exactly. No copy is missed or made twice; no ldmatrix has a bank conflict.
#include "kernels/cuda/mma_tile.h"

#include <algorithm>

#include "check.h"

using namespace moe::cuda;

using Stage = std::vector<int>;  // elements; a chunk is 8 of them

// One stage of an operand with element (mn, k) = value(mn, k), written chunk by chunk by 256 threads.
template <Major major, class F>
static Stage fill(int extent, const F& value) {
  Stage stage(extent * kMmaDepth, -1000);
  for (int thread = 0; thread < kMmaThreads; ++thread) {
    for (int i = 0; i < copies_per_thread<major>(extent); ++i) {
      const ChunkIndex c = copied_chunk<major>(extent, thread, i);
      CHECK(c.chunk == copied_chunk<major>(extent, thread, 0).chunk, "a thread's chunks lie in one column");
      for (int j = 0; j < kChunkElements; ++j) {
        int& element = stage[chunk_position<major>(extent, c.row, c.chunk) * kChunkElements + j];
        CHECK(element == -1000, "thread %d copy %d writes what another wrote", thread, i);
        const int column = c.chunk * kChunkElements + j;
        element = major == Major::kK ? value(c.row, column) : value(column, c.row);
      }
    }
  }
  CHECK(std::count(stage.begin(), stage.end(), -1000) == 0, "a chunk is missing");
  return stage;
}

struct Fragment {
  int value[4][2];  // four registers of two elements
};

// ldmatrix.x4(.trans): lane l of matrix j gets row l/4, columns 2(l%4) and +1; transposed when the operand is MN-major.
template <Major major, bool is_a>
static std::vector<Fragment> load(const Stage& stage, int extent, int mn, int k) {
  int position[32];
  for (int lane = 0; lane < 32; ++lane) {
    const ChunkIndex c = ldmatrix_chunk<major, is_a>(lane, mn, k);
    position[lane] = chunk_position<major>(extent, c.row, c.chunk);
  }
  for (int phase = 0; phase < 4; ++phase) {
    unsigned banks = 0;
    for (int lane = 8 * phase; lane < 8 * phase + 8; ++lane) banks |= 1u << (position[lane] % 8);
    CHECK(banks == 0xff, "bank conflict: extent %d at (%d, %d)", extent, mn, k);
  }
  std::vector<Fragment> fragments(32);
  for (int lane = 0; lane < 32; ++lane) {
    for (int j = 0; j < 4; ++j) {
      for (int h = 0; h < 2; ++h) {
        const int row = major == Major::kK ? lane / 4 : lane % 4 * 2 + h, column = major == Major::kK ? lane % 4 * 2 + h : lane / 4;
        fragments[lane].value[j][h] = stage[position[8 * j + row] * kChunkElements + column];
      }
    }
  }
  return fragments;
}

// mma.m16n8k16 on a warp's fragments, as the PTX ISA lays them out; adds to sums[lane][4].
static void multiply(const std::vector<Fragment>& a, const std::vector<Fragment>& b, int b_first, int (*sums)[4]) {
  int A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, in_group = lane % 4;
    for (int j = 0; j < 4; ++j) {
      for (int h = 0; h < 2; ++h) A[group + 8 * (j % 2)][in_group * 2 + h + 8 * (j / 2)] = a[lane].value[j][h];
    }
    for (int j = 0; j < 2; ++j) {
      for (int h = 0; h < 2; ++h) B[in_group * 2 + h + 8 * j][group] = b[lane].value[b_first + j][h];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) sums[lane][i] += A[row][k] * B[k][column];
    }
  }
}

template <int BM, int BN, Major major_a, Major major_b>
static void check_tile() {
  using Tile = MmaTile<BM, BN>;
  const auto value_a = [](int m, int k) { return (m * 7 + k * 13) % 11 - 5; };
  const auto value_b = [](int n, int k) { return (n * 5 + k * 3 + 2) % 9 - 4; };
  const Stage a = fill<major_a>(BM, value_a), b = fill<major_b>(BN, value_b);
  CHECK(Tile::kStageBytes == static_cast<int>(a.size() + b.size()) * 2, "%d x %d", BM, BN);
  std::vector<int> written(BM * BN);
  for (int warp = 0; warp < kMmaThreads / 32; ++warp) {
    for (int i = 0; i < Tile::kStepsM; ++i) {
      for (int j = 0; j < Tile::kStepsN; ++j) {
        int sums[32][4] = {};
        const int m = Tile::warp_m(warp) + 16 * i, n = Tile::warp_n(warp) + 8 * j;
        for (int k = 0; k < kMmaDepth; k += 16) {
          multiply(load<major_a, true>(a, BM, m, k), load<major_b, false>(b, BN, n / 16 * 16, k), j % 2 * 2, sums);
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int h = 0; h < 4; ++h) {
            const int row = m + accumulator_row(lane, h), column = n + accumulator_column(lane, h);
            int wanted = 0;
            for (int k = 0; k < kMmaDepth; ++k) wanted += value_a(row, k) * value_b(column, k);
            CHECK(sums[lane][h] == wanted, "%d x %d: output (%d, %d)", BM, BN, row, column);
            ++written[row * BN + column];
          }
        }
      }
    }
  }
  CHECK(std::count(written.begin(), written.end(), 1) == BM * BN, "%d x %d", BM, BN);
}

// A warp's accesses of `bytes` each are made as many lanes at a time as fill 128 bytes: these must lie in different banks.
template <class F>
static void check_banks(int bytes, const F& first_float) {
  const int together = 128 / bytes;
  for (int lane0 = 0; lane0 < 32; lane0 += together) {
    unsigned banks = 0;
    for (int lane = lane0; lane < lane0 + together; ++lane) {
      const int at = first_float(lane);
      CHECK(at % (bytes / 4) == 0, "an access of %d bytes at float %d", bytes, at);
      for (int i = 0; i < bytes / 4; ++i) banks |= 1u << ((at + i) % 32);
    }
    CHECK(banks == ~0u, "bank conflict of %d-byte accesses", bytes);
  }
}

// Sums keep their place on the way through shared memory: neighbouring pairs (as threads hold them), neighbouring fours (as they are
// read), every place used once, no bank conflict in any of the accesses.
template <int BM, int BN>
static void check_staging() {
  using Tile = MmaTile<BM, BN>;
  std::vector<int> used(BM * BN);
  for (int row = 0; row < BM; ++row) {
    for (int column = 0; column < BN; ++column) {
      const int position = staged_position<BN>(row, column);
      CHECK(position >= 0 && position < BM * BN && !used[position]++, "(%d, %d)", row, column);
      CHECK(position == staged_position<BN>(row, column & ~3) + column % 4, "(%d, %d)", row, column);
    }
  }
  for (int warp = 0; warp < kMmaThreads / 32; ++warp) {
    for (int j = 0; j < Tile::kStepsN; ++j) {
      check_banks(8, [&](int lane) {
        return staged_position<BN>(Tile::warp_m(warp) + accumulator_row(lane, 0), Tile::warp_n(warp) + 8 * j + accumulator_column(lane, 0));
      });
    }
    for (int half : {0, 4}) {
      check_banks(16, [&](int lane) {
        const int thread = 32 * warp + lane;
        return staged_position<BN>(thread / (BN / 8), thread % (BN / 8) * 8 + half);
      });
    }
    check_banks(4, [&](int lane) { return staged_position<BN>((32 * warp + lane) / BN, (32 * warp + lane) % BN); });
  }
}

int main() {
  check_staging<128, 128>();
  check_staging<64, 128>();
  check_tile<128, 128, Major::kK, Major::kK>();
  check_tile<128, 128, Major::kK, Major::kMN>();
  check_tile<64, 128, Major::kK, Major::kK>();
  check_tile<64, 128, Major::kK, Major::kMN>();
  check_tile<128, 128, Major::kMN, Major::kMN>();
  for (int64_t first = 0; first < 20; ++first) {
    for (int64_t end = 0; end < 40; ++end) {
      int count = 0;
      for (int64_t i = first; i < first + kChunkElements; ++i) count += i < end;
      CHECK(valid_elements(first, end) == count, "first=%ld end=%ld", first, end);
    }
  }
  return 0;
}
