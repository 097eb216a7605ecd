// grouped_down_backward: whether there is a kernel for it. Where there is none the op runs the steps, which compute the same but for
// one rounding: they write the gradient of the activation output in between.
#include "gathered_gemm_sm90.h"
#include "grouped_down_backward_config.h"
#include "grouped_gemm.h"
#include "kernels.h"
#include "operands.cuh"

namespace moe::cuda {
namespace {

bool reads_bias(const GatedActivationBackwardParams& a) { return a.grad_slot_weights && a.down_bias; }

DownBackwardKernel chosen(const GroupedDownBackwardParams& p) {
  const GatedActivationBackwardParams& a = p.through;
  const int64_t element = element_size(a.dtype);
  KernelQuery query{a.dtype};
  query.capability = compute_capability();
  query.rows = a.S;
  query.experts = a.E;
  query.N = a.I;
  query.K = a.H;
  query.aligned = is_aligned(p.grad, element) && is_aligned(a.pre_act) &&
                  (!reads_bias(a) || (is_aligned(a.down_bias, a.E, a.H, element) && is_aligned(a.grad_out, element)));
  query.aligned_out = is_aligned(a.grad_pre) && is_aligned(a.scaled);
  query.gated = a.activation.gated;
  query.tensor_maps = a.H < INT32_MAX / 2 && a.I < INT32_MAX / 4 && matrix_view(p.down_proj, a.E, a.I, a.H).readable;
  return choose(kDownBackwardRules, query).kernel;
}

Status supports(const GroupedDownBackwardParams& p) {
  const GatedActivationBackwardParams& a = p.through;
  const bool maps = a.expert_offsets && (a.row_to_slot || !(a.slot_weights || a.grad_slot_weights));
  const bool bias = !reads_bias(a) || a.down_bias.stride_n == 1;
  return maps && bias && chosen(p) == DownBackwardKernel::kSm90Pingpong ? Status::kOk : Status::kUnsupportedLayout;
}

int64_t workspace(const GroupedDownBackwardParams& p, int) { return workspace_bytes(&sm90_down_backward, p); }
Status launch(const GroupedDownBackwardParams& p, const Launch& launch) { return sm90_down_backward.launch(p, launch); }

}  // namespace

const Kernel<GroupedDownBackwardParams> grouped_down_backward = {supports, workspace, launch};

}  // namespace moe::cuda
