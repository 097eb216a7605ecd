// Which kernel runs the down projection's input gradient together with the activation's. See rules.h.
#pragma once
#include "rules.h"

namespace moe::cuda {

enum class DownBackwardKernel {
  kSteps,         // grouped_mm and gated_activation_backward, one after the other: the op calls them
  kSm90Pingpong,  // grouped_down_backward_sm90.cu
};

constexpr KernelInfo info(DownBackwardKernel kernel) {
  return kernel == DownBackwardKernel::kSteps ? KernelInfo{"steps"} : KernelInfo{"sm90_pingpong", 128, 128, 64};
}

// N is I, K is H. Below 16 rows per expert, an eighth of a 128-row tile, reading the weights is all, and smaller tiles do it as well
// (by arithmetic, not measured).
constexpr Rule<DownBackwardKernel> kDownBackwardRules[] = {
    {DownBackwardKernel::kSm90Pingpong, kFusedWgmma + kAlignedResults + kRows16,
     "the gradient of the activation never reaches memory; one group multiplies while the other is in its long epilogue"},
    {DownBackwardKernel::kSteps, {}, "no kernel does both for these rows, this layout or this dtype"},
};

}  // namespace moe::cuda
