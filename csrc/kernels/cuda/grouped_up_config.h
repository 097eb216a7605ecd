// Which kernel runs an up projection together with its activation. Where few rows are read by one kernel of grouped_mm_config.h they
// are by the other, so that both round the same sums. See rules.h.
#pragma once
#include "rules.h"

namespace moe::cuda {

enum class UpKernel {
  kSteps,            // grouped_mm and gated_activation, one after the other: the op calls them
  kFewRows,          // grouped_mm_few_rows.cu
  kSm90Pingpong,     // grouped_up_sm90.cu, 64-row tiles
  kSm90Cooperative,  // grouped_up_sm90.cu, 128-row tiles, clusters of 2
};

constexpr KernelInfo info(UpKernel kernel) {
  switch (kernel) {
    case UpKernel::kFewRows:
      return {"few_rows", 16, 32, 256};
    case UpKernel::kSm90Pingpong:
      return {"sm90_pingpong", 64, 256, 64};
    case UpKernel::kSm90Cooperative:
      return {"sm90_cooperative", 128, 256, 64};
    default:
      return {"steps"};
  }
}

// N is the number of outputs that are contiguous when n_major (I, or 2I with gate and up in turns), else I; K is H.
constexpr Rule<UpKernel> kGroupedUpRules[] = {
    {UpKernel::kFewRows, kFewRowsPerExpert, kFewRowsReason},
    {UpKernel::kSm90Cooperative, kFusedWgmma + kRows256,
     "rows gathered as they are loaded; 256 per expert fill both blocks of a cluster, which then share the weights' tile"},
    {UpKernel::kSm90Pingpong, kFusedWgmma,
     "rows gathered as they are loaded; the pre-activation is written only when it is kept, and 64-row tiles waste least"},
    {UpKernel::kSteps, {}, "no kernel does both for these rows, this layout or this dtype"},
};

}  // namespace moe::cuda
