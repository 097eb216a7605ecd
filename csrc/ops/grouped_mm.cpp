#include "launch.h"

namespace moe::ops {
namespace {

// What every grouped op has: rows sorted by expert, and the bounds of each expert's rows.
void check_rows(const char* op, const Tensor& x, const char* what, const Tensor& expert_offsets) {
  check(x.dim() == 2, op, what, " has shape ", shape(x), ", expected [S, *]");
  check_slots(op, x.size(0));
  check(expert_offsets.dim() == 1 && expert_offsets.size(0) >= 2, op, "expert_offsets has shape ", shape(expert_offsets),
        ", expected [E+1]");
  check_int32(op, expert_offsets, "expert_offsets", expert_offsets.size(0), x);
  check_offsets(op, expert_offsets, x.size(0));
}

Tensor run_grouped_mm(const char* op, const Tensor& x, const Weights& weight, const Biases& bias, const Tensor& expert_offsets) {
  const DType dtype = float_dtype(op, x, "x");
  check(x.size(1) == weight.K, op, "x has ", x.size(1), " columns but weight maps ", weight.K, " inputs to ", weight.N, " outputs");
  check(expert_offsets.size(0) == weight.E + 1, op, "expert_offsets has ", expert_offsets.size(0), " entries for E=", weight.E,
        " experts, expected E+1");
  const Tensor source = row_major(x);
  Tensor out = empty(x, {x.size(0), weight.N}, x.scalar_type());
  GroupedMmParams p;
  p.dtype = dtype;
  p.x = rows(source);
  p.weight = weight.table;
  p.bias = bias.table;
  p.expert_offsets = int32_ptr(expert_offsets);
  p.S = x.size(0);
  p.E = weight.E;
  p.N = weight.N;
  p.K = weight.K;
  p.out = out.data_ptr();
  p.out_stride = weight.N;
  run(op, kernel_table().grouped_mm, p, x, name(dtype));
  return out;
}

// Fills everything but the output.
GroupedMmWgradParams wgrad_params(const char* op, const Tensor& a, const Tensor& b, const Tensor& expert_offsets) {
  check_rows(op, a, "a", expert_offsets);
  check(b.dim() == 2 && b.size(0) == a.size(0), op, "a has shape ", shape(a), " and b ", shape(b), "; both need the same S rows");
  check_like(op, b, "b", a, "a");
  GroupedMmWgradParams p;
  p.dtype = float_dtype(op, a, "a");
  p.a = rows(a);
  p.b = rows(b);
  p.expert_offsets = int32_ptr(expert_offsets);
  p.S = a.size(0);
  p.E = expert_offsets.size(0) - 1;
  p.M = a.size(1);
  p.N = b.size(1);
  return p;
}

TensorList run_wgrad(const Tensor& a_in, const Tensor& b_in, const Tensor& expert_offsets, bool listed) {
  constexpr const char* op = "grouped_mm_wgrad";
  check(a_in.dim() == 2 && b_in.dim() == 2, op, "a has shape ", shape(a_in), " and b ", shape(b_in), ", expected [S, M] and [S, N]");
  const Tensor a = row_major(a_in), b = row_major(b_in);
  GroupedMmWgradParams p = wgrad_params(op, a, b, expert_offsets);
  Outputs out(a, p.E, p.M, p.N, listed);
  p.out = out.table;
  run(op, kernel_table().grouped_mm_wgrad, p, a, name(p.dtype));
  return out.tensors;
}

}  // namespace

Tensor grouped_mm(const Tensor& x, const Tensor& weight, const Tensor& expert_offsets, const OptionalTensor& bias, bool transposed) {
  constexpr const char* op = "grouped_mm";
  check_rows(op, x, "x", expert_offsets);
  check(weight.dim() == 3, op, "weight has shape ", shape(weight), ", expected [E, N, K], or [E, K, N] with transposed=True");
  check_like(op, weight, "weight", x, "x");
  const Weights w(weight, transposed);
  if (bias) {
    check_shape(op, *bias, "bias", {w.E, w.N});
    check_like(op, *bias, "bias", x, "x");
  }
  return run_grouped_mm(op, x, w, Biases(bias), expert_offsets);
}

Tensor grouped_mm_list(const Tensor& x, const TensorList& weight, const Tensor& expert_offsets, const OptionalTensorList& bias,
                       bool transposed) {
  constexpr const char* op = "grouped_mm";
  check_rows(op, x, "x", expert_offsets);
  check(!weight.empty(), op, "the list of weights is empty");
  for (const Tensor& w : weight) {
    check(w.dim() == 2, op, "a weight of the list has shape ", shape(w), ", expected [N, K], or [K, N] with transposed=True");
    check_shape(op, w, "a weight of the list", {weight[0].size(0), weight[0].size(1)});
    check_like(op, w, "a weight of the list", x, "x");
  }
  const Weights w(weight, transposed);
  if (bias) {
    check(bias->size() == weight.size(), op, "there are ", bias->size(), " biases for ", weight.size(), " weights");
    for (const Tensor& b : *bias) {
      check_shape(op, b, "a bias of the list", {w.N});
      check_like(op, b, "a bias of the list", x, "x");
    }
  }
  return run_grouped_mm(op, x, w, Biases(bias), expert_offsets);
}

Tensor grouped_mm_wgrad(const Tensor& a, const Tensor& b, const Tensor& expert_offsets) {
  return run_wgrad(a, b, expert_offsets, false)[0];
}

TensorList grouped_mm_wgrad_list(const Tensor& a, const Tensor& b, const Tensor& expert_offsets) {
  return run_wgrad(a, b, expert_offsets, true);
}

Tensor grouped_bias_grad(const Tensor& grad, const Tensor& expert_offsets) {
  constexpr const char* op = "grouped_bias_grad";
  check_rows(op, grad, "grad", expert_offsets);
  const Tensor g = row_major(grad);
  GroupedBiasGradParams p;
  p.dtype = float_dtype(op, grad, "grad");
  p.g = rows(g);
  p.expert_offsets = int32_ptr(expert_offsets);
  p.S = g.size(0);
  p.E = expert_offsets.size(0) - 1;
  p.N = g.size(1);
  Tensor out = empty(grad, {p.E, p.N}, grad.scalar_type());
  p.out.base = out.data_ptr();
  p.out.stride_e = p.out.stride = p.N;
  run(op, kernel_table().grouped_bias_grad, p, g, name(p.dtype));
  return out;
}

}  // namespace moe::ops
