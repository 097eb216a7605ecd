// The CUDA kernel table.
#include "kernels.h"

namespace moe::cuda {

const KernelTable& table() {
  static const KernelTable t = [] {
    KernelTable table;
    table.device = "CUDA";
    table.variant = MOE_CUDA_ARCHS;
    table.dtypes = "float64, float32, bfloat16, float16";
    table.sort_by_expert = sort_by_expert;
    table.permute = permute;
    table.grouped_mm = grouped_mm;
    table.grouped_mm_wgrad = grouped_mm_wgrad;
    table.grouped_bias_grad = grouped_bias_grad;
    table.unpermute = unpermute;
    table.unpermute_backward = unpermute_backward;
    table.gated_activation = gated_activation;
    table.gated_activation_backward = gated_activation_backward;
    table.grouped_down_backward = grouped_down_backward;
    table.grouped_up = grouped_up;
    return table;
  }();
  return t;
}

}  // namespace moe::cuda
