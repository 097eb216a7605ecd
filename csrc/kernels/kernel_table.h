// The kernels of one device, as data. A null launch is the statement "this device has no such kernel".
#pragma once
#include "params.h"

// The list of kernels, F(name, Params) for each; every other list of kernels is made from it. First the steps, which every device has.
#define MOE_STEP_KERNELS(F)                      \
  F(sort_by_expert, SortParams)                  \
  F(permute, PermuteParams)                      \
  F(unpermute, UnpermuteParams)                  \
  F(unpermute_backward, UnpermuteBackwardParams) \
  F(grouped_mm, GroupedMmParams)                 \
  F(grouped_mm_wgrad, GroupedMmWgradParams)      \
  F(grouped_bias_grad, GroupedBiasGradParams)    \
  F(gated_activation, GatedActivationParams)     \
  F(gated_activation_backward, GatedActivationBackwardParams)

// Several steps in one, for speed alone: where a device has none, or it does not support the parameters, the ops run the steps.
#define MOE_FUSED_KERNELS(F)     \
  F(grouped_up, GroupedUpParams) \
  F(grouped_down_backward, GroupedDownBackwardParams)

#define MOE_KERNELS(F) MOE_STEP_KERNELS(F) MOE_FUSED_KERNELS(F)

// What a device says of a kernel in its namespace: a file defines it, or there is none.
#define MOE_DECLARE_KERNEL(name, Params) extern const Kernel<Params> name;
#define MOE_NO_KERNEL(name, Params) inline constexpr Kernel<Params> name{};
#define MOE_KERNEL_NAME(name, Params) name,

namespace moe {

template <class Params>
struct Kernel {
  Status (*supports)(const Params&) = nullptr;                     // null = everything
  int64_t (*workspace)(const Params&, int num_threads) = nullptr;  // bytes; null = none
  Status (*launch)(const Params&, const Launch&) = nullptr;
};

#define MOE_KERNEL_FIELD(name, Params) Kernel<Params> name;
struct KernelTable {
  const char* device = "";   // "cpu", "CUDA"
  const char* variant = "";  // which build of the kernels runs: instruction set or list of architectures
  const char* dtypes = "";   // for messages
  MOE_KERNELS(MOE_KERNEL_FIELD)
};
#undef MOE_KERNEL_FIELD

}  // namespace moe
