// grouped_bias_grad: out[e] = sum over the rows of e of row_weight[r] * g[r, :]. A block owns 32 accesses' worth of columns of one
// expert. Each of its warps sums every eighth row, 32 of them in float32 before they join a float64 sum; the warps' sums are added
// in order. The order of the sum depends on the expert's rows alone, and one long chain of float32 additions is avoided.
#include "kernels.h"
#include "operands.cuh"
#include "pointer_table.h"
#include "row_tiles.h"

namespace moe::cuda {
namespace {

constexpr int kBlockRows = 32, kRowsInFlight = 4;

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) bias_grad_kernel(GroupedBiasGradParams p, int64_t column_blocks) {
  using A = acc_t<T>;
  constexpr int kColumns = 32 * V;
  __shared__ double scratch[kWarps][kColumns];
  const int64_t e = blockIdx.x / column_blocks, first = blockIdx.x % column_blocks * kColumns;
  const ExpertRows rows = expert_rows(p.expert_offsets, e, p.S);
  const int64_t begin = rows.begin, end = begin + rows.count;
  const int warp = threadIdx.x / 32, column = threadIdx.x % 32 * V;
  const A* weights = static_cast<const A*>(p.slot_weights);
  double sum[V] = {};
  for (int64_t r = begin + warp; first + column < p.N && r < end;) {
    A part[V] = {};
    for (int i = 0; i < kBlockRows && r < end; i += kRowsInFlight, r += kRowsInFlight * kWarps) {
      Pack<T, V> g[kRowsInFlight];  // zero past the end
      A w[kRowsInFlight];
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        const int64_t row = r + j * kWarps;
        w[j] = row < end && weights ? weights[p.row_to_slot[row]] : A(1);
        if (row < end) g[j] = load<V>(row_of<T>(p.g, row) + first + column);
      }
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
#pragma unroll
        for (int v = 0; v < V; ++v) part[v] += w[j] * to_acc(g[j].at[v]);
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += part[v];
  }
#pragma unroll
  for (int v = 0; v < V; ++v) scratch[warp][column + v] = sum[v];
  __syncthreads();
  if (threadIdx.x >= kColumns || first + threadIdx.x >= p.N) return;
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += scratch[w][threadIdx.x];
  expert_data<T>(p.out, e)[first + threadIdx.x] = from_acc<T>(static_cast<A>(total));
}

int64_t workspace(const GroupedBiasGradParams& p, int) { return pointer_table_bytes(p.out.list, p.E); }

Status launch(const GroupedBiasGradParams& host, const Launch& launch) {
  GroupedBiasGradParams p = host;
  char* place = static_cast<char*>(launch.workspace);
  if (const Status s = move_to_device(p.out, p.E, place, launch); s != Status::kOk) return s;
  return visit_access(p.dtype, is_wide(host), [&](auto access) {
    constexpr int V = decltype(access)::kWidth;
    const int64_t column_blocks = divide_up(p.N, 32 * V);
    return launch_grid(bias_grad_kernel<typename decltype(access)::Element, V>, {p.E * column_blocks}, launch, p, column_blocks);
  });
}

}  // namespace

const Kernel<GroupedBiasGradParams> grouped_bias_grad = {nullptr, workspace, launch};

}  // namespace moe::cuda
