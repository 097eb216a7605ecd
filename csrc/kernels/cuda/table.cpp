// The CUDA kernel table. A kernel left out here does not exist yet: sort_by_expert, grouped_mm, grouped_mm_wgrad and
// grouped_bias_grad, and with them grouped_forward, answer with a sentence that says so.
#include "kernels.h"

namespace moe::cuda {

const KernelTable& table() {
  static const KernelTable t = [] {
    KernelTable table;
    table.device = "CUDA";
    table.variant = MOE_CUDA_ARCHS;
    table.dtypes = "float64, float32, bfloat16, float16";
    table.permute = permute;
    table.unpermute = unpermute;
    table.unpermute_backward = unpermute_backward;
    table.gated_activation = gated_activation;
    table.gated_activation_backward = gated_activation_backward;
    return table;
  }();
  return t;
}

}  // namespace moe::cuda
