// grouped_bias_grad: out[e] = sum over the rows of e of row_weight[r] * g[r, :]. A block owns 32 columns of one expert. Each of
// its warps sums every eighth row, 32 of them in float32 before they join a float64 sum; the warps' sums are added in order. The
// order of the sum depends on the expert's rows alone, and one long chain of float32 additions is avoided.
#include "kernels.h"
#include "operands.cuh"
#include "pointer_table.h"

namespace moe::cuda {
namespace {

constexpr int kColumns = 32, kBlockRows = 32;

template <class T>
__global__ void __launch_bounds__(kThreads) bias_grad_kernel(GroupedBiasGradParams p, int64_t column_blocks) {
  using A = acc_t<T>;
  __shared__ double scratch[kWarps][kColumns];
  const int64_t e = blockIdx.x / column_blocks, column = blockIdx.x % column_blocks * kColumns + threadIdx.x % kColumns;
  const int64_t begin = p.expert_offsets[e], end = p.expert_offsets[e + 1];
  const int warp = threadIdx.x / kColumns;
  const bool inside = column < p.N;
  const A* weights = static_cast<const A*>(p.slot_weights);
  double sum = 0;
  for (int64_t r = begin + warp; inside && r < end;) {
    A part = 0;
    for (int i = 0; i < kBlockRows && r < end; ++i, r += kWarps) {
      const A w = weights ? weights[p.row_to_slot[r]] : A(1);
      part += w * to_acc(row_of<T>(p.g, r)[column]);
    }
    sum += part;
  }
  scratch[warp][threadIdx.x % kColumns] = sum;
  __syncthreads();
  if (warp > 0 || !inside) return;
  for (int w = 1; w < kWarps; ++w) sum += scratch[w][threadIdx.x];
  expert_data<T>(p.out, e)[column] = from_acc<T>(static_cast<A>(sum));
}

int64_t workspace(const GroupedBiasGradParams& p, int) { return pointer_table_bytes(p.out.list, p.E); }

Status launch(const GroupedBiasGradParams& host, const Launch& launch) {
  GroupedBiasGradParams p = host;
  char* place = static_cast<char*>(launch.workspace);
  if (const Status s = move_to_device(p.out, p.E, place, launch); s != Status::kOk) return s;
  const int64_t column_blocks = (p.N + kColumns - 1) / kColumns;
  if (p.E * column_blocks > INT32_MAX) return Status::kUnsupportedLayout;
  return visit_dtype<ElementTypes>(p.dtype, [&](auto type) {
    return launch_rows(bias_grad_kernel<typename decltype(type)::type>, p.E * column_blocks, launch, p, column_blocks);
  });
}

}  // namespace

const Kernel<GroupedBiasGradParams> grouped_bias_grad = {nullptr, workspace, launch};

}  // namespace moe::cuda
