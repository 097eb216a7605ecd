// The gathered grouped GEMM's plan and index maps against brute force: who copies what where, what the descriptors of wgmma say,
// the ring, the layout of shared memory, and which matrices TMA can read.
#include <set>

#include "check.h"
#include "kernels/cuda/gathered_gemm_sm90.h"
#include "kernels/cuda/grouped_up_sm90.h"

using namespace moe;
using namespace moe::cuda;

// Where TMA and wgmma find the byte `offset` of a tile that begins at a multiple of 1024 (PTX ISA: swizzling modes, 128 bytes).
static uint32_t hardware_swizzle(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

template <class Tile>
static void check_tile() {
  std::set<uint32_t> places;
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    for (int i = 0; i < Tile::kCopies; ++i) {
      const ChunkIndex at = gathered_chunk(thread, i);
      CHECK(at.row < Tile::kM && at.chunk < 8, "thread %d copy %d", thread, i);
      CHECK(swizzled(at.row, at.chunk) == hardware_swizzle(at.row * 128 + at.chunk * 16), "row %d chunk %d", at.row, at.chunk);
      CHECK(swizzled(at.row, at.chunk) == swizzled(gathered_chunk(thread, 0).row, at.chunk) + i * 16 * kRowBytes, "thread %d copy %d",
            thread, i);
      places.insert(swizzled(at.row, at.chunk));
    }
    for (int rows = 0; rows <= Tile::kM; ++rows) {
      int expected = 0;
      for (int i = 0; i < Tile::kCopies; ++i) expected += gathered_chunk(thread, i).row < rows;
      CHECK(least(gathered_rows(thread, rows), Tile::kCopies) == expected, "thread %d of %d rows", thread, rows);
    }
  }
  CHECK(static_cast<int>(places.size()) == Tile::kM * 8, "%zu of %d chunks are copied", places.size(), Tile::kM * 8);

  for (int bytes : {1024, 4096}) {
    CHECK(Tile::kStageBytes % 1024 == 0 && Tile::kABytes % 1024 == 0 && Tile::epilogue_at(bytes, 1) % 1024 == 0, "%d", bytes);
    CHECK(Tile::barriers_at(bytes) == Tile::epilogue_at(bytes, 8) && Tile::barriers_at(bytes) % 8 == 0, "%d", bytes);
    CHECK(Tile::shared_bytes(bytes) <= kSharedLimit, "%d bytes of shared memory", Tile::shared_bytes(bytes));
  }
}

// The address wgmma computes for the 16-byte chunk with (row, k) of an operand: PTX ISA, matrix descriptor and canonical layouts.
static uint32_t chunk_address(uint64_t d, int row, int k, Major major) {
  const uint32_t start = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4;
  const uint32_t at = major == Major::kK ? row % 8 * 128 + row / 8 * stride + k / 8 * 16
                                         : row / 8 % 8 * 16 + row / 64 * leading + k % 8 * 128 + k / 8 * stride;
  return hardware_swizzle(start + at);
}

static void check_descriptors() {
  for (uint32_t base : {1024u, 17 * 1024u, 196 * 1024u}) {
    const MatrixDescriptor<Major::kK> k_major(base);
    const MatrixDescriptor<Major::kMN> mn_major(base);
    for (int product = 0; product < 4; ++product) {
      for (int from : {0, 64}) {
        const uint64_t d = k_major.at(product, from);
        CHECK(d >> 62 == 1 && (d >> 49 & 7) == 0, "swizzle 128, no base offset: %lx", d);
        for (int row = 0; row < 64; ++row) {
          for (int k = 0; k < 16; k += 8) {
            CHECK(chunk_address(d, row, k, Major::kK) == base + swizzled(from + row, 2 * product + k / 8), "row %d k %d", row, k);
          }
        }
      }
      const uint64_t d = mn_major.at(product, 0);
      CHECK(d >> 62 == 1 && (d >> 49 & 7) == 0, "swizzle 128, no base offset: %lx", d);
      for (int n = 0; n < 256; n += 8) {
        for (int k = 0; k < 16; ++k) {  // boxes of 64 columns, a row of 128 bytes per k
          const uint32_t expected = base + n / 64 * 8192 + swizzled(16 * product + k, n / 8 % 8);
          CHECK(chunk_address(d, n, k, Major::kMN) == expected, "column %d k %d", n, k);
        }
      }
    }
  }
}

