// How kernels without products reach the rows they move, scale and add: 16 bytes per access where every row begins at a multiple
// of 16 bytes and is a whole number of accesses long, else element by element; and how many threads share a row. Decided on the
// host from pointers, strides and shapes: the order of a sum depends on these alone, never on the number of rows or the device.
#pragma once
#include "../params.h"
#include "host_device.h"

namespace moe::cuda {

constexpr int kThreads = 256;  // of a block
constexpr int64_t kAccessBytes = 16;

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kAccessBytes == 0; }
inline bool is_aligned(const Rows& rows, int64_t element) { return is_aligned(rows.data) && rows.stride * element % kAccessBytes == 0; }

// Every row of every matrix; a list is still in host memory.
template <class Table>
bool is_aligned(const Table& table, int64_t E, int64_t row_stride, int64_t element) {
  if (row_stride * element % kAccessBytes) return false;
  if (!table.list) return is_aligned(table.base) && table.stride_e * element % kAccessBytes == 0;
  for (int64_t e = 0; e < E; ++e) {
    if (!is_aligned(table.list[e])) return false;
  }
  return true;
}

// Contiguous rows of `width` elements at each of these addresses, of which some may be null.
template <class... Pointers>
bool has_wide_rows(int64_t width, int64_t element, Pointers... rows) {
  return width * element % kAccessBytes == 0 && (is_aligned(rows) && ...);
}

// Whether 16-byte accesses serve every operand of an op.
inline bool is_wide(const PermuteParams& p) {
  const int64_t element = element_size(p.dtype);
  return has_wide_rows(p.H, element, p.out) && is_aligned(p.x, element);
}
inline bool is_wide(const UnpermuteParams& p) { return has_wide_rows(p.H, element_size(p.dtype), p.rows, p.out); }
inline bool is_wide(const UnpermuteBackwardParams& p) {
  const int64_t element = element_size(p.dtype);
  return has_wide_rows(p.H, element, p.rows, p.grad_rows) && is_aligned(p.grad, element);
}
inline bool is_wide(const GatedActivationParams& p) { return has_wide_rows(p.I, element_size(p.dtype), p.pre_act, p.out); }
inline bool is_wide(const GatedActivationBackwardParams& p) {
  const int64_t element = element_size(p.dtype);
  if (!has_wide_rows(p.I, element, p.grad, p.pre_act, p.grad_pre, p.scaled)) return false;
  return !p.down_bias || (is_aligned(p.grad_out, element) && is_aligned(p.down_bias, p.E, p.H, element));
}
inline bool is_wide(const GroupedBiasGradParams& p) {
  const int64_t element = element_size(p.dtype);
  return has_wide_rows(p.N, element) && is_aligned(p.g, element);
}

// Whether a tile of a product can be written so, its bias read, and what it is added to.
inline bool has_wide_results(const GroupedMmParams& p) {
  const int64_t element = element_size(p.dtype);
  return has_wide_rows(p.N, element, p.out) && p.out_stride * element % kAccessBytes == 0 &&
         (!p.bias || is_aligned(p.bias, p.E, p.N, element));
}
inline bool has_wide_results(const GroupedMmWgradParams& p) {
  const int64_t element = element_size(p.dtype);
  return has_wide_rows(p.N, element) && is_aligned(p.out, p.E, p.out.stride, element);
}

// A power of two of whole warps, so that the rows of a block fill it: as many threads as a row has accesses, within a block.
inline int threads_per_row(int64_t accesses) {
  int threads = 32;
  while (threads < kThreads && threads < accesses) threads *= 2;
  return threads;
}

}  // namespace moe::cuda
