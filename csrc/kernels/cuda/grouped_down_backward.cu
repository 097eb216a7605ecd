// grouped_down_backward: whether there is a kernel for it. Where there is none the op runs the steps, which compute the same but for
// one rounding: they write the gradient of the activation output in between.
#include "grouped_down_backward_sm90.h"
#include "kernels.h"
#include "operands.cuh"

namespace moe::cuda {
namespace {

bool is_readable(const GroupedDownBackwardParams& p) {
  const GatedActivationBackwardParams& a = p.through;
  const int64_t element = element_size(a.dtype);
  const bool maps = a.expert_offsets && (a.row_to_slot || !(a.slot_weights || a.grad_slot_weights));
  const bool sizes = a.H % 8 == 0 && a.I % 8 == 0 && a.H > 0 && a.H < INT32_MAX / 2 && a.I > 0 && a.I < INT32_MAX / 4;
  const bool arrays = is_aligned(p.grad, element) && is_aligned(a.pre_act) && is_aligned(a.grad_pre) && is_aligned(a.scaled);
  const bool reads_bias = a.grad_slot_weights && a.down_bias;
  const bool bias = !reads_bias || (a.down_bias.stride_n == 1 && is_aligned(a.down_bias, a.E, a.H, element) &&  //
                                    is_aligned(a.grad_out, element));
  return element == 2 && a.activation.gated && maps && sizes && arrays && bias && matrix_view(p.down_proj, a.E, a.I, a.H).readable;
}

Status supports(const GroupedDownBackwardParams& p) {
  const DownBackwardQuery query{compute_capability(), p.through.S, p.through.E, is_readable(p)};
  return choose(query).kernel == DownBackwardKernel::kSm90Pingpong ? Status::kOk : Status::kUnsupportedLayout;
}

int64_t workspace(const GroupedDownBackwardParams& p, int) { return sm90_workspace_bytes(p); }

}  // namespace

const Kernel<GroupedDownBackwardParams> grouped_down_backward = {supports, workspace, sm90_down_backward};

}  // namespace moe::cuda
