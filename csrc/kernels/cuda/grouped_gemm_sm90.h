// Between the kernels of CUTLASS for sm_90a (grouped_mm_*_sm90.cu) and what prepares their arguments (grouped_gemm_sm90.cu).
#pragma once
#include "grouped_gemm.h"
#include "grouped_mm_config.h"

namespace moe::cuda {

// Device arrays of one grouped GEMM, one entry per expert.
struct GemmArrays {
  int experts = 0, multiprocessors = 0;
  void* shapes = nullptr;  // (m, n, k), 32 bits each
  void *a = nullptr, *b = nullptr, *d = nullptr, *ld_a = nullptr, *ld_b = nullptr, *ld_d = nullptr;
  void* tensor_maps = nullptr;  // kTensorMapBytesPerSm for every multiprocessor
};

using Sm90Launch = Status (*)(const GemmArrays& arrays, void* stream);

// The kernel for an element type, a tile and the layout of the weights.
Sm90Launch sm90_grouped_mm_bf16(GemmKernel kernel, bool n_major);
Sm90Launch sm90_grouped_mm_f16(GemmKernel kernel, bool n_major);
Sm90Launch sm90_wgrad(DType dtype);

#if defined(MOE_CUDA_SM90)
int64_t sm90_workspace_bytes(const GroupedMmParams& p);
int64_t sm90_workspace_bytes(const GroupedMmWgradParams& p);
Status sm90_grouped_mm(GemmKernel kernel, const GroupedMmParams& p, void* workspace, const Launch& launch);
Status sm90_wgrad(const GroupedMmWgradParams& p, void* workspace, const Launch& launch);
#else  // built without sm_90a: the table never chooses these
inline int64_t sm90_workspace_bytes(const GroupedMmParams&) { return 0; }
inline int64_t sm90_workspace_bytes(const GroupedMmWgradParams&) { return 0; }
inline Status sm90_grouped_mm(GemmKernel, const GroupedMmParams&, void*, const Launch&) { return Status::kLaunchFailed; }
inline Status sm90_wgrad(const GroupedMmWgradParams&, void*, const Launch&) { return Status::kLaunchFailed; }
#endif

}  // namespace moe::cuda
