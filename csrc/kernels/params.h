// One plain struct per op: everything a kernel may know. Shapes stand beside the fields.
// T tokens, K = top_k, E experts, H hidden size, I intermediate size, S = T*K slots; slot = t*K + k.
// A row is a position in expert-sorted order; rows of expert e are [expert_offsets[e], expert_offsets[e+1]).
// Rows in [expert_offsets[E], S) belong to dropped slots: inputs there are never read, outputs there are written as zero.
// Strides count elements. The last dimension is contiguous unless a stride says otherwise.
#pragma once
#include "types.h"

namespace moe {

// A row-major operand of S rows. With `row_to_slot`, row r is read from source row row_to_slot[r] / top_k: a gather
// from token order that never materialises the permuted copy.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
  const int32_t* row_to_slot = nullptr;
  int32_t top_k = 1;
};

// E weight matrices of N outputs x K inputs; element (n, k) of expert e is at at(e) + n*stride_n + k*stride_k.
// Stacked weights use base + e*stride_e, per-expert weights a table of E pointers. One of stride_n, stride_k is 1.
struct WeightTable {
  const void* base = nullptr;
  int64_t stride_e = 0;
  const void* const* list = nullptr;
  int64_t stride_n = 0, stride_k = 1;
};

// E bias vectors of N elements, contiguous unless stride_n says otherwise, or none (base and list both null).
struct BiasTable {
  const void* base = nullptr;
  int64_t stride_e = 0;
  const void* const* list = nullptr;
  int64_t stride_n = 1;
  constexpr explicit operator bool() const { return base || list; }
};

// E output matrices, row-major with row stride `stride`.
struct OutputTable {
  void* base = nullptr;
  int64_t stride_e = 0;
  void* const* list = nullptr;
  int64_t stride = 0;
};

template <class Table>
auto at(const Table& t, int64_t e, int64_t bytes_per_element) -> decltype(t.base) {
  if (t.list) return t.list[e];
  return const_cast<char*>(static_cast<const char*>(t.base)) + e * t.stride_e * bytes_per_element;
}

// Stable counting sort of slots by expert id. An id outside [0, E) drops its slot.
struct SortParams {
  const void* ids = nullptr;  // [S] int32 or int64
  bool ids_int64 = false;
  int64_t S = 0, E = 0;
  int32_t* expert_offsets = nullptr;  // [E+1]
  int32_t* row_to_slot = nullptr;     // [S], -1 past expert_offsets[E]
  int32_t* slot_to_row = nullptr;     // [S], -1 for a dropped slot
};

// out[r] = x[row_to_slot[r] / K], zero where row_to_slot[r] = -1.
struct PermuteParams {
  DType dtype;
  Rows x;  // [T, H], gathered
  int64_t S = 0, H = 0;
  void* out = nullptr;  // [S, H]
};

// out[r, :] = x[r, :] @ weight[e]^T + bias[e] for the rows r of each expert e; rounded once, after the bias.
struct GroupedMmParams {
  DType dtype;
  Rows x;                                   // [S, K] or gathered from [T, K]
  WeightTable weight;                       // E x (N, K)
  BiasTable bias;                           // E x (N), may be empty
  const int32_t* expert_offsets = nullptr;  // [E+1]
  int64_t S = 0, E = 0, N = 0, K = 0;
  void* out = nullptr;  // [S, N]
  int64_t out_stride = 0;
  bool accumulate = false;  // out += (the sum is formed in the accumulator, then rounded) instead of out =
};

// out[e] = a[rows of e]^T @ b[rows of e]: [M, N], exactly zero for an expert without rows.
struct GroupedMmWgradParams {
  DType dtype;
  Rows a;                                   // [S, M] or gathered
  Rows b;                                   // [S, N] or gathered
  const int32_t* expert_offsets = nullptr;  // [E+1]
  int64_t S = 0, E = 0, M = 0, N = 0;
  OutputTable out;  // E x (M, N)
};

// out[e] = sum over the rows of e of row_weight[r] * g[r, :], exactly zero for an expert without rows.
struct GroupedBiasGradParams {
  DType dtype;
  Rows g;                                   // [S, N] or gathered
  const void* slot_weights = nullptr;       // [S] in slot order, accumulator dtype; null = 1
  const int32_t* row_to_slot = nullptr;     // [S], needed with slot_weights
  const int32_t* expert_offsets = nullptr;  // [E+1]
  int64_t S = 0, E = 0, N = 0;
  OutputTable out;  // E x (1, N)
};

enum class ActivationKind : int8_t { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSwigluOai };

