// grouped_down_backward for sm_90a as the dispatcher calls it; grouped_down_backward_sm90.cu.
#pragma once
#include "grouped_down_backward_config.h"

namespace moe::cuda {

#if defined(MOE_CUDA_SM90)
int64_t sm90_workspace_bytes(const GroupedDownBackwardParams& p);
Status sm90_down_backward(const GroupedDownBackwardParams& p, const Launch& launch);
#else  // built without sm_90a: the table never chooses it
inline int64_t sm90_workspace_bytes(const GroupedDownBackwardParams&) { return 0; }
inline Status sm90_down_backward(const GroupedDownBackwardParams&, const Launch&) { return Status::kLaunchFailed; }
#endif

}  // namespace moe::cuda
