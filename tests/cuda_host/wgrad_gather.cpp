// The gathering weight gradient's plan and index maps against brute force: who copies what where, where wgmma looks for it, who looks
// up whose source row, which columns are inside, and that every tile of every expert is somebody's.
#include <map>
#include <set>

#include "check.h"
#include "kernels/cuda/grouped_mm_wgrad_gather_sm90.h"

using namespace moe;
using namespace moe::cuda;

// Of element (mn, k), mn and k multiples of 8 and of 1: PTX ISA, matrix descriptor, MN-major canonical layout, swizzling mode 128 bytes.
static uint32_t wgmma_address(uint64_t d, int mn, int k) {
  const uint32_t start = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4;
  const uint32_t at = start + mn / 8 % 8 * 16 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride;
  return at ^ ((at >> 7 & 7) << 4);
}

// Of an operand of `columns` columns at `base`: the address of each of its chunks, as the producer writes them.
static std::map<std::pair<int, int>, uint32_t> copied(uint32_t base, int columns) {
  std::map<std::pair<int, int>, uint32_t> places;
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const ChunkIndex chunk = gathered_chunk(thread, 0);
    for (int i = 0; i < WgradTile::kCopiedRows; ++i) {
      for (int c = 0; c < columns / 64; ++c) {
        const std::pair<int, int> what = {gathered_chunk(thread, i).row, 64 * c + 8 * chunk.chunk};
        CHECK(!places.count(what), "row %d column %d is copied twice", what.first, what.second);
        places[what] = base + swizzled(chunk.row, chunk.chunk) + i * 16 * kRowBytes + c * WgradTile::kChunkBytes;
      }
    }
  }
  CHECK(static_cast<int>(places.size()) == kDepth * columns / 8, "%zu chunks of %d columns", places.size(), columns);
  return places;
}

static void check_operand(uint32_t base, int columns, int first, int count) {
  const auto places = copied(base, columns);
  const MatrixDescriptor<Major::kMN> d(base + first * kRowBytes);  // as multiply() has it
  for (int product = 0; product < kDepth / 16; ++product) {
    for (int mn = 0; mn < count; mn += 8) {
      for (int k = 0; k < 16; ++k) {
        CHECK(wgmma_address(d.at(product, 0), mn, k) == places.at({16 * product + k, first + mn}), "column %d k %d", first + mn, k);
      }
    }
  }
}

static void check_rows() {
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    for (int i = 0; i < WgradTile::kCopiedRows; ++i) {
      const int from = thread / 32 * 32 + lane_of_row(thread % 32, i);
      CHECK(looked_up_row(from) == gathered_chunk(thread, i).row, "thread %d row %d", thread, i);
    }
  }
  for (int column = 0; column < 600; column += 8) {
    for (int end = 8; end < 600; end += 8) {
      int expected = 0;
      for (int c = 0; c < WgradTile::kN / 64; ++c) expected += column + 64 * c < end;
      CHECK(least(columns_inside(column, end), WgradTile::kN / 64) == expected, "column %d of %d", column, end);
    }
  }
}

static void check_plan(int M, int N) {
  const WgradPlan plan = wgrad_plan(M, N);
  std::set<std::pair<int64_t, int64_t>> tiles;
  for (int i = 0; i < plan.per_expert(); ++i) {
    const TilePosition at = tile_position(i, plan.row_tiles, plan.column_tiles);
    CHECK(at.row_tile * WgradTile::kM < M && at.column_tile * WgradTile::kN < N, "an empty tile of %d x %d", M, N);
    tiles.insert({at.row_tile, at.column_tile});
  }
  const int64_t covered = divide_up(M, WgradTile::kM) * divide_up(N, WgradTile::kN);
  CHECK(static_cast<int64_t>(tiles.size()) == covered && plan.per_expert() == covered, "%zu tiles of %d x %d", tiles.size(), M, N);
}

// How much less the block with the most work has than when every round begins with block 0.
static int check_turns(int E, int tiles, int blocks, std::mt19937& random) {
  int gained = 0;
  for (int kind = 0; kind < kRoutings; ++kind) {
    const std::vector<int32_t> offsets = offsets_of(routing(kind, 1000, E, random), E);
    const auto rows = [&](int e) { return offsets[e + 1] - offsets[e]; };
    std::vector<int> order(E, -1);
    for (int e = 0; e < E; ++e) order.at(place_by_rows(offsets.data(), E, e)) = e;
    int largest = 0;
    for (int i = 0; i < E; ++i) {
      CHECK(order[i] >= 0 && (i == 0 || rows(order[i - 1]) >= rows(order[i])), "place %d of %d", i, E);
      largest = greatest(largest, rows(order[i]));
    }
    std::vector<int> seen(E * tiles);
    int least_work = INT32_MAX, most_work = 0;
    for (int block = 0; block < blocks; ++block) {
      int work = 0;
      for (int turn = 0, tile; (tile = tile_of_turn(turn, block, blocks)) < E * tiles; ++turn) {
        ++seen[tile];
        work += rows(order[tile / tiles]);
      }
      least_work = least(least_work, work);
      most_work = greatest(most_work, work);
    }
    for (int count : seen) CHECK(count == 1, "a tile is computed %d times", count);
    CHECK(most_work - least_work <= largest, "work from %d to %d, a tile is at most %d", least_work, most_work, largest);
    int first = 0;
    for (int tile = 0; tile < E * tiles; tile += blocks) first += rows(order[tile / tiles]);
    CHECK(most_work <= first, "%d instead of %d", most_work, first);
    gained += first - most_work;
  }
  return gained;
}

int main() {
  static_assert(WgradTile::shared_bytes(4096) <= kSharedLimit && WgradTile::kABytes == 2 * WgradTile::kChunkBytes);
  for (int stage = 0; stage < WgradTile::kStages; ++stage) {
    const uint32_t a = 1024 + stage * WgradTile::kStageBytes;
    for (int consumer = 0; consumer < 2; ++consumer) check_operand(a, WgradTile::kM, consumer * WgradTile::kConsumerM, 64);
    check_operand(a + WgradTile::kABytes, WgradTile::kN, 0, WgradTile::kN);
  }
  check_rows();
  std::mt19937 random(0);
  int gained = 0;
  for (int E : {1, 5, 130}) {
    for (int tiles : {1, 3, 48}) {
      for (int blocks : {1, 4, 7, 132}) {
        if (blocks <= E * tiles) gained += check_turns(E, tiles, blocks, random);
      }
    }
  }
  CHECK(gained > 0, "%d rows", gained);
  for (int M : {8, 128, 136, 1160, 1536}) {
    for (int N : {8, 256, 264, 2048, 2056}) check_plan(M, N);
  }
  return 0;
}
