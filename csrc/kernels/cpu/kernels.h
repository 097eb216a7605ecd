// What each CPU kernel file provides. The files are compiled once per instruction set, with MOE_ISA naming the set and its
// namespace; table.cpp collects one KernelTable per set and picks among them.
#pragma once
#include "../kernel_table.h"

// The CPU has a file for each step and no fused kernel.
#define MOE_DECLARE_CPU_KERNELS(isa)   \
  namespace moe::cpu::isa {            \
  MOE_STEP_KERNELS(MOE_DECLARE_KERNEL) \
  MOE_FUSED_KERNELS(MOE_NO_KERNEL)     \
  }

#if defined(MOE_ISA)
MOE_DECLARE_CPU_KERNELS(MOE_ISA)
#endif
