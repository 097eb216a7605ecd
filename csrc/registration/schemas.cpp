// Every schema of the project, on one page. T tokens, K top_k, E experts, H hidden size, I intermediate size, S = T*K slots.
//
// Rules: tensors are positional (Python's register_autograd refuses keyword-only ones); optional lists are `[]?=None`, never an
// empty default, and no dtype travels as ScalarType (both break AOTInductor); results have shapes that do not depend on data.
//
// Others register ops in the namespace `moe` too, of any name but grouped_forward: only that is there.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(moe, m) {
  // recompute: training keeps hidden_states and the routing only; its backward forms the pre-activation again.
  // hidden_states [T,H], top_k_index [T,K] int, top_k_weights [T,K]; gate_up_proj [E,2I,H] (ungated [E,I,H]) and down_proj [E,H,I],
  // or with transposed=True [E,H,2I] and [E,I,H]; biases [E,2I], [E,H]. -> [T,H]
  m.def(
      "grouped_forward(Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, "
      "Tensor? gate_up_bias=None, Tensor? down_bias=None, *, str activation=\"silu\", bool gated=True, bool transposed=False, "
      "bool interleaved=False, float? alpha=None, float? limit=None, bool recompute=False) -> Tensor");
  // The same over E matrices each: gate_proj [I,H] (empty when ungated), up_proj [I,H], down_proj [H,I]; no stacking, no copy.
  m.def(
      "grouped_forward.list(Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor[] gate_proj, Tensor[] up_proj, "
      "Tensor[] down_proj, Tensor[]? gate_bias=None, Tensor[]? up_bias=None, Tensor[]? down_bias=None, *, str activation=\"silu\", "
      "bool gated=True, float? alpha=None, float? limit=None, bool recompute=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_FRAGMENT(moe_ext, m) {
  // Primitives.
  m.def("sort_by_expert(Tensor top_k_index, int num_experts) -> (Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row)");
  m.def("permute(Tensor x, Tensor row_to_slot, Tensor slot_to_row, int top_k) -> Tensor");
  m.def("unpermute(Tensor rows, Tensor row_to_slot, Tensor slot_to_row, int top_k, Tensor? top_k_weights=None) -> Tensor");
  m.def(
      "unpermute_backward(Tensor grad, Tensor rows, Tensor row_to_slot, Tensor top_k_weights) -> (Tensor grad_rows, Tensor grad_weights)");
  m.def("grouped_mm(Tensor x, Tensor weight, Tensor expert_offsets, Tensor? bias=None, *, bool transposed=False) -> Tensor");
  m.def("grouped_mm.list(Tensor x, Tensor[] weight, Tensor expert_offsets, Tensor[]? bias=None, *, bool transposed=False) -> Tensor");
  m.def("grouped_mm_wgrad(Tensor a, Tensor b, Tensor expert_offsets) -> Tensor");
  m.def("grouped_mm_wgrad.list(Tensor a, Tensor b, Tensor expert_offsets) -> Tensor[]");
  m.def("grouped_bias_grad(Tensor grad, Tensor expert_offsets) -> Tensor");
  m.def(
      "gated_activation(Tensor pre_act, *, str activation=\"silu\", bool gated=True, bool interleaved=False, float? alpha=None, "
      "float? limit=None) -> Tensor");
  m.def(
      "gated_activation_backward(Tensor grad, Tensor pre_act, *, str activation=\"silu\", bool gated=True, bool interleaved=False, "
      "float? alpha=None, float? limit=None) -> Tensor");

  // Internal: training. `needs` is a mask of ops.h's Needs; the results are exactly the needed gradients, in that order.
  m.def(
      "_grouped_forward_train(Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, "
      "Tensor? gate_up_bias=None, Tensor? down_bias=None, *, str activation=\"silu\", bool gated=True, bool transposed=False, "
      "bool interleaved=False, float? alpha=None, float? limit=None, bool recompute=False) "
      "-> (Tensor out, Tensor pre_act, Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row)");
  m.def(
      "_grouped_forward_train.list(Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor[] gate_proj, Tensor[] up_proj, "
      "Tensor[] down_proj, Tensor[]? gate_bias=None, Tensor[]? up_bias=None, Tensor[]? down_bias=None, *, str activation=\"silu\", "
      "bool gated=True, float? alpha=None, float? limit=None, bool recompute=False) "
      "-> (Tensor out, Tensor pre_act, Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row)");
  m.def(
      "_grouped_backward(Tensor grad, Tensor? hidden_states, Tensor top_k_weights, Tensor? pre_act, Tensor expert_offsets, "
      "Tensor row_to_slot, Tensor slot_to_row, Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, *, "
      "str activation, bool gated, bool transposed, bool interleaved, float? alpha, float? limit, int needs) -> Tensor[]");
  m.def(
      "_grouped_backward.list(Tensor grad, Tensor? hidden_states, Tensor top_k_weights, Tensor? pre_act, Tensor expert_offsets, "
      "Tensor row_to_slot, Tensor slot_to_row, Tensor[] gate_proj, Tensor[] up_proj, Tensor[] down_proj, Tensor[]? gate_bias, "
      "Tensor[]? up_bias, Tensor[]? down_bias, *, str activation, bool gated, float? alpha, float? limit, int needs) -> Tensor[]");
}
