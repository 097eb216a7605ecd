// Every row is in exactly one tile, of its own group, for random routings; and blocks are spread over the tiles one to one.
#include "kernels/cuda/row_tiles.h"

#include "check.h"

using namespace moe::cuda;

static void check_rows(int64_t S, int64_t E, int R, int kind, std::mt19937& random) {
  const std::vector<int32_t> offsets = offsets_of(routing(kind, S, E, random), E);
  const RowTiles tiles(offsets.data(), S, E, R);
  CHECK(tiles.count() <= S / R + E + 1 && (S >= E || tiles.count() == S), "S=%ld E=%ld", S, E);
  std::vector<int64_t> group_of(S, -1);
  for (int64_t t = 0; t < tiles.count(); ++t) {
    const RowTile tile = tiles.find(t);
    CHECK(tile.rows >= 0 && tile.rows <= R, "S=%ld E=%ld R=%d tile %ld has %d rows", S, E, R, t, tile.rows);
    for (int64_t r = tile.begin; r < tile.begin + tile.rows; ++r) {
      CHECK(r >= 0 && r < S && group_of[r] < 0, "S=%ld E=%ld R=%d tile %ld: row %ld is out of range or taken", S, E, R, t, r);
      group_of[r] = tile.group;
    }
  }
  for (int64_t r = 0; r < S; ++r) {
    int64_t wanted = 0;
    while (wanted < E && offsets[wanted + 1] <= r) ++wanted;
    CHECK(group_of[r] == wanted, "S=%ld E=%ld R=%d kind=%d: row %ld is in group %ld, not %ld", S, E, R, kind, r, group_of[r], wanted);
  }
}

static void check_positions(int64_t rows, int64_t columns) {
  std::vector<int> seen(rows * columns);
  for (int64_t block = 0; block < rows * columns; ++block) {
    const TilePosition p = tile_position(block, rows, columns);
    CHECK(p.row_tile >= 0 && p.row_tile < rows && p.column_tile >= 0 && p.column_tile < columns, "block %ld of %ld x %ld", block, rows,
          columns);
    CHECK(seen[p.row_tile * columns + p.column_tile]++ == 0, "block %ld of %ld x %ld", block, rows, columns);
  }
}

int main() {
  std::mt19937 random(1);
  for (int64_t E : {1, 2, 7, 32, 33, 128, 512, 1024, 1025}) {
    for (int64_t S : {0, 1, 3, 63, 64, 65, 127, 500, 513, 1024, 4096, 5000}) {
      for (int R : {64, 128}) {
        for (int kind = 0; kind < kRoutings; ++kind) check_rows(S, E, R, kind, random);
      }
    }
  }
  for (int64_t rows : {1, 2, 7, 8, 9, 16, 100}) {
    for (int64_t columns : {1, 2, 3, 16}) check_positions(rows, columns);
  }
  return 0;
}
