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

// Whether 16-byte copies can read it: every row and every matrix begins at a multiple of 16 bytes.
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline bool is_aligned(const Rows& rows, int64_t element) { return is_aligned(rows.data) && rows.stride * element % 16 == 0; }

template <class Table>
bool is_aligned(const Table& table, int64_t E, int64_t row_stride, int64_t element) {
  if (row_stride * element % 16) return false;
  if (!table.list) return is_aligned(table.base) && table.stride_e * element % 16 == 0;
  for (int64_t e = 0; e < E; ++e) {
    if (!is_aligned(table.list[e])) return false;
  }
  return true;
}

}  // namespace moe::cuda
