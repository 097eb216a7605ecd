#include "launch.h"

namespace moe::ops {

Tensor gated_activation(const Tensor& pre_act, const std::string& activation, bool gated, bool interleaved, const OptionalDouble& alpha,
                        const OptionalDouble& limit) {
  constexpr const char* op = "gated_activation";
  const Activation a = parse_activation(op, activation, gated, interleaved, alpha, limit);
  check(pre_act.dim() == 2, op, "pre_act has shape ", shape(pre_act), ", expected [S, 2I], or [S, I] with gated=False");
  check(!gated || pre_act.size(1) % 2 == 0, op, "pre_act has ", pre_act.size(1), " columns; gated=True needs gate and up, 2I");
  GatedActivationParams p;
  p.dtype = float_dtype(op, pre_act, "pre_act");
  p.activation = a;
  p.S = pre_act.size(0);
  p.I = pre_act.size(1) / (gated ? 2 : 1);
  const Tensor source = as_contiguous(pre_act);
  Tensor out = empty(pre_act, {p.S, p.I}, pre_act.scalar_type());
  p.pre_act = source.data_ptr();
  p.out = out.data_ptr();
  run(op, kernel_table().gated_activation, p, source, name(p.dtype));
  return out;
}

Tensor gated_activation_backward(const Tensor& grad, const Tensor& pre_act, const std::string& activation, bool gated, bool interleaved,
                                 const OptionalDouble& alpha, const OptionalDouble& limit) {
  constexpr const char* op = "gated_activation_backward";
  const Activation a = parse_activation(op, activation, gated, interleaved, alpha, limit);
  check(pre_act.dim() == 2, op, "pre_act has shape ", shape(pre_act), ", expected [S, 2I], or [S, I] with gated=False");
  check(!gated || pre_act.size(1) % 2 == 0, op, "pre_act has ", pre_act.size(1), " columns; gated=True needs gate and up, 2I");
  GatedActivationBackwardParams p;
  p.dtype = float_dtype(op, pre_act, "pre_act");
  p.activation = a;
  p.S = pre_act.size(0);
  p.I = pre_act.size(1) / (gated ? 2 : 1);
  check_shape(op, grad, "grad", {p.S, p.I});
  check_like(op, grad, "grad", pre_act, "pre_act");
  const Tensor g = as_contiguous(grad), source = as_contiguous(pre_act);
  Tensor grad_pre = empty(pre_act, {p.S, pre_act.size(1)}, pre_act.scalar_type());
  p.grad = g.data_ptr();
  p.pre_act = source.data_ptr();
  p.grad_pre = grad_pre.data_ptr();
  run(op, kernel_table().gated_activation_backward, p, source, name(p.dtype));
  return grad_pre;
}

}  // namespace moe::ops
