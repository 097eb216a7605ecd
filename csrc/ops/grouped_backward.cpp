// Backward of the whole expert layer. With g = d loss / d out gathered to rows, w the row's routing weight, a the recomputed activation:
//   da = g W_down        dpre = w da act'(pre)     dx = sum_k dpre W_up
//   dW_down = g^T (w a)  dW_up = dpre^T x          dw = <da, a> + <g, b_down>
// dw needs neither the down projection's output nor a division by a gate or weight that may be zero. Only what is needed is computed.
#include "layer.h"

namespace moe::ops {
namespace {

// What the training forward saved.
struct Saved {
  const OptionalTensor& hidden_states;  // when dW of the up projection is needed, or the pre-activation was not kept
  const Tensor& top_k_weights;
  const OptionalTensor& pre_act;
  const Tensor& expert_offsets;
  const Tensor& row_to_slot;
  const Tensor& slot_to_row;
};

void check_saved(Layer& l, const Tensor& grad, const Saved& s, int64_t needs) {
  check_hidden(l, grad);
  check(s.top_k_weights.dim() == 2 && s.top_k_weights.size(0) == l.T, l.op, "top_k_weights has shape ", shape(s.top_k_weights),
        ", expected [T=", l.T, ", K]");
  float_dtype(l.op, s.top_k_weights, "top_k_weights");
  check_device(l.op, s.top_k_weights, "top_k_weights", grad, "grad");
  l.K = s.top_k_weights.size(1);
  l.S = l.T * l.K;
  check(l.K >= 1, l.op, "top_k_weights has shape ", shape(s.top_k_weights), ", expected K >= 1");
  check_slots(l.op, l.S);
  if (s.pre_act) {
    check_shape(l.op, *s.pre_act, "pre_act", {l.S, l.pre_width()});
    check_like(l.op, *s.pre_act, "pre_act", grad, "grad");
  }
  check_int32(l.op, s.expert_offsets, "expert_offsets", l.E + 1, grad);
  check_int32(l.op, s.row_to_slot, "row_to_slot", l.S, grad);
  check_int32(l.op, s.slot_to_row, "slot_to_row", l.S, grad);
  check_offsets(l.op, s.expert_offsets, l.S);
  check_map(l.op, s.row_to_slot, "row_to_slot", l.S, &s.expert_offsets);
  check_map(l.op, s.slot_to_row, "slot_to_row", l.S);
  if (needs & (kGateUp | kUp) || !s.pre_act) {
    check(s.hidden_states.has_value(), l.op, "hidden_states is needed ",
          s.pre_act ? "for the gradient of the up projection" : "to form the pre-activation again");
    check_shape(l.op, *s.hidden_states, "hidden_states", {l.T, l.H});
    check_like(l.op, *s.hidden_states, "hidden_states", grad, "grad");
  }
}

// dW of one projection, in the layout of its weights: [out, in], or [in, out] when transposed.
void append_wgrad(const Layer& l, const Rows& out_side, int64_t out_size, const Rows& in_side, int64_t in_size,
                  const Tensor& expert_offsets, const Tensor& like, TensorList& results) {
  Outputs dw(like, l.E, l.transposed ? in_size : out_size, l.transposed ? out_size : in_size, l.listed);
  GroupedMmWgradParams p;
  p.dtype = l.dtype;
  p.a = l.transposed ? in_side : out_side;
  p.b = l.transposed ? out_side : in_side;
  p.M = l.transposed ? in_size : out_size;
  p.N = l.transposed ? out_size : in_size;
  p.expert_offsets = int32_ptr(expert_offsets);
  p.S = l.S;
  p.E = l.E;
  p.out = dw.table;
  run(l.op, kernel_table().grouped_mm_wgrad, p, like, name(l.dtype));
  results.insert(results.end(), dw.tensors.begin(), dw.tensors.end());
}

void append_bias_grad(const Layer& l, const Rows& g, int64_t size, const Tensor* weights, const Saved& s, const Tensor& like,
                      TensorList& results) {
  GroupedBiasGradParams p;
  p.dtype = l.dtype;
  p.g = g;
  p.slot_weights = weights ? weights->data_ptr() : nullptr;
  p.row_to_slot = int32_ptr(s.row_to_slot);
  p.expert_offsets = int32_ptr(s.expert_offsets);
  p.S = l.S;
  p.E = l.E;
  p.N = size;
  Outputs db(like, l.E, 1, size, l.listed);
  p.out = db.table;
  run(l.op, kernel_table().grouped_bias_grad, p, like, name(l.dtype));
  for (const Tensor& t : db.tensors) {
    const int64_t flat[] = {l.E, size};
    results.push_back(torch::stable::view(t, torch::headeronly::IntHeaderOnlyArrayRef(l.listed ? flat + 1 : flat, l.listed ? 1 : 2)));
  }
}

TensorList backward(Layer& l, const Tensor& grad_in, const Saved& s, int64_t needs) {
  check_saved(l, grad_in, s, needs);
  const KernelTable& kernels = kernel_table();
  const ScalarType type = grad_in.scalar_type();
  const char* detail = name(l.dtype);
  const bool needs_pre = needs & (kHiddenStates | kGateUp | kUp | kGateUpBias | kUpBias);
  const Tensor grad = row_major(grad_in);
  std::optional<Tensor> x;
  if (s.hidden_states) x = row_major(*s.hidden_states);
  const Tensor pre_act = s.pre_act ? as_contiguous(*s.pre_act) : pre_activation(l, *x, s.expert_offsets, s.row_to_slot);
  const Tensor weights = slot_weights(s.top_k_weights, l.dtype);
  const Rows g = gathered(grad, s.row_to_slot, l.K);

  // Gradient of the activation output, then through the activation.
  OptionalTensor grad_act, grad_pre, scaled, grad_weights;
  GatedActivationBackwardParams a;
  a.dtype = l.dtype;
  a.activation = l.activation;
  a.pre_act = pre_act.data_ptr();
  a.expert_offsets = int32_ptr(s.expert_offsets);
  a.row_to_slot = int32_ptr(s.row_to_slot);
  a.slot_weights = weights.data_ptr();
  a.S = l.S;
  a.I = l.I;
  a.E = l.E;
  a.H = l.H;
  if (needs_pre) {
    grad_pre = empty(grad, {l.S, l.pre_width()}, type);
    a.grad_pre = grad_pre->data_ptr();
  }
  if (needs & kDown) {
    scaled = empty(grad, {l.S, l.I}, type);
    a.scaled = scaled->data_ptr();
  }
  if (needs & kTopKWeights) {
    grad_weights = zeros(weights, {l.T, l.K}, weights.scalar_type());
    a.grad_slot_weights = grad_weights->data_ptr();
    a.grad_out = g;
    a.down_bias = l.down->bias.table;
  }
  const bool needs_grad = needs_pre || (needs & kTopKWeights);
  const GroupedDownBackwardParams fused = {a, g, l.down->weight.swapped()};
  if (needs_grad && is_supported(kernels.grouped_down_backward, fused)) {
    run(l.op, kernels.grouped_down_backward, fused, grad, detail);
  } else {
    if (needs_grad) {
      grad_act = empty(grad, {l.S, l.I}, type);
      GroupedMmParams p = mm_params(l, s.expert_offsets);
      p.x = g;
      p.weight = fused.down_proj;
      p.N = l.I;
      p.K = l.H;
      p.out = grad_act->data_ptr();
      p.out_stride = l.I;
      run(l.op, kernels.grouped_mm, p, grad, detail);
      a.grad = grad_act->data_ptr();
    }
    if (a.grad || a.scaled) run(l.op, kernels.gated_activation_backward, a, grad, detail);
  }

  TensorList results;
  if (needs & kHiddenStates) {
    Tensor dx_rows = empty(grad, {l.S, l.H}, type);
    GroupedMmParams p = mm_params(l, s.expert_offsets);
    p.N = l.H;
    p.out = dx_rows.data_ptr();
    p.out_stride = l.H;
    for (const Projection& part : l.up) {
      p.x = {column(*grad_pre, part.column), l.pre_width(), nullptr, 1};
      p.weight = part.weight.swapped();
      p.K = part.weight.N;
      run(l.op, kernels.grouped_mm, p, grad, detail);
      p.accumulate = true;
    }
    results.push_back(unpermute(dx_rows, s.row_to_slot, s.slot_to_row, l.K, std::nullopt));
  }
  if (needs & kTopKWeights) {
    const bool same = grad_weights->scalar_type() == s.top_k_weights.scalar_type();
    results.push_back(same ? *grad_weights : as_dtype(*grad_weights, s.top_k_weights.scalar_type()));
  }
  // One projection (stacked, or ungated list) or two (gate, up): their bits in the order of the results.
  const int64_t weight_bits[] = {kGateUp, kUp}, bias_bits[] = {kGateUpBias, kUpBias};
  const size_t first = l.listed && l.up.size() == 1 ? 1 : 0;  // an ungated list has only up_proj
  for (size_t i = 0; i < l.up.size(); ++i) {
    if (!(needs & weight_bits[first + i])) continue;
    const Rows dpre = {column(*grad_pre, l.up[i].column), l.pre_width(), nullptr, 1};
    append_wgrad(l, dpre, l.up[i].weight.N, gathered(*x, s.row_to_slot, l.K), l.H, s.expert_offsets, grad, results);
  }
  if (needs & kDown) append_wgrad(l, g, l.H, rows(*scaled), l.I, s.expert_offsets, grad, results);
  for (size_t i = 0; i < l.up.size(); ++i) {
    if (!(needs & bias_bits[first + i])) continue;
    const Rows dpre = {column(*grad_pre, l.up[i].column), l.pre_width(), nullptr, 1};
    append_bias_grad(l, dpre, l.up[i].weight.N, nullptr, s, grad, results);
  }
  if (needs & kDownBias) append_bias_grad(l, g, l.H, &weights, s, grad, results);
  return results;
}

}  // namespace

TensorList grouped_backward(const Tensor& grad, const OptionalTensor& hidden_states, const Tensor& top_k_weights,
                            const OptionalTensor& pre_act, const Tensor& expert_offsets, const Tensor& row_to_slot,
                            const Tensor& slot_to_row, const Tensor& gate_up_proj, const Tensor& down_proj,
                            const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const std::string& activation, bool gated,
                            bool transposed, bool interleaved, const OptionalDouble& alpha, const OptionalDouble& limit, int64_t needs) {
  constexpr const char* op = "grouped_backward";
  const Activation a = parse_activation(op, activation, gated, interleaved, alpha, limit);
  check(grad.dim() == 2, op, "grad has shape ", shape(grad), ", expected [T, H]");
  Layer l = stacked_layer(op, grad, gate_up_proj, down_proj, gate_up_bias, down_bias, a, transposed, grad.size(1));
  return backward(l, grad, {hidden_states, top_k_weights, pre_act, expert_offsets, row_to_slot, slot_to_row}, needs);
}

TensorList grouped_backward_list(const Tensor& grad, const OptionalTensor& hidden_states, const Tensor& top_k_weights,
                                 const OptionalTensor& pre_act, const Tensor& expert_offsets, const Tensor& row_to_slot,
                                 const Tensor& slot_to_row, const TensorList& gate_proj, const TensorList& up_proj,
                                 const TensorList& down_proj, const OptionalTensorList& gate_bias, const OptionalTensorList& up_bias,
                                 const OptionalTensorList& down_bias, const std::string& activation, bool gated,
                                 const OptionalDouble& alpha, const OptionalDouble& limit, int64_t needs) {
  constexpr const char* op = "grouped_backward";
  const Activation a = parse_activation(op, activation, gated, false, alpha, limit);
  check(grad.dim() == 2, op, "grad has shape ", shape(grad), ", expected [T, H]");
  Layer l = list_layer(op, grad, gate_proj, up_proj, down_proj, gate_bias, up_bias, down_bias, a, grad.size(1));
  return backward(l, grad, {hidden_states, top_k_weights, pre_act, expert_offsets, row_to_slot, slot_to_row}, needs);
}

}  // namespace moe::ops
