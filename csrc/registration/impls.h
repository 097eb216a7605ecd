// Registers every op of csrc/ops for one dispatch key. Included once by each library.
#pragma once
#include <torch/csrc/stable/library.h>

#include "../ops/ops.h"

namespace moe::ops {

// In the namespace `moe`.
inline void register_shared(torch::stable::detail::StableLibrary& m) {
  m.impl("grouped_forward", TORCH_BOX(&grouped_forward));
  m.impl("grouped_forward.list", TORCH_BOX(&grouped_forward_list));
}

// In `moe_ext`.
inline void register_own(torch::stable::detail::StableLibrary& m) {
  m.impl("sort_by_expert", TORCH_BOX(&sort_by_expert));
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("unpermute", TORCH_BOX(&unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&unpermute_backward));
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm));
  m.impl("grouped_mm.list", TORCH_BOX(&grouped_mm_list));
  m.impl("grouped_mm_wgrad", TORCH_BOX(&grouped_mm_wgrad));
  m.impl("grouped_mm_wgrad.list", TORCH_BOX(&grouped_mm_wgrad_list));
  m.impl("grouped_bias_grad", TORCH_BOX(&grouped_bias_grad));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward));
  m.impl("_grouped_forward_train", TORCH_BOX(&grouped_forward_train));
  m.impl("_grouped_forward_train.list", TORCH_BOX(&grouped_forward_train_list));
  m.impl("_grouped_backward", TORCH_BOX(&grouped_backward));
  m.impl("_grouped_backward.list", TORCH_BOX(&grouped_backward_list));
}

}  // namespace moe::ops
