// grouped_mm_wgrad: out[e] = a[rows of e]^T @ b[rows of e]. Chooses the kernel by the table in grouped_mm_config.h; the
// tensor-core kernel for every device from sm_80 is here. A block computes one tile of one expert's matrix over all of its rows
// in their order: no atomics, and an expert without rows is an empty sum, exactly zero.
#include "grouped_gemm.h"
#include "grouped_mm_config.h"
#include "kernels.h"
#include "mma_tile.cuh"
#include "operands.cuh"
#include "pointer_table.h"
#include "row_tiles.h"

namespace moe::cuda {
namespace {

using Tile = MmaTile<128, 128>;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMmaThreads, 2) mma_kernel(GroupedMmWgradParams p, int64_t tiles_m, int64_t tiles_n, bool wide) {
  extern __shared__ __align__(128) char shared[];
  const int64_t tiles = tiles_m * tiles_n, e = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t m0 = tile % tiles_m * Tile::kM, n0 = tile / tiles_m * Tile::kN;
  const ExpertRows rows = expert_rows(p.expert_offsets, e, p.S);
  const int64_t first = rows.begin, depth = rows.count;
  const auto row_of_a = [&](int64_t k) { return row_of<T>(p.a, first + k); };
  const auto row_of_b = [&](int64_t k) { return row_of<T>(p.b, first + k); };
  const MnMajorLoader<T, Tile::kM, kAligned, decltype(row_of_a)> a(static_cast<const T*>(p.a.data), m0, p.M, row_of_a);
  const MnMajorLoader<T, Tile::kN, kAligned, decltype(row_of_b)> b(static_cast<const T*>(p.b.data), n0, p.N, row_of_b);
  float sums[Tile::kStepsM][Tile::kStepsN][4] = {};
  multiply_tile<T, Tile>(a, b, depth, shared, sums);
  store_tile<Tile>(
      sums, shared,
      TileOutput<T>{expert_data<T>(p.out, e) + m0 * p.out.stride + n0, p.out.stride, static_cast<int>(least<int64_t>(p.M - m0, Tile::kM)),
                    static_cast<int>(least<int64_t>(p.N - n0, Tile::kN)), wide});
}

template <class T>
Status launch_mma(GemmKernel kernel, const GroupedMmWgradParams& p, bool wide, const Launch& launch) {
  const int64_t tiles_m = divide_up(p.M, Tile::kM), tiles_n = divide_up(p.N, Tile::kN);
  const Grid grid{p.E * tiles_m * tiles_n, kMmaThreads, Tile::kSharedBytes};
  return launch_grid(kernel == GemmKernel::kMmaElements ? mma_kernel<T, false> : mma_kernel<T, true>, grid, launch, p, tiles_m, tiles_n,
                     wide);
}

GemmKernel chosen(const GroupedMmWgradParams& p) {
  const int64_t element = element_size(p.dtype);
  KernelQuery query{p.dtype};
  query.capability = compute_capability();
  query.rows = p.S;
  query.experts = p.E;
  query.N = p.M;
  query.K = p.N;
  query.aligned = is_aligned(p.a, element) && is_aligned(p.b, element);
  query.aligned_out = is_aligned(p.out, p.E, p.out.stride, element);
  query.gathered = p.a.row_to_slot || p.b.row_to_slot;
  return choose(kWgradRules, query).kernel;
}

// Null: a kernel of this file.
const Kernel<GroupedMmWgradParams>* kernel_elsewhere(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::kSimt:
      return &simt_wgrad;
    case GemmKernel::kSm90Cooperative:
      return &sm90_wgrad_cooperative;
    case GemmKernel::kSm90Gather:
      return &sm90_wgrad_gather;
    default:
      return nullptr;
  }
}

int64_t lists_bytes(const GroupedMmWgradParams& p) { return round_up(pointer_table_bytes(p.out.list, p.E), 128); }

int64_t workspace(const GroupedMmWgradParams& p, int) { return lists_bytes(p) + workspace_bytes(kernel_elsewhere(chosen(p)), p); }

Status launch(const GroupedMmWgradParams& host, const Launch& launch) {
  if (host.E == 0 || host.M == 0 || host.N == 0) return Status::kOk;
  const GemmKernel kernel = chosen(host);
  GroupedMmWgradParams p = host;
  char* place = static_cast<char*>(launch.workspace);
  if (const Status s = move_to_device(p.out, p.E, place, launch); s != Status::kOk) return s;
  if (const auto* elsewhere = kernel_elsewhere(kernel)) return elsewhere->launch(p, after(launch, lists_bytes(host)));
  const auto launch_dtype = p.dtype == DType::kBFloat16 ? launch_mma<__nv_bfloat16> : launch_mma<__half>;
  return launch_dtype(kernel, p, has_wide_results(host), launch);
}

}  // namespace

const Kernel<GroupedMmWgradParams> grouped_mm_wgrad = {nullptr, workspace, launch};

}  // namespace moe::cuda
