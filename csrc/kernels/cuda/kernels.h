// What each CUDA kernel file provides; table.cpp collects them. No CUDA header is needed here.
#pragma once
#include "../kernel_table.h"

namespace moe::cuda {

MOE_KERNELS(MOE_DECLARE_KERNEL)

// Kernels of this library for any device of the architectures it was built for.
const KernelTable& table();

}  // namespace moe::cuda
