#include "launch.h"

namespace moe::ops {

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& top_k_index, int64_t num_experts) {
  constexpr const char* op = "sort_by_expert";
  check(top_k_index.dim() == 2, op, "top_k_index has shape ", shape(top_k_index), ", expected [T, K]");
  const bool int64 = top_k_index.scalar_type() == ScalarType::Long;
  check(int64 || top_k_index.scalar_type() == ScalarType::Int, op, "top_k_index is ", dtype_name(top_k_index), ", expected int32 or int64");
  check(num_experts >= 1, op, "num_experts=", num_experts, ", expected at least 1");
  check_slots(op, top_k_index.numel());

  const Tensor ids = top_k_index.is_contiguous() ? top_k_index : as_contiguous(top_k_index);
  const int64_t S = ids.numel();
  Tensor expert_offsets = empty(ids, {num_experts + 1}, ScalarType::Int);
  Tensor row_to_slot = empty(ids, {S}, ScalarType::Int);
  Tensor slot_to_row = empty(ids, {S}, ScalarType::Int);

  SortParams p;
  p.ids = ids.data_ptr();
  p.ids_int64 = int64;
  p.S = S;
  p.E = num_experts;
  p.expert_offsets = static_cast<int32_t*>(expert_offsets.data_ptr());
  p.row_to_slot = static_cast<int32_t*>(row_to_slot.data_ptr());
  p.slot_to_row = static_cast<int32_t*>(slot_to_row.data_ptr());
  run(op, kernel_table().sort_by_expert, p, ids, "int32 and int64 ids");
  return {expert_offsets, row_to_slot, slot_to_row};
}

}  // namespace moe::ops
