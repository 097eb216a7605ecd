// Which kernel runs an up projection together with its activation: the first line of a table that applies, as in
// grouped_mm_config.h. Where few rows are read by one kernel they are by the other, so that both round the same sums.
#pragma once
#include "grouped_mm_config.h"

namespace moe::cuda {

enum class UpKernel {
  kNone,     // grouped_mm and gated_activation, one after the other
  kFewRows,  // grouped_mm_few_rows.cu
  kSm90,     // grouped_up_sm90.cu
};
using UpRule = Rule<UpKernel>;

// N is the number of outputs that are contiguous when n_major (I, or 2I with gate and up in turns), else I; K is H.
constexpr UpRule kGroupedUpRules[] = {
    {UpKernel::kFewRows, kFewRowsPerTile, kFewRowsReason},
    {UpKernel::kSm90, kFusedWgmma, "rows gathered as they are loaded; the pre-activation is written only when it is kept"},
    {UpKernel::kNone, kNone, "no kernel does both for these rows, this layout or this dtype"},
};

}  // namespace moe::cuda