// act(gate) * up (gated), or act(x). The formulas and their derivatives are in activation.h, and only there.
struct Activation {
  ActivationKind kind = ActivationKind::kSilu;
  bool gated = true;  // pre-activation has 2I columns: [gate | up], or g0 u0 g1 u1 ... when interleaved
  bool interleaved = false;
  bool has_limit = false;  // gate = min(gate, limit), up = clamp(up, -limit, limit)
  double alpha = 1.0;      // kSwigluOai: gate * sigmoid(alpha * gate) * (up + 1)
  double limit = 0.0;
};

struct GatedActivationParams {
  DType dtype;
  Activation activation;
  const void* pre_act = nullptr;            // [S, 2I] gated, [S, I] otherwise
  const int32_t* expert_offsets = nullptr;  // [E+1]: rows past expert_offsets[E] are skipped and written as zero; null = all S rows
  int64_t S = 0, I = 0, E = 0;
  void* out = nullptr;  // [S, I]
};

// Given grad = d loss / d (activation output), before the routing weight w of the row:
//   grad_pre  = w * grad * activation'(pre_act)                         (optional)
//   scaled    = w * activation(pre_act)                                 (optional; the wgrad operand of the down projection)
//   grad_w[s] = <grad, activation(pre_act)> + <grad_out[t], down_bias>  (optional; s = row_to_slot[r], t = s / K)
struct GatedActivationBackwardParams {
  DType dtype;
  Activation activation;
  const void* grad = nullptr;               // [S, I]; null when only `scaled` is wanted
  const void* pre_act = nullptr;            // [S, 2I] or [S, I]
  const int32_t* expert_offsets = nullptr;  // [E+1] or null, as above
  const int32_t* row_to_slot = nullptr;     // [S], needed with slot_weights and grad_slot_weights
  const void* slot_weights = nullptr;       // [S] in slot order, accumulator dtype; null = 1
  int64_t S = 0, I = 0, E = 0, H = 0;
  void* grad_pre = nullptr;           // [S, 2I] or [S, I], or null
  void* scaled = nullptr;             // [S, I] or null
  void* grad_slot_weights = nullptr;  // [S] in slot order, accumulator dtype, zero for dropped slots; or null
  Rows grad_out;                      // [T, H] gathered; read only with down_bias
  BiasTable down_bias;                // E x (H)
};

// out[r] = act(gate) * up with gate = x[r] @ gate_proj[e]^T + gate_bias[e], up = x[r] @ up_proj[e]^T + up_bias[e], both rounded to
// dtype as grouped_mm rounds them: grouped_mm and gated_activation in one pass, whose pre-activation need not reach memory.
struct GroupedUpParams {
  DType dtype;
  Activation activation;                    // gated
  Rows x;                                   // [T, H], gathered
  WeightTable gate_proj, up_proj;           // E x (I, H): halves, or every second row or column, of one stack; or two lists
  BiasTable gate_bias, up_bias;             // E x (I), both or neither
  const int32_t* expert_offsets = nullptr;  // [E+1]
  int64_t S = 0, E = 0, H = 0, I = 0;
  void* pre_act = nullptr;  // [S, 2I] in the layout of activation.interleaved, or null: not wanted
  void* out = nullptr;      // [S, I], or null: not wanted
};

// gated_activation_backward of grad[r] @ down_proj[e], which is formed here and never reaches memory.
struct GroupedDownBackwardParams {
  GatedActivationBackwardParams through;  // `grad` is not read
  Rows grad;                              // [T, H], gathered: d loss / d out
  WeightTable down_proj;                  // E x (I, H): outputs and inputs of the product, so swapped against the forward
};

// out[t] = sum over k, in order, of weights[t*K+k] * rows[slot_to_row[t*K+k]]; a dropped slot adds nothing.
struct UnpermuteParams {
  DType dtype;
  const void* rows = nullptr;            // [S, H]
  const int32_t* slot_to_row = nullptr;  // [S]
  const void* slot_weights = nullptr;    // [S], accumulator dtype; null = 1
  int64_t T = 0, K = 0, H = 0;
  void* out = nullptr;  // [T, H]
};

// grad_rows[r] = w[s] * grad[s / K] and grad_w[s] = <grad[s / K], rows[r]> with s = row_to_slot[r]; zero where dropped.
struct UnpermuteBackwardParams {
  DType dtype;
  Rows grad;                           // [T, H], gathered
  const void* rows = nullptr;          // [S, H], needed for grad_slot_weights
  const void* slot_weights = nullptr;  // [S], accumulator dtype; null = 1
  int64_t S = 0, H = 0;
  void* grad_rows = nullptr;          // [S, H] or null
  void* grad_slot_weights = nullptr;  // [S] in slot order, accumulator dtype, or null
};

}  // namespace moe
