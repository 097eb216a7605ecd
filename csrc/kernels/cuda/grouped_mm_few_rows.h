// Products of few rows per expert, bound by reading the weights; grouped_mm.cu and grouped_up.cu choose them. Operands begin at
// multiples of 16 bytes, k comes in eights, and so do outputs where they are contiguous. Lists are device tables by now.
#pragma once
#include "../params.h"

namespace moe::cuda {

Status few_rows_grouped_mm(const GroupedMmParams& p, const Launch& launch);
Status few_rows_grouped_up(const GroupedUpParams& p, const Launch& launch);  // stride_n = 2 with stride_k != 1: gate and up in turns

}  // namespace moe::cuda
