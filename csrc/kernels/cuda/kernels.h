// What each CUDA kernel file provides; table.cpp collects them. No CUDA header is needed here.
#pragma once
#include "../kernel_table.h"

namespace moe::cuda {

extern const Kernel<SortParams> sort_by_expert;
extern const Kernel<PermuteParams> permute;
extern const Kernel<UnpermuteParams> unpermute;
extern const Kernel<UnpermuteBackwardParams> unpermute_backward;
extern const Kernel<GroupedMmParams> grouped_mm;
extern const Kernel<GroupedMmWgradParams> grouped_mm_wgrad;
extern const Kernel<GroupedBiasGradParams> grouped_bias_grad;
extern const Kernel<GatedActivationParams> gated_activation;
extern const Kernel<GatedActivationBackwardParams> gated_activation_backward;
extern const Kernel<GroupedDownBackwardParams> grouped_down_backward;
extern const Kernel<GroupedUpParams> grouped_up;

// Kernels of this library for any device of the architectures it was built for.
const KernelTable& table();

}  // namespace moe::cuda
