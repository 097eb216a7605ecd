// The gathered grouped GEMM for sm_90a: the kernel that every fused GEMM shares; see gathered_gemm_sm90.h. What differs is the epilogue:
//   struct Epilogue {
//     struct Params;                                          what it is told, part of the kernel's arguments
//     static constexpr int kSharedBytes;                      per consumer warp, a multiple of 1024
//     Epilogue(const Params&, uint32_t shared);               one per consumer warp; `shared` is its part of shared memory
//     void begin(const WarpTile&);                            optional: before the products, where loads may be started
//     void store(const WarpTile&, float (&acc)[kN / 2]);      16 rows of the tile, spread over the lanes as mma_tile.h says
//     void clear(const WarpTile&);                            rows of dropped slots, instead of begin and store
//     void finish();                                          shared memory must not be read any more when it returns
//   };
#pragma once
#include "gathered_gemm_sm90.h"
#include "operands.cuh"
#include "row_tiles.h"
#include "sm90_instructions.cuh"

namespace moe::cuda {

// The columns of b: part p of column tile c begins at c * tile_columns + p * part_columns of its map.
template <int kParts>
struct ColumnOperand {
  CUtensorMap stack[kParts];
  const CUtensorMap* list = nullptr;  // of a list of matrices: kParts per expert
  int tile_columns = 0, part_columns = 0;
};

template <class Tile, class Epilogue>
struct GatheredGemmParams {
  ColumnOperand<Tile::kParts> b;
  Rows a;
  const int32_t* expert_offsets;
  int64_t S, E;
  int K;  // the summed dimension
  int row_tiles, column_tiles;
  typename Epilogue::Params epilogue;
};

// 16 rows of one consumer warp; `rows` of them exist. They belong to `expert`, or to dropped slots when it is E. A consumer with more
// than 64 rows has kProducts such blocks, 64 rows apart: begin() is called for all of them, then store().
struct WarpTile {
  int expert, begin, rows, column_tile, block;
};

template <class Tile, class Epilogue>
struct SharedPlaces {
  uint32_t base;
  __device__ uint32_t a(int stage) const { return base + stage * Tile::kStageBytes; }
  __device__ uint32_t b(int stage) const { return a(stage) + Tile::kABytes; }
  __device__ uint32_t epilogue(int warp) const { return base + Tile::epilogue_at(Epilogue::kSharedBytes, warp); }
  __device__ uint32_t full(int stage) const { return base + Tile::barriers_at(Epilogue::kSharedBytes) + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return full(Tile::kStages + stage); }
  __device__ uint32_t turn(int consumer) const { return full(2 * Tile::kStages + consumer); }
};

// What a block computes: rows of one expert, or of dropped slots when it is E. In a cluster a block may be left without rows; it
// still does its part for the others.
struct BlockTile {
  int expert, begin, rows, column_tile;
};

// The tiles of this block, in the same order for all its warps.
template <class Tile, class Params>
class TileWalk {
 public:
  using Block = BlockTile;
  __device__ explicit TileWalk(const Params& p) : p_(p), next_(blockIdx.x / Tile::kCluster) {}

  // False after the last one. All lanes of a warp call it together.
  __device__ bool next(BlockTile& tile) {
    const RowTiles tiles(p_.expert_offsets, p_.S, p_.E, Tile::kClusterM);
    while (next_ < p_.row_tiles * p_.column_tiles) {
      const TilePosition position = tile_position(next_, p_.row_tiles, p_.column_tiles);
      next_ += gridDim.x / Tile::kCluster;
      const RowTile rows = tiles.find(position.row_tile);
      if (rows.rows == 0) continue;
      const int first = Tile::kCluster > 1 ? static_cast<int>(sm90::rank_in_cluster()) * Tile::kM : 0;
      tile = {static_cast<int>(rows.group), static_cast<int>(rows.begin) + first, rows_from(rows.rows, first, Tile::kM),
              static_cast<int>(position.column_tile)};
      return true;
    }
    return false;
  }
  // How much of k is summed; 0: nothing, the rows are cleared.
  __device__ int depth(const BlockTile& tile) const { return tile.expert == p_.E ? 0 : p_.K; }

