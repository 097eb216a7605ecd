// What each CPU kernel file provides. The files are compiled once per instruction set, with MOE_ISA naming the set and its
// namespace; table.cpp collects one KernelTable per set and picks among them.
#pragma once
#include "../kernel_table.h"

#define MOE_DECLARE_CPU_KERNELS(isa)                                            \
  namespace moe::cpu::isa {                                                     \
  extern const Kernel<SortParams> sort_by_expert;                               \
  extern const Kernel<PermuteParams> permute;                                   \
  extern const Kernel<UnpermuteParams> unpermute;                               \
  extern const Kernel<UnpermuteBackwardParams> unpermute_backward;              \
  extern const Kernel<GroupedMmParams> grouped_mm;                              \
  extern const Kernel<GroupedMmWgradParams> grouped_mm_wgrad;                   \
  extern const Kernel<GroupedBiasGradParams> grouped_bias_grad;                 \
  extern const Kernel<GatedActivationParams> gated_activation;                  \
  extern const Kernel<GatedActivationBackwardParams> gated_activation_backward; \
  }

#if defined(MOE_ISA)
MOE_DECLARE_CPU_KERNELS(MOE_ISA)
#endif
