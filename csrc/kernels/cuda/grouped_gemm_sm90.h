// The grouped GEMMs of sm_90a as grouped_mm.cu and grouped_mm_wgrad.cu call them; grouped_gemm_sm90.cu.
#pragma once
#include "grouped_gemm.h"
#include "grouped_mm_config.h"

namespace moe::cuda {

#if defined(MOE_CUDA_SM90)
int64_t sm90_workspace_bytes(const GroupedMmParams& p);
int64_t sm90_workspace_bytes(const GroupedMmWgradParams& p);
Status sm90_grouped_mm(GemmKernel kernel, const GroupedMmParams& p, void* workspace, const Launch& launch);
Status sm90_wgrad(const GroupedMmWgradParams& p, void* workspace, const Launch& launch);
int64_t sm90_wgrad_gather_bytes(const GroupedMmWgradParams& p);  // grouped_mm_wgrad_gather_sm90.cu
Status sm90_wgrad_gather(const GroupedMmWgradParams& p, void* workspace, const Launch& launch);
#else  // built without sm_90a: the table never chooses these
inline int64_t sm90_workspace_bytes(const GroupedMmParams&) { return 0; }
inline int64_t sm90_workspace_bytes(const GroupedMmWgradParams&) { return 0; }
inline Status sm90_grouped_mm(GemmKernel, const GroupedMmParams&, void*, const Launch&) { return Status::kLaunchFailed; }
inline Status sm90_wgrad(const GroupedMmWgradParams&, void*, const Launch&) { return Status::kLaunchFailed; }
inline int64_t sm90_wgrad_gather_bytes(const GroupedMmWgradParams&) { return 0; }
inline Status sm90_wgrad_gather(const GroupedMmWgradParams&, void*, const Launch&) { return Status::kLaunchFailed; }
#endif

}  // namespace moe::cuda
