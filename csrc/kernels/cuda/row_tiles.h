// Rows sorted by expert, cut into tiles of at most R rows of one group. Groups 0..E-1 are the experts; group E holds the rows of
// dropped slots, [expert_offsets[E], S). The host knows S and E only, so tile numbers are spread so that no prefix sum is needed:
// group g begins at tile offsets[g] / R + g, which leaves it at least as many tile numbers as it has tiles. With fewer rows than
// experts that would be mostly empty tiles; then every row has a tile number, and those that begin no tile are empty.
#pragma once
#include "host_device.h"

namespace moe::cuda {

// The rows of one expert. The host cannot check what offsets on the device hold, so every kernel cuts them to the S rows that there
// are: wrong offsets give wrong results, but nothing outside of the tensors is read or written.
struct ExpertRows {
  int32_t begin, count;
};
MOE_HD ExpertRows expert_rows(const int32_t* expert_offsets, int64_t e, int64_t S) {
  const int32_t all = static_cast<int32_t>(S), begin = least(greatest(expert_offsets[e], 0), all);
  return {begin, greatest(least(expert_offsets[e + 1], all) - begin, 0)};
}

struct RowTile {
  int64_t group;  // E: dropped slots
  int64_t begin;  // first row
  int rows;       // 0: an empty tile
};

class RowTiles {
 public:
  MOE_HD RowTiles(const int32_t* expert_offsets, int64_t S, int64_t E, int rows_per_tile)
      : offsets_(expert_offsets), S_(S), E_(E), R_(rows_per_tile), one_per_row_(S < E) {}

  // An upper bound that does not depend on the routing: how many tiles are launched.
  MOE_HD int64_t count() const { return one_per_row_ ? S_ : S_ / R_ + E_ + 1; }

  // On the device all lanes of a warp call it together, with the same tile.
  MOE_HD RowTile find(int64_t tile) const {
    const int64_t g = group_of(tile), begin = offsets_[g], end = g < E_ ? least<int64_t>(offsets_[g + 1], S_) : S_;
    const int64_t first = one_per_row_ ? tile : begin + (tile - first_tile(g)) * R_;
    if (first < 0 || (one_per_row_ && (tile - begin) % R_)) return {g, first, 0};
    return {g, first, static_cast<int>(greatest<int64_t>(least<int64_t>(R_, end - first), 0))};
  }

 private:
  MOE_HD int64_t first_tile(int64_t g) const { return one_per_row_ ? offsets_[g] : offsets_[g] / R_ + g; }

  // The last group that begins at or before `tile`: 32 probes at a time.
  MOE_HD int64_t group_of(int64_t tile) const {
    int64_t low = 0, count = E_ + 1;
    while (count > 1) {
      const int64_t step = divide_up(count, 32);
      const int holding = count_lanes([&](int lane) { return lane * step < count && first_tile(low + lane * step) <= tile; });
      const int64_t passed = greatest(holding - 1, 0);  // none holds where the first offset is not 0, as it must be
      low += passed * step;
      count = least(step, count - passed * step);
    }
    return low;
  }

  const int32_t* offsets_;
  int64_t S_, E_;
  int R_;
  bool one_per_row_;
};

// Blocks in launch order: eight row tiles by all column tiles, row tiles first, so that concurrent blocks share rows of both operands.
struct TilePosition {
  int64_t row_tile, column_tile;
};
MOE_HD TilePosition tile_position(int64_t block, int64_t row_tiles, int64_t column_tiles) {
  constexpr int64_t kBand = 8;
  const int64_t band = block / (kBand * column_tiles), in_band = block % (kBand * column_tiles);
  const int64_t height = least(kBand, row_tiles - band * kBand);
  return {band * kBand + in_band % height, in_band / height};
}

}  // namespace moe::cuda
