// The sm_90a kernels of grouped_mm for bfloat16; a file per element type, so that no compilation needs more than a few gigabytes.
#include "cutlass_sm90.cuh"

namespace moe::cuda {

Sm90Launch sm90_grouped_mm_bf16(bool cooperative, bool n_major) { return pick_grouped_mm<cutlass::bfloat16_t>(cooperative, n_major); }

}  // namespace moe::cuda