static void check_ring() {
  for (int start = 0; start < 8; ++start) {
    RingPosition<4> stepped, skipped;
    for (int i = 0; i < start; ++i) stepped.advance(), skipped.advance();
    for (int steps = 0; steps < 20; ++steps) {
      RingPosition<4> at = skipped;
      at.skip(steps);
      CHECK(at.stage == stepped.stage && at.parity == stepped.parity, "%d steps from %d", steps, start);
      stepped.advance();
    }
  }
  for (int rows = 0; rows < 300; ++rows) {
    int total = 0;
    for (int first = 0; first < 304; first += 16) total += rows_from(rows, first, 16);
    CHECK(total == rows, "%d of %d rows", total, rows);
  }
}

// stmatrix: register m of a lane is row lane / 4, columns 2 (lane % 4) and the next, of the matrix whose rows lanes 8m .. 8m + 7 name.
static void check_stmatrix() {
  for (int chunk = 0; chunk < 8; chunk += 2) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const ChunkIndex place = stmatrix_chunk(8 * m + lane / 4, chunk);
        const int pair = 2 * chunk + m, accumulator = 2 * pair;  // as RowStore::put hands them over
        CHECK(place.row == accumulator_row(lane, accumulator % 4), "lane %d register %d", lane, m);
        CHECK(place.chunk * 8 + lane % 4 * 2 == accumulator / 4 * 8 + accumulator_column(lane, 0), "lane %d register %d", lane, m);
      }
    }
  }
}

static void check_views() {
  alignas(16) static char memory[64];
  const auto readable = [](WeightTable t, int64_t E, int64_t N, int64_t K) { return matrix_view(t, E, N, K).readable; };
  const WeightTable k_major{memory, 24 * 16, nullptr, 16, 1}, n_major{memory, 24 * 16, nullptr, 1, 24};
  CHECK(readable(k_major, 3, 24, 16) && matrix_view(k_major, 3, 24, 16).major == Major::kK, "rows of k");
  CHECK(readable(n_major, 3, 24, 16) && matrix_view(n_major, 3, 24, 16).major == Major::kMN, "rows of n");
  CHECK(!readable({memory + 2, 24 * 16, nullptr, 16, 1}, 3, 24, 16), "begins at a multiple of 2 bytes");
  CHECK(!readable({memory, 24 * 16 + 1, nullptr, 16, 1}, 3, 24, 16), "experts begin at a multiple of 2 bytes");
  CHECK(readable({memory, 1, nullptr, 16, 1}, 1, 24, 16), "one expert has no stride");
  CHECK(!readable({memory, 0, nullptr, 16, 1}, 3, 24, 16), "all experts are one");
  CHECK(!readable({memory, 24 * 20, nullptr, 20, 1}, 3, 24, 20), "K is no multiple of 8");
  CHECK(!readable({memory, 24 * 32, nullptr, 2, 24}, 3, 12, 16), "neither stride is 1");
  const void* list[] = {memory, memory + 32};
  CHECK(readable({nullptr, 0, list, 16, 1}, 2, 24, 16), "a list");
  list[1] = memory + 8;
  CHECK(!readable({nullptr, 0, list, 16, 1}, 2, 24, 16), "a list with an expert at a multiple of 8 bytes");
}

int main() {
  check_tile<UpCooperative>();
  check_tile<UpPingpong>();
  check_tile<GatheredTile<128, 128, true, 1, 5>>();
  check_descriptors();
  check_ring();
  check_stmatrix();
  check_views();
  return 0;
}
