// Between token order and expert-sorted order, one block per row; the formulas stand in ../params.h.
// unpermute sums over k in order, in registers: no atomics, so results repeat bit for bit.
#include "element.cuh"
#include "kernels.h"

namespace moe::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) permute_kernel(PermuteParams p) {
  const int64_t r = blockIdx.x;
  const int32_t slot = p.x.row_to_slot[r];
  T* out = static_cast<T*>(p.out) + r * p.H;
  const T* x = static_cast<const T*>(p.x.data) + (slot < 0 ? 0 : slot / p.x.top_k * p.x.stride);
  for (int64_t h = threadIdx.x; h < p.H; h += kThreads) out[h] = slot < 0 ? T(0) : x[h];
}

template <class T>
__global__ void __launch_bounds__(kThreads) unpermute_kernel(UnpermuteParams p) {
  using A = acc_t<T>;
  const int64_t t = blockIdx.x;
  const A* weights = static_cast<const A*>(p.slot_weights);
  for (int64_t h = threadIdx.x; h < p.H; h += kThreads) {
    A sum = 0;
    for (int64_t k = 0; k < p.K; ++k) {
      const int64_t row = p.slot_to_row[t * p.K + k];
      if (row < 0) continue;
      const A w = weights ? weights[t * p.K + k] : A(1);
      sum += w * to_acc(static_cast<const T*>(p.rows)[row * p.H + h]);
    }
    static_cast<T*>(p.out)[t * p.H + h] = from_acc<T>(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) unpermute_backward_kernel(UnpermuteBackwardParams p) {
  using A = acc_t<T>;
  __shared__ A scratch[kWarps];
  const int64_t r = blockIdx.x;
  const int32_t slot = p.grad.row_to_slot[r];  // the same for the whole block
  T* grad_row = p.grad_rows ? static_cast<T*>(p.grad_rows) + r * p.H : nullptr;
  if (slot < 0) {
    for (int64_t h = threadIdx.x; grad_row && h < p.H; h += kThreads) grad_row[h] = T(0);
    return;
  }
  const A w = p.slot_weights ? static_cast<const A*>(p.slot_weights)[slot] : A(1);
  const T* grad = static_cast<const T*>(p.grad.data) + slot / p.grad.top_k * p.grad.stride;
  const T* rows = static_cast<const T*>(p.rows) + r * p.H;
  A dot = 0;
  for (int64_t h = threadIdx.x; h < p.H; h += kThreads) {
    const A g = to_acc(grad[h]);
    if (grad_row) grad_row[h] = from_acc<T>(w * g);
    if (p.grad_slot_weights) dot += g * to_acc(rows[h]);
  }
  if (!p.grad_slot_weights) return;
  dot = block_sum(dot, scratch);
  if (threadIdx.x == 0) static_cast<A*>(p.grad_slot_weights)[slot] = dot;
}

Status launch_permute(const PermuteParams& p, const Launch& launch) {
  return visit_dtype<ElementTypes>(p.dtype,
                                   [&](auto type) { return launch_rows(permute_kernel<typename decltype(type)::type>, p.S, launch, p); });
}
Status launch_unpermute(const UnpermuteParams& p, const Launch& launch) {
  return visit_dtype<ElementTypes>(p.dtype,
                                   [&](auto type) { return launch_rows(unpermute_kernel<typename decltype(type)::type>, p.T, launch, p); });
}
Status launch_unpermute_backward(const UnpermuteBackwardParams& p, const Launch& launch) {
  return visit_dtype<ElementTypes>(
      p.dtype, [&](auto type) { return launch_rows(unpermute_backward_kernel<typename decltype(type)::type>, p.S, launch, p); });
}

}  // namespace

const Kernel<PermuteParams> permute = {nullptr, nullptr, launch_permute};
const Kernel<UnpermuteParams> unpermute = {nullptr, nullptr, launch_unpermute};
const Kernel<UnpermuteBackwardParams> unpermute_backward = {nullptr, nullptr, launch_unpermute_backward};

}  // namespace moe::cuda
