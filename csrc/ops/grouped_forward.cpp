// The whole expert layer: sort -> up projection (rows gathered from token order) -> activation -> down projection -> weighted
// gather-sum. The same kernels in the same order as the composed path, so the two agree bit for bit; up projection and activation
// are one kernel where the device has it.
//   out[t] = sum_k w[t,k] * (act(x[t] W_gate_e^T, x[t] W_up_e^T) W_down_e^T + b_down_e),  e = top_k_index[t,k]
#include "layer.h"

namespace moe::ops {
namespace {

void check_routing(Layer& l, const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights) {
  check(top_k_index.dim() == 2 && top_k_index.size(0) == l.T && top_k_index.size(1) >= 1, l.op, "top_k_index has shape ",
        shape(top_k_index), ", expected [T=", l.T, ", K] with K >= 1");
  l.K = top_k_index.size(1);
  l.S = l.T * l.K;
  check_shape(l.op, top_k_weights, "top_k_weights", {l.T, l.K});
  check_device(l.op, top_k_index, "top_k_index", hidden_states, "hidden_states");
  check_device(l.op, top_k_weights, "top_k_weights", hidden_states, "hidden_states");
  float_dtype(l.op, top_k_weights, "top_k_weights");
  check_slots(l.op, l.S);
}

Tensor activated(const Layer& l, const Tensor& pre_act, const Tensor& expert_offsets) {
  Tensor act = empty(pre_act, {l.S, l.I}, pre_act.scalar_type());
  GatedActivationParams p;
  p.dtype = l.dtype;
  p.activation = l.activation;
  p.pre_act = pre_act.data_ptr();
  p.expert_offsets = int32_ptr(expert_offsets);
  p.S = l.S;
  p.I = l.I;
  p.E = l.E;
  p.out = act.data_ptr();
  run(l.op, kernel_table().gated_activation, p, pre_act, name(l.dtype));
  return act;
}

struct UpResult {
  Tensor pre_act, act;  // pre_act: [0, ...] unless it is kept
};

UpResult up(const Layer& l, const Tensor& x, const Tensor& expert_offsets, const Tensor& row_to_slot, bool keep) {
  const auto& fused = kernel_table().grouped_up;
  GroupedUpParams p = up_params(l, gathered(x, row_to_slot, l.K), expert_offsets);
  if (!l.activation.gated || !is_supported(fused, p)) {
    const Tensor pre_act = up_projection(l, x, expert_offsets, row_to_slot);
    const Tensor act = activated(l, pre_act, expert_offsets);
    return {keep ? pre_act : empty(x, {0, l.pre_width()}, x.scalar_type()), act};
  }
  UpResult result = {empty(x, {keep ? l.S : 0, l.pre_width()}, x.scalar_type()), empty(x, {l.S, l.I}, x.scalar_type())};
  p.pre_act = keep ? result.pre_act.data_ptr() : nullptr;
  p.out = result.act.data_ptr();
  run(l.op, fused, p, x, name(l.dtype));
  return result;
}

TrainResult forward(const Layer& l, const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights, bool keep) {
  const KernelTable& kernels = kernel_table();
  const ScalarType type = hidden_states.scalar_type();
  const char* detail = name(l.dtype);
  const Tensor x = row_major(hidden_states), weights = slot_weights(top_k_weights, l.dtype);
  auto [expert_offsets, row_to_slot, slot_to_row] = sort_by_expert(top_k_index, l.E);

  auto [pre_act, act] = up(l, x, expert_offsets, row_to_slot, keep);

  Tensor y = empty(x, {l.S, l.H}, type);
  GroupedMmParams down = mm_params(l, expert_offsets);
  down.x = rows(act);
  down.weight = l.down->weight.table;
  down.bias = l.down->bias.table;
  down.N = l.H;
  down.K = l.I;
  down.out = y.data_ptr();
  down.out_stride = l.H;
  run(l.op, kernels.grouped_mm, down, x, detail);

  Tensor out = empty(x, {l.T, l.H}, type);
  UnpermuteParams u;
  u.dtype = l.dtype;
  u.rows = y.data_ptr();
  u.slot_to_row = int32_ptr(slot_to_row);
  u.slot_weights = weights.data_ptr();
  u.T = l.T;
  u.K = l.K;
  u.H = l.H;
  u.out = out.data_ptr();
  run(l.op, kernels.unpermute, u, x, detail);
  return {out, pre_act, expert_offsets, row_to_slot, slot_to_row};
}

}  // namespace

TrainResult grouped_forward_train(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights,
                                  const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
                                  const OptionalTensor& down_bias, const std::string& activation, bool gated, bool transposed,
                                  bool interleaved, const OptionalDouble& alpha, const OptionalDouble& limit, bool recompute) {
  constexpr const char* op = "grouped_forward";
  const Activation a = parse_activation(op, activation, gated, interleaved, alpha, limit);
  check(hidden_states.dim() == 2, op, "hidden_states has shape ", shape(hidden_states), ", expected [T, H]");
  Layer l = stacked_layer(op, hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias, a, transposed, hidden_states.size(1));
  check_hidden(l, hidden_states);
  check_routing(l, hidden_states, top_k_index, top_k_weights);
  return forward(l, hidden_states, top_k_index, top_k_weights, !recompute);
}

Tensor grouped_forward(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights, const Tensor& gate_up_proj,
                       const Tensor& down_proj, const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
                       const std::string& activation, bool gated, bool transposed, bool interleaved, const OptionalDouble& alpha,
                       const OptionalDouble& limit, bool) {
  return std::get<0>(grouped_forward_train(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_bias, down_bias,
                                           activation, gated, transposed, interleaved, alpha, limit, true));
}

TrainResult grouped_forward_train_list(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights,
                                       const TensorList& gate_proj, const TensorList& up_proj, const TensorList& down_proj,
                                       const OptionalTensorList& gate_bias, const OptionalTensorList& up_bias,
                                       const OptionalTensorList& down_bias, const std::string& activation, bool gated,
                                       const OptionalDouble& alpha, const OptionalDouble& limit, bool recompute) {
  constexpr const char* op = "grouped_forward";
  const Activation a = parse_activation(op, activation, gated, false, alpha, limit);
  check(hidden_states.dim() == 2, op, "hidden_states has shape ", shape(hidden_states), ", expected [T, H]");
  Layer l = list_layer(op, hidden_states, gate_proj, up_proj, down_proj, gate_bias, up_bias, down_bias, a, hidden_states.size(1));
  check_hidden(l, hidden_states);
  check_routing(l, hidden_states, top_k_index, top_k_weights);
  return forward(l, hidden_states, top_k_index, top_k_weights, !recompute);
}

Tensor grouped_forward_list(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights,
                            const TensorList& gate_proj, const TensorList& up_proj, const TensorList& down_proj,
                            const OptionalTensorList& gate_bias, const OptionalTensorList& up_bias, const OptionalTensorList& down_bias,
                            const std::string& activation, bool gated, const OptionalDouble& alpha, const OptionalDouble& limit, bool) {
  return std::get<0>(grouped_forward_train_list(hidden_states, top_k_index, top_k_weights, gate_proj, up_proj, down_proj, gate_bias,
                                                up_bias, down_bias, activation, gated, alpha, limit, true));
}

}  // namespace moe::ops
