// The kernels of one device, as data. A null launch is the statement "this device has no such kernel".
#pragma once
#include "params.h"

namespace moe {

template <class Params>
struct Kernel {
  Status (*supports)(const Params&) = nullptr;                     // null = everything
  int64_t (*workspace)(const Params&, int num_threads) = nullptr;  // bytes; null = none
  Status (*launch)(const Params&, const Launch&) = nullptr;
};

struct KernelTable {
  const char* device = "";   // "cpu", "cuda"
  const char* variant = "";  // which build of the kernels runs: instruction set or list of architectures
  const char* dtypes = "";   // for messages
  Kernel<SortParams> sort_by_expert;
  Kernel<PermuteParams> permute;
  Kernel<GroupedMmParams> grouped_mm;
  Kernel<GroupedMmWgradParams> grouped_mm_wgrad;
  Kernel<GroupedBiasGradParams> grouped_bias_grad;
  Kernel<GatedActivationParams> gated_activation;
  Kernel<GatedActivationBackwardParams> gated_activation_backward;
  Kernel<UnpermuteParams> unpermute;
  Kernel<UnpermuteBackwardParams> unpermute_backward;
  // Several steps in one, for speed alone: where there is none, or it does not support the parameters, the ops run the steps.
  Kernel<GroupedUpParams> grouped_up;
  Kernel<GroupedDownBackwardParams> grouped_down_backward;
};

}  // namespace moe
