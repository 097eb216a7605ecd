// Where kernels on the device find the rows and matrices of a parameter struct. Lists are device tables by then: pointer_table.h.
#pragma once
#include "element.cuh"

namespace moe::cuda {

// The matrix or vector of expert e of a WeightTable, BiasTable or OutputTable.
template <class T, class Table>
__device__ __forceinline__ auto expert_data(const Table& table, int64_t e) {
  using Pointer = std::conditional_t<std::is_same_v<decltype(table.base), void*>, T*, const T*>;
  return table.list ? static_cast<Pointer>(table.list[e]) : static_cast<Pointer>(table.base) + e * table.stride_e;
}

// Row r, gathered when there is a map.
template <class T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int64_t r) {
  const int64_t source = rows.row_to_slot ? rows.row_to_slot[r] / rows.top_k : r;
  return static_cast<const T*>(rows.data) + source * rows.stride;
}

}  // namespace moe::cuda
