// grouped_up: out[r] = act(x[r] @ gate_proj[e]^T + gate_bias[e]) * (x[r] @ up_proj[e]^T + up_bias[e]), rows gathered. Chooses the
// kernel by the table in grouped_up_config.h; where that has none, the ops run grouped_mm and gated_activation instead.
#include "element.cuh"
#include "grouped_gemm.h"
#include "grouped_up_config.h"
#include "kernels.h"
#include "operands.cuh"
#include "pointer_table.h"

namespace moe::cuda {
namespace {

// Gate and up as neighbouring columns of one stack.
bool in_turns(const GroupedUpParams& p) {
  const WeightTable &gate = p.gate_proj, &up = p.up_proj;
  const char* second = static_cast<const char*>(gate.base) + element_size(p.dtype);
  return gate.stride_k != 1 && gate.stride_n == 2 && gate.base && up.base == second && gate.stride_e == up.stride_e;
}

bool is_readable(const GroupedUpParams& p) {
  const WeightTable &gate = p.gate_proj, &up = p.up_proj;
  const int64_t element = element_size(p.dtype);
  if (gate.stride_n != up.stride_n || gate.stride_k != up.stride_k || !is_aligned(p.x, element)) return false;
  if (gate.stride_k != 1 && gate.stride_n != 1 && !in_turns(p)) return false;
  const int64_t row_stride = gate.stride_k == 1 ? gate.stride_n : gate.stride_k;
  return is_aligned(gate, p.E, row_stride, element) && (in_turns(p) || is_aligned(up, p.E, row_stride, element));
}

UpKernel chosen(const GroupedUpParams& p) {
  KernelQuery query{p.dtype};
  query.capability = compute_capability();
  query.rows = p.S;
  query.experts = p.E;
  query.N = in_turns(p) ? 2 * p.I : p.I;
  query.K = p.H;
  query.aligned = is_readable(p);
  query.n_major = p.gate_proj.stride_k != 1;
  query.gated = p.activation.gated;
  query.tensor_maps = sm90_up_pingpong.supports && sm90_up_pingpong.supports(p) == Status::kOk;  // the other tile reads the same
  return choose(kGroupedUpRules, query).kernel;
}

// Null: the kernel for few rows, or none.
const Kernel<GroupedUpParams>* sm90_kernel(UpKernel kernel) {
  if (kernel == UpKernel::kSm90Cooperative) return &sm90_up_cooperative;
  return kernel == UpKernel::kSm90Pingpong ? &sm90_up_pingpong : nullptr;
}

Status supports(const GroupedUpParams& p) { return chosen(p) == UpKernel::kSteps ? Status::kUnsupportedLayout : Status::kOk; }

int64_t workspace(const GroupedUpParams& p, int) {
  if (const auto* sm90 = sm90_kernel(chosen(p))) return workspace_bytes(sm90, p);
  return pointer_table_bytes(p.gate_proj.list, p.E) + pointer_table_bytes(p.up_proj.list, p.E) +
         pointer_table_bytes(p.gate_bias.list, p.E) + pointer_table_bytes(p.up_bias.list, p.E);
}

Status launch(const GroupedUpParams& host, const Launch& launch) {
  if (host.S == 0 || host.I == 0) return Status::kOk;
  if (const auto* sm90 = sm90_kernel(chosen(host))) return sm90->launch(host, launch);
  GroupedUpParams p = host;
  char* place = static_cast<char*>(launch.workspace);
  if (const Status s = move_to_device(p.gate_proj, p.E, place, launch); s != Status::kOk) return s;
  if (const Status s = move_to_device(p.up_proj, p.E, place, launch); s != Status::kOk) return s;
  if (const Status s = move_to_device(p.gate_bias, p.E, place, launch); s != Status::kOk) return s;
  if (const Status s = move_to_device(p.up_bias, p.E, place, launch); s != Status::kOk) return s;
  return few_rows_grouped_up.launch(p, launch);
}

}  // namespace

const Kernel<GroupedUpParams> grouped_up = {supports, workspace, launch};

}  // namespace moe::cuda
