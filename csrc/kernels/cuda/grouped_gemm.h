// The grouped GEMMs by the hardware they run on; grouped_mm.cu and grouped_mm_wgrad.cu choose among them. Lists of matrices are
// device tables by now, and there is at least one row and one column.
#pragma once
#include "../params.h"

namespace moe::cuda {

Status simt_grouped_mm(const GroupedMmParams& p, const Launch& launch);
Status simt_wgrad(const GroupedMmWgradParams& p, const Launch& launch);

}  // namespace moe::cuda
