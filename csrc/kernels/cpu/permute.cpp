// Between token order and expert-sorted order:
//   permute    rows[r] = x[token of r]                       (a copy)
//   unpermute  out[t]  = sum_k w[t,k] rows[row of (t,k)]     (a gather-sum in the fixed order of k: no atomics)
// Sums run in float32 (float64 for float64) and are rounded once.
#include <cstring>

#include "float_types.h"
#include "kernels.h"

namespace moe::cpu::MOE_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;
constexpr int64_t kBlock = 256;  // columns summed at a time, in registers and L1
constexpr int kLanes = 16;       // partial sums of a dot product, added in a fixed order

int64_t tasks_for(int64_t rows) { return (rows + kRowsPerTask - 1) / kRowsPerTask; }

template <class F>
void for_each_row(const Launch& launch, int64_t rows, const F& f) {
  for_each_task(launch, tasks_for(rows), [&](int64_t task, int) {
    const int64_t end = (task + 1) * kRowsPerTask < rows ? (task + 1) * kRowsPerTask : rows;
    for (int64_t r = task * kRowsPerTask; r < end; ++r) f(r);
  });
}

Status launch_permute(const PermuteParams& p, const Launch& launch) {
  const int64_t bytes = p.H * element_size(p.dtype);
  const char* x = static_cast<const char*>(p.x.data);
  char* out = static_cast<char*>(p.out);
  for_each_row(launch, p.S, [&](int64_t r) {
    const int32_t slot = p.x.row_to_slot[r];
    if (slot < 0) {
      std::memset(out + r * bytes, 0, bytes);
    } else {
      std::memcpy(out + r * bytes, x + slot / p.x.top_k * p.x.stride * element_size(p.dtype), bytes);
    }
  });
  return Status::kOk;
}

template <class T>
void unpermute_row(const UnpermuteParams& p, int64_t t) {
  using A = acc_t<T>;
  const A* weights = static_cast<const A*>(p.slot_weights);
  for (int64_t h0 = 0; h0 < p.H; h0 += kBlock) {
    const int64_t n = p.H - h0 < kBlock ? p.H - h0 : kBlock;
    A sum[kBlock] = {};
    for (int64_t k = 0; k < p.K; ++k) {
      const int64_t row = p.slot_to_row[t * p.K + k];
      if (row < 0) continue;
      const T* y = static_cast<const T*>(p.rows) + row * p.H + h0;
      const A w = weights ? weights[t * p.K + k] : A(1);
      for (int64_t i = 0; i < n; ++i) sum[i] += w * load_as<A>(y + i);
    }
    T* out = static_cast<T*>(p.out) + t * p.H + h0;
    for (int64_t i = 0; i < n; ++i) store_from(out + i, sum[i]);
  }
}

Status launch_unpermute(const UnpermuteParams& p, const Launch& launch) {
  return visit_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_row(launch, p.T, [&](int64_t t) { unpermute_row<T>(p, t); });
    return Status::kOk;
  });
}

template <class T>
void unpermute_backward_row(const UnpermuteBackwardParams& p, int64_t r) {
  using A = acc_t<T>;
  const int32_t slot = p.grad.row_to_slot[r];
  T* grad_row = p.grad_rows ? static_cast<T*>(p.grad_rows) + r * p.H : nullptr;
  if (slot < 0) {
    if (grad_row) std::memset(static_cast<void*>(grad_row), 0, p.H * sizeof(T));
    return;
  }
  const T* grad = static_cast<const T*>(p.grad.data) + slot / p.grad.top_k * p.grad.stride;
  if (grad_row) {
    const A w = p.slot_weights ? static_cast<const A*>(p.slot_weights)[slot] : A(1);
    for (int64_t i = 0; i < p.H; ++i) store_from(grad_row + i, w * load_as<A>(grad + i));
  }
  if (!p.grad_slot_weights) return;
  const T* y = static_cast<const T*>(p.rows) + r * p.H;
  A lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= p.H; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += load_as<A>(grad + i + j) * load_as<A>(y + i + j);
  for (; i < p.H; ++i) lane[i % kLanes] += load_as<A>(grad + i) * load_as<A>(y + i);
  A sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += lane[j];
  static_cast<A*>(p.grad_slot_weights)[slot] = sum;
}

// A dropped slot has no row: its gradient is the zero that the caller put there.
Status launch_unpermute_backward(const UnpermuteBackwardParams& p, const Launch& launch) {
  return visit_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_row(launch, p.S, [&](int64_t r) { unpermute_backward_row<T>(p, r); });
    return Status::kOk;
  });
}

}  // namespace

const Kernel<PermuteParams> permute = {nullptr, nullptr, launch_permute};
const Kernel<UnpermuteParams> unpermute = {nullptr, nullptr, launch_unpermute};
const Kernel<UnpermuteBackwardParams> unpermute_backward = {nullptr, nullptr, launch_unpermute_backward};

}  // namespace moe::cpu::MOE_ISA
