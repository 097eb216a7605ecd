// What the forward and the backward of the whole expert layer share: its checked tensors, and the up projection.
#pragma once
#include "launch.h"

namespace moe::ops {

// Stacked weights are one projection of 2I outputs; a list has gate and up apart, each writing its half of the columns.
struct Projection {
  Weights weight;
  Biases bias;
  int64_t column = 0;
};

struct Layer {
  const char* op;
  DType dtype;
  Activation activation;
  int64_t T = 0, K = 0, S = 0, E = 0, H = 0, I = 0;
  bool transposed = false, listed = false;
  std::vector<Projection> up;
  std::optional<Projection> down;

  int64_t pre_width() const { return activation.gated ? 2 * I : I; }
};

// Check everything but the tokens; `like` gives dtype and device.
Layer stacked_layer(const char* op, const Tensor& like, const Tensor& gate_up_proj, const Tensor& down_proj,
                    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const Activation& activation, bool transposed,
                    int64_t H);
Layer list_layer(const char* op, const Tensor& like, const TensorList& gate_proj, const TensorList& up_proj, const TensorList& down_proj,
                 const OptionalTensorList& gate_bias, const OptionalTensorList& up_bias, const OptionalTensorList& down_bias,
                 const Activation& activation, int64_t H);

// Checks, and sets dtype, T and H; T tokens of any [T, H].
void check_hidden(Layer& l, const Tensor& hidden_states);

GroupedMmParams mm_params(const Layer& l, const Tensor& expert_offsets);

// Of a gated layer, for the kernel that computes the up projection and the activation in one; the results are the caller's to set.
GroupedUpParams up_params(const Layer& l, const Rows& x, const Tensor& expert_offsets);

// The pre-activation [S, 2I] (or [S, I]) of x [T, H], rows gathered from token order, by the steps.
Tensor up_projection(const Layer& l, const Tensor& x, const Tensor& expert_offsets, const Tensor& row_to_slot);

// The same by the kernel that the training forward takes: a step would first copy the rows where its kernel gathers none.
Tensor pre_activation(const Layer& l, const Tensor& x, const Tensor& expert_offsets, const Tensor& row_to_slot);

inline void* column(const Tensor& t, int64_t c) { return static_cast<char*>(t.data_ptr()) + c * t.element_size(); }

}  // namespace moe::ops
