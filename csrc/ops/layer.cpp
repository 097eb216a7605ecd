// The checked tensors of an expert layer; every message names the tensor and its values.
#include "layer.h"

namespace moe::ops {
namespace {

void check_list(const char* op, const TensorList& list, const char* what, size_t E, std::initializer_list<int64_t> expected,
                const Tensor& like) {
  check(list.size() == E, op, what, " has ", list.size(), " entries for ", E, " experts");
  for (const Tensor& t : list) {
    check_shape(op, t, what, expected);
    check_like(op, t, what, like, "hidden_states");
  }
}

// The matrices of one half of a stack of [gate | up] or gate and up in turns.
template <class Table>
Table half(Table table, bool second, const Layer& l) {
  const int64_t skipped = second ? (l.activation.interleaved ? 1 : l.I) * table.stride_n : 0;
  if (table.base) table.base = static_cast<const char*>(table.base) + skipped * element_size(l.dtype);
  if (l.activation.interleaved) table.stride_n *= 2;
  return table;
}

}  // namespace

void check_hidden(Layer& l, const Tensor& hidden_states) {
  check(hidden_states.dim() == 2, l.op, "hidden_states has shape ", shape(hidden_states), ", expected [T, H]");
  l.dtype = float_dtype(l.op, hidden_states, "hidden_states");
  l.T = hidden_states.size(0);
  l.H = hidden_states.size(1);
}

Layer stacked_layer(const char* op, const Tensor& like, const Tensor& gate_up_proj, const Tensor& down_proj,
                    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const Activation& activation, bool transposed,
                    int64_t H) {
  Layer l;
  l.op = op;
  l.activation = activation;
  l.transposed = transposed;
  l.H = H;
  const char* layout = transposed ? " with transposed=True" : "";
  check(gate_up_proj.dim() == 3, op, "gate_up_proj has shape ", shape(gate_up_proj), ", expected ",
        transposed ? "[E, H, 2I]" : "[E, 2I, H]", layout);
  check(down_proj.dim() == 3, op, "down_proj has shape ", shape(down_proj), ", expected ", transposed ? "[E, I, H]" : "[E, H, I]", layout);
  Weights up(gate_up_proj, transposed), down(down_proj, transposed);
  check(up.E >= 1, op, "gate_up_proj has shape ", shape(gate_up_proj), ": there are no experts");
  check(up.K == H, op, "gate_up_proj has shape ", shape(gate_up_proj), layout, ": its experts take ", up.K,
        " inputs but hidden_states has H=", H);
  check(!activation.gated || up.N % 2 == 0, op, "gate_up_proj has shape ", shape(gate_up_proj), layout,
        ": gated=True needs 2I outputs, not ", up.N);
  l.E = up.E;
  l.I = activation.gated ? up.N / 2 : up.N;
  check(down.E == l.E && down.K == l.I && down.N == H, op, "down_proj has shape ", shape(down_proj), layout, ", expected ", l.E,
        " experts of ", l.I, " inputs and ", H, " outputs to fit gate_up_proj ", shape(gate_up_proj));
  check_like(op, gate_up_proj, "gate_up_proj", like, "hidden_states");
  check_like(op, down_proj, "down_proj", like, "hidden_states");
  if (gate_up_bias) {
    check_shape(op, *gate_up_bias, "gate_up_bias", {l.E, up.N});
    check_like(op, *gate_up_bias, "gate_up_bias", like, "hidden_states");
  }
  if (down_bias) {
    check_shape(op, *down_bias, "down_bias", {l.E, H});
    check_like(op, *down_bias, "down_bias", like, "hidden_states");
  }
  l.up.push_back({std::move(up), Biases(gate_up_bias), 0});
  l.down.emplace(Projection{std::move(down), Biases(down_bias), 0});
  return l;
}

Layer list_layer(const char* op, const Tensor& like, const TensorList& gate_proj, const TensorList& up_proj, const TensorList& down_proj,
                 const OptionalTensorList& gate_bias, const OptionalTensorList& up_bias, const OptionalTensorList& down_bias,
                 const Activation& activation, int64_t H) {
  Layer l;
  l.op = op;
  l.activation = activation;
  l.listed = true;
  l.H = H;
  check(!up_proj.empty(), op, "up_proj is empty: there are no experts");
  check(up_proj[0].dim() == 2, op, "up_proj[0] has shape ", shape(up_proj[0]), ", expected [I, H]");
  check(!activation.interleaved, op, "interleaved=True is a layout of stacked weights");
  const size_t E = up_proj.size();
  l.E = static_cast<int64_t>(E);
  l.I = up_proj[0].size(0);
  check_list(op, up_proj, "up_proj", E, {l.I, H}, like);
  check_list(op, gate_proj, "gate_proj", activation.gated ? E : 0, {l.I, H}, like);
  check_list(op, down_proj, "down_proj", E, {H, l.I}, like);
  if (gate_bias) check_list(op, *gate_bias, "gate_bias", activation.gated ? E : 0, {l.I}, like);
  if (up_bias) check_list(op, *up_bias, "up_bias", E, {l.I}, like);
  if (down_bias) check_list(op, *down_bias, "down_bias", E, {H}, like);
  if (activation.gated) l.up.push_back({Weights(gate_proj, false), Biases(gate_bias), 0});
  l.up.push_back({Weights(up_proj, false), Biases(up_bias), activation.gated ? l.I : 0});
  l.down.emplace(Projection{Weights(down_proj, false), Biases(down_bias), 0});
  return l;
}

GroupedMmParams mm_params(const Layer& l, const Tensor& expert_offsets) {
  GroupedMmParams p;
  p.dtype = l.dtype;
  p.expert_offsets = int32_ptr(expert_offsets);
  p.S = l.S;
  p.E = l.E;
  return p;
}

GroupedUpParams up_params(const Layer& l, const Rows& x, const Tensor& expert_offsets) {
  GroupedUpParams p;
  p.dtype = l.dtype;
  p.activation = l.activation;
  p.x = x;
  p.expert_offsets = int32_ptr(expert_offsets);
  p.S = l.S;
  p.E = l.E;
  p.H = l.H;
  p.I = l.I;
  const Projection &gate = l.up.front(), &up = l.up.back();
  p.gate_proj = l.listed ? gate.weight.table : half(gate.weight.table, false, l);
  p.up_proj = l.listed ? up.weight.table : half(up.weight.table, true, l);
  p.gate_bias = l.listed ? gate.bias.table : half(gate.bias.table, false, l);
  p.up_bias = l.listed ? up.bias.table : half(up.bias.table, true, l);
  return p;
}

Tensor up_projection(const Layer& l, const Tensor& x, const Tensor& expert_offsets, const Tensor& row_to_slot) {
  Tensor pre_act = empty(x, {l.S, l.pre_width()}, x.scalar_type());
  GroupedMmParams p = mm_params(l, expert_offsets);
  p.x = gathered(x, row_to_slot, l.K);
  p.K = l.H;
  p.out_stride = l.pre_width();
  for (const Projection& part : l.up) {
    p.weight = part.weight.table;
    p.bias = part.bias.table;
    p.N = part.weight.N;
    p.out = column(pre_act, part.column);
    run(l.op, kernel_table().grouped_mm, p, x, name(l.dtype));
  }
  return pre_act;
}

Tensor pre_activation(const Layer& l, const Tensor& x, const Tensor& expert_offsets, const Tensor& row_to_slot) {
  const auto& fused = kernel_table().grouped_up;
  GroupedUpParams p = up_params(l, gathered(x, row_to_slot, l.K), expert_offsets);
  if (!l.activation.gated || !is_supported(fused, p)) return up_projection(l, x, expert_offsets, row_to_slot);
  Tensor pre_act = empty(x, {l.S, l.pre_width()}, x.scalar_type());
  p.pre_act = pre_act.data_ptr();
  run(l.op, fused, p, x, name(l.dtype));
  return pre_act;
}

}  // namespace moe::ops
