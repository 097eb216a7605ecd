// One function per op, for every device: check the tensors, allocate the results, fill a parameter struct, launch.
// The same sources are compiled into each op library; device.h is what differs between them.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace moe::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;
using OptionalTensorList = std::optional<TensorList>;
using OptionalDouble = std::optional<double>;

// Bits of the `needs` argument of the backward ops: which gradients to compute. Results come in this order.
enum Needs : int64_t {
  kHiddenStates = 1,
  kTopKWeights = 2,
  kGateUp = 4,  // stacked gate_up_proj, or gate_proj of a list
  kUp = 8,      // list only
  kDown = 16,
  kGateUpBias = 32,  // stacked gate_up_bias, or gate_bias of a list
  kUpBias = 64,      // list only
  kDownBias = 128,
};

// Schemas and shapes: registration/schemas.cpp.
std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& top_k_index, int64_t num_experts);
Tensor permute(const Tensor& x, const Tensor& row_to_slot, const Tensor& slot_to_row, int64_t top_k);
Tensor unpermute(const Tensor& rows, const Tensor& row_to_slot, const Tensor& slot_to_row, int64_t top_k,
                 const OptionalTensor& top_k_weights);
std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad, const Tensor& rows, const Tensor& row_to_slot,
                                              const Tensor& top_k_weights);
Tensor grouped_mm(const Tensor& x, const Tensor& weight, const Tensor& expert_offsets, const OptionalTensor& bias, bool transposed);
Tensor grouped_mm_list(const Tensor& x, const TensorList& weight, const Tensor& expert_offsets, const OptionalTensorList& bias,
                       bool transposed);
Tensor grouped_mm_wgrad(const Tensor& a, const Tensor& b, const Tensor& expert_offsets);
TensorList grouped_mm_wgrad_list(const Tensor& a, const Tensor& b, const Tensor& expert_offsets);
Tensor grouped_bias_grad(const Tensor& grad, const Tensor& expert_offsets);
Tensor gated_activation(const Tensor& pre_act, const std::string& activation, bool gated, bool interleaved, const OptionalDouble& alpha,
                        const OptionalDouble& limit);
Tensor gated_activation_backward(const Tensor& grad, const Tensor& pre_act, const std::string& activation, bool gated, bool interleaved,
                                 const OptionalDouble& alpha, const OptionalDouble& limit);

using TrainResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // out, pre_act, expert_offsets, row_to_slot, slot_to_row

Tensor grouped_forward(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights, const Tensor& gate_up_proj,
                       const Tensor& down_proj, const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
                       const std::string& activation, bool gated, bool transposed, bool interleaved, const OptionalDouble& alpha,
                       const OptionalDouble& limit, bool recompute);
TrainResult grouped_forward_train(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights,
                                  const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
                                  const OptionalTensor& down_bias, const std::string& activation, bool gated, bool transposed,
                                  bool interleaved, const OptionalDouble& alpha, const OptionalDouble& limit, bool recompute);
TensorList grouped_backward(const Tensor& grad, const OptionalTensor& hidden_states, const Tensor& top_k_weights,
                            const OptionalTensor& pre_act, const Tensor& expert_offsets, const Tensor& row_to_slot,
                            const Tensor& slot_to_row, const Tensor& gate_up_proj, const Tensor& down_proj,
                            const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const std::string& activation, bool gated,
                            bool transposed, bool interleaved, const OptionalDouble& alpha, const OptionalDouble& limit, int64_t needs);

Tensor grouped_forward_list(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights,
                            const TensorList& gate_proj, const TensorList& up_proj, const TensorList& down_proj,
                            const OptionalTensorList& gate_bias, const OptionalTensorList& up_bias, const OptionalTensorList& down_bias,
                            const std::string& activation, bool gated, const OptionalDouble& alpha, const OptionalDouble& limit,
                            bool recompute);
TrainResult grouped_forward_train_list(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights,
                                       const TensorList& gate_proj, const TensorList& up_proj, const TensorList& down_proj,
                                       const OptionalTensorList& gate_bias, const OptionalTensorList& up_bias,
                                       const OptionalTensorList& down_bias, const std::string& activation, bool gated,
                                       const OptionalDouble& alpha, const OptionalDouble& limit, bool recompute);
TensorList grouped_backward_list(const Tensor& grad, const OptionalTensor& hidden_states, const Tensor& top_k_weights,
                                 const OptionalTensor& pre_act, const Tensor& expert_offsets, const Tensor& row_to_slot,
                                 const Tensor& slot_to_row, const TensorList& gate_proj, const TensorList& up_proj,
                                 const TensorList& down_proj, const OptionalTensorList& gate_bias, const OptionalTensorList& up_bias,
                                 const OptionalTensorList& down_bias, const std::string& activation, bool gated,
                                 const OptionalDouble& alpha, const OptionalDouble& limit, int64_t needs);

}  // namespace moe::ops
