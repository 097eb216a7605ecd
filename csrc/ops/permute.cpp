#include "launch.h"

namespace moe::ops {
namespace {

// S = T * K, and both maps have S entries.
int64_t check_maps(const char* op, const Tensor& row_to_slot, const Tensor& slot_to_row, int64_t top_k, const Tensor& like) {
  check(row_to_slot.dim() == 1, op, "row_to_slot has shape ", shape(row_to_slot), ", expected [S]");
  const int64_t S = row_to_slot.size(0);
  check(top_k >= 1 && S % top_k == 0, op, "top_k=", top_k, " does not divide the S=", S, " slots of row_to_slot");
  check_int32(op, row_to_slot, "row_to_slot", S, like);
  check_int32(op, slot_to_row, "slot_to_row", S, like);
  check_map(op, row_to_slot, "row_to_slot", S);
  check_map(op, slot_to_row, "slot_to_row", S);
  return S;
}

}  // namespace

Tensor permute(const Tensor& x, const Tensor& row_to_slot, const Tensor& slot_to_row, int64_t top_k) {
  constexpr const char* op = "permute";
  check(x.dim() == 2, op, "x has shape ", shape(x), ", expected [T, H]");
  const DType dtype = float_dtype(op, x, "x");
  const int64_t S = check_maps(op, row_to_slot, slot_to_row, top_k, x);
  check(x.size(0) * top_k == S, op, "x has T=", x.size(0), " rows and top_k=", top_k, " but row_to_slot has ", S, " entries");

  const Tensor source = row_major(x);
  Tensor out = empty(x, {S, x.size(1)}, x.scalar_type());
  PermuteParams p;
  p.dtype = dtype;
  p.x = gathered(source, row_to_slot, top_k);
  p.S = S;
  p.H = x.size(1);
  p.out = out.data_ptr();
  run(op, kernel_table().permute, p, x, name(dtype));
  return out;
}

Tensor unpermute(const Tensor& rows_in, const Tensor& row_to_slot, const Tensor& slot_to_row, int64_t top_k,
                 const OptionalTensor& top_k_weights) {
  constexpr const char* op = "unpermute";
  check(rows_in.dim() == 2, op, "rows has shape ", shape(rows_in), ", expected [S, H]");
  const DType dtype = float_dtype(op, rows_in, "rows");
  const int64_t S = check_maps(op, row_to_slot, slot_to_row, top_k, rows_in), T = S / top_k, H = rows_in.size(1);
  check_shape(op, rows_in, "rows", {S, H});
  if (top_k_weights) {
    float_dtype(op, *top_k_weights, "top_k_weights");
    check_shape(op, *top_k_weights, "top_k_weights", {T, top_k});
    check_device(op, *top_k_weights, "top_k_weights", rows_in, "rows");
  }

  const Tensor source = as_contiguous(rows_in);
  OptionalTensor weights;
  if (top_k_weights) weights = slot_weights(*top_k_weights, dtype);
  Tensor out = empty(rows_in, {T, H}, rows_in.scalar_type());
  UnpermuteParams p;
  p.dtype = dtype;
  p.rows = source.data_ptr();
  p.slot_to_row = int32_ptr(slot_to_row);
  p.slot_weights = data_or_null(weights);
  p.T = T;
  p.K = top_k;
  p.H = H;
  p.out = out.data_ptr();
  run(op, kernel_table().unpermute, p, rows_in, name(dtype));
  return out;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad, const Tensor& rows_in, const Tensor& row_to_slot,
                                              const Tensor& top_k_weights) {
  constexpr const char* op = "unpermute_backward";
  check(rows_in.dim() == 2, op, "rows has shape ", shape(rows_in), ", expected [S, H]");
  const DType dtype = float_dtype(op, rows_in, "rows");
  float_dtype(op, top_k_weights, "top_k_weights");
  check(top_k_weights.dim() == 2, op, "top_k_weights has shape ", shape(top_k_weights), ", expected [T, K]");
  const int64_t T = top_k_weights.size(0), K = top_k_weights.size(1), H = rows_in.size(1), S = T * K;
  check_shape(op, rows_in, "rows", {S, H});
  check_shape(op, grad, "grad", {T, H});
  check_like(op, grad, "grad", rows_in, "rows");
  check_device(op, top_k_weights, "top_k_weights", rows_in, "rows");
  check_int32(op, row_to_slot, "row_to_slot", S, rows_in);
  check_map(op, row_to_slot, "row_to_slot", S);

  const Tensor g = row_major(grad), source = as_contiguous(rows_in), weights = slot_weights(top_k_weights, dtype);
  Tensor grad_rows = empty(rows_in, {S, H}, rows_in.scalar_type());
  Tensor grad_weights = zeros(weights, {T, K}, weights.scalar_type());
  UnpermuteBackwardParams p;
  p.dtype = dtype;
  p.grad = gathered(g, row_to_slot, K);
  p.rows = source.data_ptr();
  p.slot_weights = weights.data_ptr();
  p.S = S;
  p.H = H;
  p.grad_rows = grad_rows.data_ptr();
  p.grad_slot_weights = grad_weights.data_ptr();
  run(op, kernel_table().unpermute_backward, p, rows_in, name(dtype));
  if (top_k_weights.scalar_type() != grad_weights.scalar_type()) grad_weights = as_dtype(grad_weights, top_k_weights.scalar_type());
  return {grad_rows, grad_weights};
}

}  // namespace moe::ops
