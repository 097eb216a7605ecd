// grouped_mm: out[r, :] = x[r, :] @ weight[e]^T + bias[e], rounded once. Chooses the kernel by the table in grouped_mm_config.h;
// the tensor-core kernels for every device from sm_80 are here. A block computes one tile of rows of one expert, found from the
// offsets on the device (row_tiles.h); the rows of dropped slots are a group of their own and are written as zero.
#include "grouped_gemm.h"
#include "grouped_mm_config.h"
#include "kernels.h"
#include "mma_tile.cuh"
#include "operands.cuh"
#include "pointer_table.h"
#include "row_tiles.h"

namespace moe::cuda {
namespace {

constexpr int kColumns = 128;  // of a tile
static_assert(info(GemmKernel::kMma64).tile_n == kColumns && info(GemmKernel::kMma128).tile_n == kColumns &&
              info(GemmKernel::kMma128).tile_k == kMmaDepth);

template <class T, int kRows, Major major_b, bool kAligned>
__global__ void __launch_bounds__(kMmaThreads, 2) mma_kernel(GroupedMmParams p, int64_t row_tiles, int64_t column_tiles, bool wide) {
  using Tile = MmaTile<kRows, kColumns>;
  extern __shared__ __align__(128) char shared[];
  const TilePosition position = tile_position(blockIdx.x, row_tiles, column_tiles);
  const RowTile tile = RowTiles(p.expert_offsets, p.S, p.E, kRows).find(position.row_tile);
  if (tile.rows == 0) return;
  const int64_t n0 = position.column_tile * kColumns, e = tile.group;
  TileOutput<T> output{static_cast<T*>(p.out) + tile.begin * p.out_stride + n0, p.out_stride, tile.rows,
                       static_cast<int>(least<int64_t>(p.N - n0, kColumns)), wide};
  if (e == p.E) return clear_tile<Tile>(output);
  if (p.bias) output.bias = expert_data<T>(p.bias, e) + n0;
  output.accumulate = p.accumulate;

  const KMajorLoader<T, kRows, kAligned> a(static_cast<const T*>(p.x.data), tile.rows,
                                           [&](int r) { return row_of<T>(p.x, tile.begin + r); });
  const T* weight = expert_data<T>(p.weight, e);
  float sums[Tile::kStepsM][Tile::kStepsN][4] = {};
  if constexpr (major_b == Major::kK) {
    const KMajorLoader<T, kColumns, kAligned> b(weight, output.columns, [&](int n) { return weight + (n0 + n) * p.weight.stride_n; });
    multiply_tile<T, Tile>(a, b, p.K, shared, sums);
  } else {
    const auto row_at = [weight, stride = p.weight.stride_k](int64_t k) { return weight + k * stride; };
    const MnMajorLoader<T, kColumns, kAligned, decltype(row_at)> b(weight, n0, p.N, row_at);
    multiply_tile<T, Tile>(a, b, p.K, shared, sums);
  }
  store_tile<Tile>(sums, shared, output);
}

template <class T, int kRows, bool kAligned>
Status launch_tiles(const GroupedMmParams& p, bool wide, const Launch& launch) {
  const auto kernel = p.weight.stride_k == 1 ? mma_kernel<T, kRows, Major::kK, kAligned> : mma_kernel<T, kRows, Major::kMN, kAligned>;
  const int64_t row_tiles = RowTiles(nullptr, p.S, p.E, kRows).count(), column_tiles = divide_up(p.N, kColumns);
  const Grid grid{row_tiles * column_tiles, kMmaThreads, MmaTile<kRows, kColumns>::kSharedBytes};
  return launch_grid(kernel, grid, launch, p, row_tiles, column_tiles, wide);
}

template <class T>
Status launch_mma(GemmKernel kernel, const GroupedMmParams& p, bool wide, const Launch& launch) {
  switch (kernel) {
    case GemmKernel::kMmaElements:
      return launch_tiles<T, info(GemmKernel::kMmaElements).tile_m, false>(p, wide, launch);
    case GemmKernel::kMma64:
      return launch_tiles<T, info(GemmKernel::kMma64).tile_m, true>(p, wide, launch);
    default:
      return launch_tiles<T, info(GemmKernel::kMma128).tile_m, true>(p, wide, launch);
  }
}

GemmKernel chosen(const GroupedMmParams& p) {
  const int64_t element = element_size(p.dtype), weight_stride = p.weight.stride_k == 1 ? p.weight.stride_n : p.weight.stride_k;
  KernelQuery query{p.dtype};
  query.capability = compute_capability();
  query.rows = p.S;
  query.experts = p.E;
  query.N = p.N;
  query.K = p.K;
  query.aligned = is_aligned(p.x, element) && is_aligned(p.weight, p.E, weight_stride, element);
  query.aligned_out = is_aligned(p.out) && p.out_stride * element % 16 == 0;
  query.n_major = p.weight.stride_k != 1;
  query.epilogue = p.bias || p.accumulate;
  return choose(kGroupedMmRules, query).kernel;
}

Status supports(const GroupedMmParams& p) {
  return p.weight.stride_n == 1 || p.weight.stride_k == 1 ? Status::kOk : Status::kUnsupportedLayout;
}

// Null: a kernel of this file.
const Kernel<GroupedMmParams>* kernel_elsewhere(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::kSimt:
      return &simt_grouped_mm;
    case GemmKernel::kFewRows:
      return &few_rows_grouped_mm;
    case GemmKernel::kSm90Cooperative:
      return &sm90_grouped_mm_cooperative;
    case GemmKernel::kSm90Pingpong:
      return &sm90_grouped_mm_pingpong;
    default:
      return nullptr;
  }
}

int64_t lists_bytes(const GroupedMmParams& p) {
  return round_up(pointer_table_bytes(p.weight.list, p.E) + pointer_table_bytes(p.bias.list, p.E), 128);
}

int64_t workspace(const GroupedMmParams& p, int) { return lists_bytes(p) + workspace_bytes(kernel_elsewhere(chosen(p)), p); }

Status launch(const GroupedMmParams& host, const Launch& launch) {
  if (host.S == 0 || host.N == 0) return Status::kOk;
  const GemmKernel kernel = chosen(host);
  GroupedMmParams p = host;
  char* place = static_cast<char*>(launch.workspace);
  if (const Status s = move_to_device(p.weight, p.E, place, launch); s != Status::kOk) return s;
  if (const Status s = move_to_device(p.bias, p.E, place, launch); s != Status::kOk) return s;
  if (const auto* elsewhere = kernel_elsewhere(kernel)) return elsewhere->launch(p, after(launch, lists_bytes(host)));
  const auto launch_dtype = p.dtype == DType::kBFloat16 ? launch_mma<__nv_bfloat16> : launch_mma<__half>;
  return launch_dtype(kernel, p, has_wide_results(host), launch);
}

}  // namespace

const Kernel<GroupedMmParams> grouped_mm = {supports, workspace, launch};

}  // namespace moe::cuda