 private:
  const Params& p_;
  int next_;
};

// ---- the producer warpgroup
template <class Tile, Major major_b, class Places>
__device__ __forceinline__ void load_b(const ColumnOperand<Tile::kParts>& b, int part, const BlockTile& tile, int k, int stage,
                                       const Places& places) {
  const CUtensorMap* map = b.list ? b.list + int64_t{tile.expert} * Tile::kParts + part : &b.stack[part];
  const int e = b.list ? 0 : tile.expert, column = tile.column_tile * b.tile_columns + part * b.part_columns;
  const uint32_t shared = places.b(stage) + part * (Tile::kBBytes / Tile::kParts), barrier = places.full(stage);
  const auto load = [&](uint32_t to, int c0, int c1) {
    if constexpr (Tile::kCluster > 1) {
      sm90::load_box(to, map, barrier, c0, c1, e, (1 << Tile::kCluster) - 1);
    } else {
      sm90::load_box(to, map, barrier, c0, c1, e);
    }
  };
  if constexpr (major_b == Major::kK) {
    load(shared, k, column);
  } else {
    load(shared, column, k);
    load(shared + kDepth * kRowBytes, column + 64, k);
  }
}

template <class T, class Tile, Major major_b, class Params, class Places>
__device__ __forceinline__ void produce(const Params& p, const Places& places) {
  const int thread = threadIdx.x;
  const ChunkIndex chunk = gathered_chunk(thread, 0);
  const uint32_t to = swizzled(chunk.row, chunk.chunk);
  int acquired = -1;  // the expert whose maps of a list were acquired
  RingPosition<Tile::kStages> at;
  TileWalk<Tile, Params> walk(p);
  for (BlockTile tile; walk.next(tile);) {
    if (tile.expert == p.E) continue;
    if (p.b.list && thread == 0 && acquired != tile.expert) {
      for (int part = 0; part < Tile::kParts; ++part) sm90::acquire_map(p.b.list + int64_t{tile.expert} * Tile::kParts + part);
      acquired = tile.expert;
    }
    const int valid = gathered_rows(thread, tile.rows);
    const T* source[Tile::kCopies];
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i) {
      const int row = gathered_chunk(thread, i).row;
      source[i] = (i < valid ? row_of<T>(p.a, tile.begin + row) : static_cast<const T*>(p.a.data)) + chunk.chunk * kChunkElements;
    }
    for (int k = 0; k < p.K; k += kDepth) {
      sm90::wait(places.empty(at.stage), at.parity ^ 1);
      if (thread == 0) {
        sm90::arrive_expecting(places.full(at.stage), Tile::kBBytes);  // what boxes lack beyond the matrix counts too
        if constexpr (Tile::kCluster > 1) {
          load_b<Tile, major_b>(p.b, static_cast<int>(sm90::rank_in_cluster()), tile, k, at.stage, places);
        } else {
          for (int part = 0; part < Tile::kParts; ++part) load_b<Tile, major_b>(p.b, part, tile, k, at.stage, places);
        }
      }
      // Zeros beyond K: 0 * NaN would be NaN. Zeros for rows beyond the expert: less to read.
      const int rows = k + chunk.chunk * kChunkElements < p.K ? valid : 0;
#pragma unroll
      for (int i = 0; i < Tile::kCopies; ++i) sm90::copy_16(places.a(at.stage) + to + i * 16 * kRowBytes, source[i] + k, i < rows ? 16 : 0);
      sm90::arrive_after_copies(places.full(at.stage));
      at.advance();
    }
  }
}

