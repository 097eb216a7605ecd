// The kernels that the rules choose among, as grouped_mm.cu, grouped_mm_wgrad.cu, grouped_up.cu and grouped_down_backward.cu call them.
// Lists of matrices are device tables by now, unless it says otherwise, and the workspace is what follows them; there is at least one
// row and one column. The mma.sync kernels of grouped_mm.cu and grouped_mm_wgrad.cu are in these files themselves.
#pragma once
#include "../kernel_table.h"

namespace moe::cuda {

// grouped_mm_simt.cu
extern const Kernel<GroupedMmParams> simt_grouped_mm;
extern const Kernel<GroupedMmWgradParams> simt_wgrad;

// grouped_mm_few_rows.cu: operands begin at multiples of 16 bytes, k comes in eights, and so do outputs where they are contiguous.
extern const Kernel<GroupedMmParams> few_rows_grouped_mm;
extern const Kernel<GroupedUpParams> few_rows_grouped_up;  // stride_n = 2 with stride_k != 1: gate and up in turns

// Null in a build without sm_90a, where no rule chooses them.
#if defined(MOE_CUDA_SM90)
#define MOE_SM90_KERNEL MOE_DECLARE_KERNEL
#else
#define MOE_SM90_KERNEL MOE_NO_KERNEL
#endif
// grouped_gemm_sm90.cu, by CUTLASS
MOE_SM90_KERNEL(sm90_grouped_mm_cooperative, GroupedMmParams)
MOE_SM90_KERNEL(sm90_grouped_mm_pingpong, GroupedMmParams)
MOE_SM90_KERNEL(sm90_wgrad_cooperative, GroupedMmWgradParams)  // of rows in place
// grouped_mm_wgrad_gather_sm90.cu
MOE_SM90_KERNEL(sm90_wgrad_gather, GroupedMmWgradParams)
// grouped_up_sm90.cu, grouped_down_backward_sm90.cu: lists are still the host's, tensor maps are made from them
MOE_SM90_KERNEL(sm90_up_cooperative, GroupedUpParams)
MOE_SM90_KERNEL(sm90_up_pingpong, GroupedUpParams)
MOE_SM90_KERNEL(sm90_down_backward, GroupedDownBackwardParams)
#undef MOE_SM90_KERNEL

// 0 for none.
template <class Params>
int64_t workspace_bytes(const Kernel<Params>* kernel, const Params& p) {
  return kernel && kernel->workspace ? kernel->workspace(p, 1) : 0;
}

}  // namespace moe::cuda
