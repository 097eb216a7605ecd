// The whole expert layer: sort -> up projection (rows gathered from token order) -> activation -> down projection -> weighted
// gather-sum; and its backward. The same kernels in the same order as the composed path, so the two agree bit for bit.
//   out[t] = sum_k w[t,k] * (act(x[t] W_gate_e^T, x[t] W_up_e^T) W_down_e^T + b_down_e),  e = top_k_index[t,k]
// Backward, with g = d loss / d out gathered to rows, w the row's routing weight, a the recomputed activation:
//   da = g W_down        dpre = w da act'(pre)     dx = sum_k dpre W_up
//   dW_down = g^T (w a)  dW_up = dpre^T x          dw = <da, a> + <g, b_down>
// dw needs neither the down projection's output nor a division by a gate or weight that may be zero.
#include "tensor_access.h"

namespace moe::ops {
namespace {

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

void check_hidden(Layer& l, const Tensor& hidden_states) {
  check(hidden_states.dim() == 2, l.op, "hidden_states has shape ", shape(hidden_states), ", expected [T, H]");
  l.dtype = float_dtype(l.op, hidden_states, "hidden_states");
  l.T = hidden_states.size(0);
  l.H = hidden_states.size(1);
}

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

void check_list(const char* op, const TensorList& list, const char* what, size_t E, std::initializer_list<int64_t> expected,
                const Tensor& like) {
  check(list.size() == E, op, what, " has ", list.size(), " entries for ", E, " experts");
  for (const Tensor& t : list) {
    check_shape(op, t, what, expected);
    check_like(op, t, what, like, "hidden_states");
  }
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

void* column(const Tensor& t, int64_t c) { return static_cast<char*>(t.data_ptr()) + c * t.element_size(); }

GroupedMmParams mm_params(const Layer& l, const Tensor& expert_offsets) {
  GroupedMmParams p;
  p.dtype = l.dtype;
  p.expert_offsets = int32_ptr(expert_offsets);
  p.S = l.S;
  p.E = l.E;
  return p;
}

TrainResult forward(Layer& l, const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights) {
  const KernelTable& kernels = kernel_table();
  const ScalarType type = hidden_states.scalar_type();
  const char* detail = name(l.dtype);
  const Tensor x = row_major(hidden_states), weights = slot_weights(top_k_weights, l.dtype);
  auto [expert_offsets, row_to_slot, slot_to_row] = sort_by_expert(top_k_index, l.E);

  Tensor pre_act = empty(x, {l.S, l.pre_width()}, type);
  GroupedMmParams up = mm_params(l, expert_offsets);
  up.x = gathered(x, row_to_slot, l.K);
  up.K = l.H;
  up.out_stride = l.pre_width();
  for (const Projection& part : l.up) {
    up.weight = part.weight.table;
    up.bias = part.bias.table;
    up.N = part.weight.N;
    up.out = column(pre_act, part.column);
    run(l.op, kernels.grouped_mm, up, x, detail);
  }

  Tensor act = empty(x, {l.S, l.I}, type);
  GatedActivationParams a;
  a.dtype = l.dtype;
  a.activation = l.activation;
  a.pre_act = pre_act.data_ptr();
  a.expert_offsets = int32_ptr(expert_offsets);
  a.S = l.S;
  a.I = l.I;
  a.E = l.E;
  a.out = act.data_ptr();
  run(l.op, kernels.gated_activation, a, x, detail);

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

// What the training forward saved.
struct Saved {
  const OptionalTensor& hidden_states;  // only when dW of the up projection is needed
  const Tensor& top_k_weights;
  const Tensor& pre_act;
  const Tensor& expert_offsets;
  const Tensor& row_to_slot;
  const Tensor& slot_to_row;
};

void check_saved(Layer& l, const Tensor& grad, const Saved& s, int64_t needs) {
  check_hidden(l, grad);
  check(s.top_k_weights.dim() == 2 && s.top_k_weights.size(0) == l.T, l.op, "top_k_weights has shape ", shape(s.top_k_weights),
        ", expected [T=", l.T, ", K]");
  l.K = s.top_k_weights.size(1);
  l.S = l.T * l.K;
  check_shape(l.op, s.pre_act, "pre_act", {l.S, l.pre_width()});
  check_like(l.op, s.pre_act, "pre_act", grad, "grad");
  check_int32(l.op, s.expert_offsets, "expert_offsets", l.E + 1, grad);
  check_int32(l.op, s.row_to_slot, "row_to_slot", l.S, grad);
  check_int32(l.op, s.slot_to_row, "slot_to_row", l.S, grad);
  if (needs & (kGateUp | kUp)) {
    check(s.hidden_states.has_value(), l.op, "hidden_states is needed for the gradient of the up projection");
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
  const Tensor grad = row_major(grad_in), pre_act = torch::stable::contiguous(s.pre_act);
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
  if (needs_pre || (needs & kTopKWeights)) {
    grad_act = empty(grad, {l.S, l.I}, type);
    GroupedMmParams p = mm_params(l, s.expert_offsets);
    p.x = g;
    p.weight = l.down->weight.swapped();
    p.N = l.I;
    p.K = l.H;
    p.out = grad_act->data_ptr();
    p.out_stride = l.I;
    run(l.op, kernels.grouped_mm, p, grad, detail);
    a.grad = grad_act->data_ptr();
  }
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
  if (a.grad || a.scaled) run(l.op, kernels.gated_activation_backward, a, grad, detail);

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
    results.push_back(same ? *grad_weights : torch::stable::to(*grad_weights, s.top_k_weights.scalar_type()));
  }
  std::optional<Tensor> x;
  if (needs & (kGateUp | kUp)) x = row_major(*s.hidden_states);
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

TrainResult grouped_forward_train(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights,
                                  const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
                                  const OptionalTensor& down_bias, const std::string& activation, bool gated, bool transposed,
                                  bool interleaved, const OptionalDouble& alpha, const OptionalDouble& limit) {
  constexpr const char* op = "grouped_forward";
  const Activation a = parse_activation(op, activation, gated, interleaved, alpha, limit);
  check(hidden_states.dim() == 2, op, "hidden_states has shape ", shape(hidden_states), ", expected [T, H]");
  Layer l = stacked_layer(op, hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias, a, transposed, hidden_states.size(1));
  check_hidden(l, hidden_states);
  check_routing(l, hidden_states, top_k_index, top_k_weights);
  return forward(l, hidden_states, top_k_index, top_k_weights);
}

Tensor grouped_forward(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights, const Tensor& gate_up_proj,
                       const Tensor& down_proj, const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
                       const std::string& activation, bool gated, bool transposed, bool interleaved, const OptionalDouble& alpha,
                       const OptionalDouble& limit) {
  return std::get<0>(grouped_forward_train(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_bias, down_bias,
                                           activation, gated, transposed, interleaved, alpha, limit));
}

TensorList grouped_backward(const Tensor& grad, const OptionalTensor& hidden_states, const Tensor& top_k_weights, const Tensor& pre_act,
                            const Tensor& expert_offsets, const Tensor& row_to_slot, const Tensor& slot_to_row, const Tensor& gate_up_proj,
                            const Tensor& down_proj, const OptionalTensor& down_bias, const std::string& activation, bool gated,
                            bool transposed, bool interleaved, const OptionalDouble& alpha, const OptionalDouble& limit, int64_t needs) {
  constexpr const char* op = "grouped_backward";
  const Activation a = parse_activation(op, activation, gated, interleaved, alpha, limit);
  check(grad.dim() == 2, op, "grad has shape ", shape(grad), ", expected [T, H]");
  Layer l = stacked_layer(op, grad, gate_up_proj, down_proj, std::nullopt, down_bias, a, transposed, grad.size(1));
  return backward(l, grad, {hidden_states, top_k_weights, pre_act, expert_offsets, row_to_slot, slot_to_row}, needs);
}

TrainResult grouped_forward_train_list(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights,
                                       const TensorList& gate_proj, const TensorList& up_proj, const TensorList& down_proj,
                                       const OptionalTensorList& gate_bias, const OptionalTensorList& up_bias,
                                       const OptionalTensorList& down_bias, const std::string& activation, bool gated,
                                       const OptionalDouble& alpha, const OptionalDouble& limit) {
  constexpr const char* op = "grouped_forward";
  const Activation a = parse_activation(op, activation, gated, false, alpha, limit);
  check(hidden_states.dim() == 2, op, "hidden_states has shape ", shape(hidden_states), ", expected [T, H]");
  Layer l = list_layer(op, hidden_states, gate_proj, up_proj, down_proj, gate_bias, up_bias, down_bias, a, hidden_states.size(1));
  check_hidden(l, hidden_states);
  check_routing(l, hidden_states, top_k_index, top_k_weights);
  return forward(l, hidden_states, top_k_index, top_k_weights);
}

Tensor grouped_forward_list(const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights,
                            const TensorList& gate_proj, const TensorList& up_proj, const TensorList& down_proj,
                            const OptionalTensorList& gate_bias, const OptionalTensorList& up_bias, const OptionalTensorList& down_bias,
                            const std::string& activation, bool gated, const OptionalDouble& alpha, const OptionalDouble& limit) {
  return std::get<0>(grouped_forward_train_list(hidden_states, top_k_index, top_k_weights, gate_proj, up_proj, down_proj, gate_bias,
                                                up_bias, down_bias, activation, gated, alpha, limit));
}

TensorList grouped_backward_list(const Tensor& grad, const OptionalTensor& hidden_states, const Tensor& top_k_weights,
                                 const Tensor& pre_act, const Tensor& expert_offsets, const Tensor& row_to_slot, const Tensor& slot_to_row,
                                 const TensorList& gate_proj, const TensorList& up_proj, const TensorList& down_proj,
                                 const OptionalTensorList& down_bias, const std::string& activation, bool gated,
                                 const OptionalDouble& alpha, const OptionalDouble& limit, int64_t needs) {
  constexpr const char* op = "grouped_backward";
  const Activation a = parse_activation(op, activation, gated, false, alpha, limit);
  check(grad.dim() == 2, op, "grad has shape ", shape(grad), ", expected [T, H]");
  Layer l = list_layer(op, grad, gate_proj, up_proj, down_proj, std::nullopt, std::nullopt, down_bias, a, grad.size(1));
  return backward(l, grad, {hidden_states, top_k_weights, pre_act, expert_offsets, row_to_slot, slot_to_row}, needs);
}

}  // namespace moe::ops