// ---- the consumer warpgroups
template <class Tile>
__device__ __forceinline__ void release(uint32_t barrier) {
  const uint32_t lane = threadIdx.x % 32;
  if constexpr (Tile::kCluster > 1) {
    if (lane < Tile::kCluster) sm90::arrive_at(barrier, lane);
  } else {
    if (lane == 0) sm90::arrive(barrier);
  }
}

// A value that all lanes have, which the compiler does not know: in uniform registers, where wgmma wants its descriptors.
template <class T>
__device__ __forceinline__ T uniform(T value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

// acc += this consumer's rows of a times b. Its first row is a multiple of 64, which begins at the same byte in both orders of a. A stage
// is released one step late, when the next step's products are under way.
template <class T, class Tile, Major major_a, Major major_b, class Places>
__device__ __forceinline__ void multiply(float (&acc)[Tile::kProducts][Tile::kN / 2], const Places& places, int first_row, int steps,
                                         RingPosition<Tile::kStages>& at) {
  int previous = 0;
  at.stage = uniform(at.stage);
  at.parity = uniform(at.parity);
  for (int step = 0; step < steps; ++step) {
    sm90::wait(places.full(at.stage), at.parity);
    if constexpr (Tile::kFenceCopies) sm90::fence_async();
    const MatrixDescriptor<major_a> a(places.a(at.stage) + first_row * kRowBytes);
    const MatrixDescriptor<major_b> b(places.b(at.stage));
    sm90::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
      for (int m = 0; m < Tile::kProducts; ++m)
        sm90::wgmma<T, major_a == Major::kMN, major_b == Major::kMN>(acc[m], a.at(k, 64 * m), b.at(k, 0));
    }
    sm90::wgmma_commit();
    sm90::wgmma_wait<1>();
    if (step > 0) release<Tile>(places.empty(previous));
    previous = at.stage;
    at.advance();
  }
}

template <class T, class Tile, Major major_a, Major major_b, class Epilogue, class Walk, class Params, class Places>
__device__ __forceinline__ void consume(const Params& p, const Places& places, int consumer) {
  const int warp = threadIdx.x / 32 % 4, first_row = Tile::kPingpong ? 0 : consumer * Tile::kConsumerM;
  Epilogue epilogue(p.epilogue, places.epilogue(consumer * 4 + warp));
  RingPosition<Tile::kStages> at;
  int turn = 0;                    // ping-pong: which consumer has the next tile
  uint32_t parity = consumer ^ 1;  // of the wait for it: the first comes at once to consumer 0
  Walk walk(p);
  const auto steps_of = [&](const typename Walk::Block& tile) { return static_cast<int>(divide_up(walk.depth(tile), kDepth)); };
  const auto next = [&](typename Walk::Block& tile) -> bool {  // of those that are this consumer's
    while (walk.next(tile)) {
      if constexpr (!Tile::kPingpong) return true;
      const int steps = steps_of(tile);
      const bool mine = turn == consumer;
      if (steps > 0) turn ^= 1;
      if (mine) return true;
      at.skip(steps);
    }
    return false;
  };
  typename Walk::Block following;
  for (bool more = next(following); more;) {
    const typename Walk::Block tile = following;
    const int steps = steps_of(tile);
    const auto part = [&](int product) -> WarpTile {
      const int first = first_row + 64 * product + 16 * warp;
      return {tile.expert, tile.begin + first, rows_from(tile.rows, first, 16), tile.column_tile, product};
    };
    if (steps == 0) {
      for (int m = 0; m < Tile::kProducts; ++m) epilogue.clear(part(m));
      more = next(following);
      continue;
    }
    if constexpr (requires { epilogue.begin(part(0)); }) {
#pragma unroll
      for (int m = 0; m < Tile::kProducts; ++m) epilogue.begin(part(m));
    }
    float acc[Tile::kProducts][Tile::kN / 2] = {};  // or the compiler would keep the registers of the tile before
    // Without taking turns a consumer could wait for a stage two fillings ahead, whose parity is that of the one before.
    if constexpr (Tile::kPingpong) sm90::wait(places.turn(consumer), parity);
    multiply<T, Tile, major_a, major_b>(acc, places, first_row, steps, at);
    if constexpr (Tile::kPingpong) {
      if (threadIdx.x % 32 == 0) sm90::arrive(places.turn(consumer ^ 1));
      parity ^= 1;
    }
    const int last = (at.stage + Tile::kStages - 1) % Tile::kStages;
    more = next(following);  // found while the last products are under way
    sm90::wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < Tile::kProducts; ++m) sm90::pin(acc[m]);
    release<Tile>(places.empty(last));
#pragma unroll
    for (int m = 0; m < Tile::kProducts; ++m) epilogue.store(part(m), acc[m]);
  }
  epilogue.finish();
}

