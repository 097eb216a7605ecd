// The CUDA kernel table.
#include "kernels.h"

namespace moe::cuda {

const KernelTable& table() {
  // Function-local, so that no order of static initialisation across files matters.
  static const KernelTable all = {"CUDA", MOE_CUDA_ARCHS, "float64, float32, bfloat16, float16", MOE_KERNELS(MOE_KERNEL_NAME)};
  return all;
}

}  // namespace moe::cuda
