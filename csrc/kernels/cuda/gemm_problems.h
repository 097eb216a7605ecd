// The arrays that describe a grouped GEMM to CUTLASS' ptr-array kernels, one entry per expert, filled on the device from the
// offsets: the host never learns how many rows an expert has. D (m x n) = A (m x k) times B (k x n).
#pragma once
#include "../params.h"
#include "cutlass_launch.h"
#include "row_tiles.h"

namespace moe::cuda {

struct GemmProblem {
  int32_t m, n, k;
  const char *a, *b;
  char* d;
};

// The operands of a grouped GEMM whose rows are in place: nothing is gathered any more.
struct GemmOperands {
  const char *x = nullptr, *other = nullptr;  // grouped_mm: x; wgrad: a and b
  int64_t ld_x = 0, ld_other = 0;             // row strides in elements
  WeightTable weight;                         // grouped_mm only
  OutputTable out;                            // grouped_mm: base and stride
  int64_t S = INT32_MAX;                      // rows of x
  int64_t N = 0, K = 0;                       // grouped_mm: of a weight; wgrad: M x N of a result
  bool wgrad = false;
};

template <class Table>
MOE_HD auto expert_bytes(const Table& table, int64_t e, int64_t element) {
  using Pointer = decltype(table.base);
  return table.list ? static_cast<Pointer>(table.list[e])
                    : static_cast<Pointer>(const_cast<char*>(static_cast<const char*>(table.base)) + e * table.stride_e * element);
}

// An expert without rows has a result of no size: its accumulators, which nothing would have cleared, are stored nowhere.
MOE_HD GemmProblem problem_of(const GemmOperands& o, const int32_t* expert_offsets, int64_t e, int64_t element) {
  const auto [begin, rows] = expert_rows(expert_offsets, e, o.S);
  const int64_t first = begin;
  const int32_t n = static_cast<int32_t>(o.N), k = static_cast<int32_t>(o.K);
  const char* x = o.x + first * o.ld_x * element;
  if (o.wgrad) {
    const char* other = o.other + first * o.ld_other * element;
    char* out = static_cast<char*>(expert_bytes(o.out, e, element));
    return rows ? GemmProblem{n, k, rows, x, other, out} : GemmProblem{0, 0, 0, x, other, out};
  }
  return {rows,
          n,
          k,
          x,
          static_cast<const char*>(expert_bytes(o.weight, e, element)),
          static_cast<char*>(o.out.base) + first * o.out.stride * element};
}

// Where the arrays and the copy of gathered rows lie in a workspace; every part begins at a multiple of 128 bytes.
struct Sm90Workspace {
  int64_t shapes = 0, a = 0, b = 0, d = 0, ld_a = 0, ld_b = 0, ld_d = 0, tensor_maps = 0, rows = 0, bytes = 0;
};

MOE_HD Sm90Workspace sm90_workspace(int64_t E, int64_t multiprocessors, int64_t rows_bytes) {
  Sm90Workspace w;
  const auto take = [&w](int64_t bytes) {
    const int64_t at = w.bytes;
    w.bytes += round_up(bytes, 128);
    return at;
  };
  w.shapes = take(E * 12);
  w.a = take(E * 8);
  w.b = take(E * 8);
  w.d = take(E * 8);
  w.ld_a = take(E * 8);
  w.ld_b = take(E * 8);
  w.ld_d = take(E * 8);
  w.tensor_maps = take(multiprocessors * kTensorMapBytesPerSm);
  w.rows = take(rows_bytes);
  return w;
}

}  // namespace moe::cuda