// By a whole block, before anything else.
template <class Tile, class Places>
__device__ __forceinline__ void init_barriers(const Places& places) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::kStages; ++s) {
      sm90::init_barrier(places.full(s), Tile::kFullArrivals);
      sm90::init_barrier(places.empty(s), Tile::kEmptyArrivals);
    }
    for (int c = 0; c < 2; ++c) sm90::init_barrier(places.turn(c), 4);
    sm90::fence_barrier_init();
  }
  __syncthreads();
  if constexpr (Tile::kCluster > 1) sm90::sync_cluster();
}

template <class T, class Tile, Major major_b, class Epilogue>
__global__ void __launch_bounds__(kGatheredThreads, 1) gathered_gemm_kernel(const __grid_constant__ GatheredGemmParams<Tile, Epilogue> p) {
  extern __shared__ __align__(1024) char shared[];
  const SharedPlaces<Tile, Epilogue> places{sm90::shared_address(shared)};
  init_barriers<Tile>(places);
  const int warpgroup = uniform(static_cast<int>(threadIdx.x) / kWarpgroup);
  if (warpgroup == 0) {
    sm90::give_registers<kProducerRegisters>();
    produce<T, Tile, major_b>(p, places);
  } else {
    sm90::take_registers<kConsumerRegisters>();
    consume<T, Tile, Major::kK, major_b, Epilogue, TileWalk<Tile, GatheredGemmParams<Tile, Epilogue>>>(p, places, warpgroup - 1);
  }
  if constexpr (Tile::kCluster > 1) sm90::sync_cluster();  // its memory and barriers are used by the others
}

// As many blocks as run at once, or as there are tiles, of kernel(p).
template <class Tile, class Epilogue, class Params>
Status launch_blocks(void (*kernel)(Params), const Params& p, int64_t tiles, const Launch& launch) {
  constexpr int kShared = Tile::shared_bytes(Epilogue::kSharedBytes);
  static_assert(kShared <= kSharedLimit);
  const Status allowed = accepted(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  if (allowed != Status::kOk) return allowed;
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(Tile::kCluster * least<int64_t>(multiprocessors() / Tile::kCluster, tiles));
  config.blockDim = kGatheredThreads;
  config.dynamicSmemBytes = kShared;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Tile::kCluster, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  return accepted(cudaLaunchKernelEx(&config, kernel, p));
}

// `columns` are those of one matrix of b.
template <class T, class Tile, Major major_b, class Epilogue>
Status launch_gathered_gemm(GatheredGemmParams<Tile, Epilogue>& p, int64_t columns, const Launch& launch) {
  const int64_t row_tiles = RowTiles(nullptr, p.S, p.E, Tile::kClusterM).count(), column_tiles = divide_up(columns, Tile::kN);
  if (row_tiles * column_tiles > INT32_MAX / 2) return Status::kUnsupportedLayout;
  p.row_tiles = static_cast<int>(row_tiles);
  p.column_tiles = static_cast<int>(column_tiles);
  return launch_blocks<Tile, Epilogue>(gathered_gemm_kernel<T, Tile, major_b, Epilogue>, p, row_tiles * column_tiles, launch);
}

}  // namespace moe::cuda
