// The grouped GEMMs of float32 and float64 by fused multiply-add, any strides. Tiles of 64 x 64, 4 x 4 outputs per thread; sums
// run over blocks of 256 and are then added up, so that long sums lose no more than blocked ones do elsewhere.
#include "element.cuh"
#include "grouped_gemm.h"
#include "operands.cuh"
#include "row_tiles.h"

namespace moe::cuda {
namespace {

constexpr int kTile = 64, kDepth = 16, kPad = 4, kBlockSteps = 256 / kDepth;

template <class T>
struct SharedTiles {
  alignas(16) T a[kDepth][kTile + kPad], b[kDepth][kTile + kPad];
};

// Elements of one stage into shared memory: at(mn, k), or zero outside. Neighbouring threads take neighbouring k, or mn.
template <bool k_first, class T, class At>
__device__ __forceinline__ void load_tile(T (&to)[kDepth][kTile + kPad], int64_t k0, int64_t depth, int64_t extent, const At& at) {
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
    const int mn = k_first ? i / kDepth : i % kTile, k = k_first ? i % kDepth : i / kTile;
    to[k][mn] = mn < extent && k0 + k < depth ? *at(mn, k0 + k) : T(0);
  }
}

template <class T>
__device__ __forceinline__ void multiply_stage(const SharedTiles<T>& shared, T (&sums)[4][4]) {
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    T a[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = shared.a[k][row + i], b[i] = shared.b[k][column + i];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = fma(a[i], b[j], sums[i][j]);
    }
  }
}

// total += sum over k in [0, depth) of load_a's times load_b's elements; load_*(k0) fill the shared tiles.
template <class T, class LoadStage>
__device__ __forceinline__ void multiply_tile(int64_t depth, const SharedTiles<T>& shared, const LoadStage& load, T (&total)[4][4]) {
  T sums[4][4] = {};
  int steps = 0;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    load(k0);
    __syncthreads();
    multiply_stage(shared, sums);
    __syncthreads();
    if (++steps < kBlockSteps && k0 + kDepth < depth) continue;
    steps = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) total[i][j] += sums[i][j], sums[i][j] = T(0);
    }
  }
}

// f(row, column, value) for each of this thread's outputs, in the tile's coordinates.
template <class T, class F>
__device__ __forceinline__ void for_each_output(const T (&total)[4][4], const F& f) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) f(static_cast<int>(threadIdx.x) / 16 * 4 + i, static_cast<int>(threadIdx.x) % 16 * 4 + j, total[i][j]);
  }
}

template <class T, bool k_first>
__global__ void __launch_bounds__(kThreads) grouped_mm_kernel(GroupedMmParams p, int64_t row_tiles, int64_t column_tiles) {
  __shared__ SharedTiles<T> shared;
  const TilePosition position = tile_position(blockIdx.x, row_tiles, column_tiles);
  const RowTile tile = RowTiles(p.expert_offsets, p.S, p.E, kTile).find(position.row_tile);
  if (tile.rows == 0) return;
  const bool dropped = tile.group == p.E;
  const int64_t n0 = position.column_tile * kTile, columns = p.N - n0;
  T total[4][4] = {};
  if (!dropped) {
    const T* weight = expert_data<T>(p.weight, tile.group) + n0 * p.weight.stride_n;
    multiply_tile(
        p.K, shared,
        [&](int64_t k0) {
          load_tile<true>(shared.a, k0, p.K, tile.rows, [&](int r, int64_t k) { return row_of<T>(p.x, tile.begin + r) + k; });
          load_tile<k_first>(shared.b, k0, p.K, columns,
                             [&](int n, int64_t k) { return weight + n * p.weight.stride_n + k * p.weight.stride_k; });
        },
        total);
  }
  const T* bias = p.bias && !dropped ? expert_data<T>(p.bias, tile.group) + n0 : nullptr;
  for_each_output(total, [&](int row, int column, T value) {
    if (row >= tile.rows || column >= columns) return;
    T* out = static_cast<T*>(p.out) + (tile.begin + row) * p.out_stride + n0 + column;
    if (bias) value += bias[column];
    if (p.accumulate && !dropped) value += *out;
    *out = value;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) wgrad_kernel(GroupedMmWgradParams p, int64_t tiles_m, int64_t tiles_n) {
  __shared__ SharedTiles<T> shared;
  const int64_t tiles = tiles_m * tiles_n, e = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t m0 = tile % tiles_m * kTile, n0 = tile / tiles_m * kTile;
  const ExpertRows rows = expert_rows(p.expert_offsets, e, p.S);
  const int64_t first = rows.begin, depth = rows.count;
  T total[4][4] = {};
  multiply_tile(
      depth, shared,
      [&](int64_t k0) {
        load_tile<false>(shared.a, k0, depth, p.M - m0, [&](int m, int64_t k) { return row_of<T>(p.a, first + k) + m0 + m; });
        load_tile<false>(shared.b, k0, depth, p.N - n0, [&](int n, int64_t k) { return row_of<T>(p.b, first + k) + n0 + n; });
      },
      total);
  T* out = expert_data<T>(p.out, e) + m0 * p.out.stride + n0;
  for_each_output(total, [&](int row, int column, T value) {
    if (m0 + row < p.M && n0 + column < p.N) out[row * p.out.stride + column] = value;
  });
}

template <class T>
Status run(const GroupedMmParams& p, const Launch& launch) {
  const int64_t row_tiles = RowTiles(nullptr, p.S, p.E, kTile).count(), column_tiles = divide_up(p.N, kTile);
  const auto kernel = p.weight.stride_k == 1 ? grouped_mm_kernel<T, true> : grouped_mm_kernel<T, false>;
  return launch_grid(kernel, {row_tiles * column_tiles}, launch, p, row_tiles, column_tiles);
}

template <class T>
Status run(const GroupedMmWgradParams& p, const Launch& launch) {
  const int64_t tiles_m = divide_up(p.M, kTile), tiles_n = divide_up(p.N, kTile);
  return launch_grid(wgrad_kernel<T>, {p.E * tiles_m * tiles_n}, launch, p, tiles_m, tiles_n);
}

template <class Params>
Status run_dtype(const Params& p, const Launch& launch) {
  return p.dtype == DType::kFloat64 ? run<double>(p, launch) : run<float>(p, launch);
}

}  // namespace

const Kernel<GroupedMmParams> simt_grouped_mm = {nullptr, nullptr, run_dtype<GroupedMmParams>};
const Kernel<GroupedMmWgradParams> simt_wgrad = {nullptr, nullptr, run_dtype<GroupedMmWgradParams>};

}  // namespace moe::cuda
