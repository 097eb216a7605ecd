// The activation between the two projections, forward and backward, one block per row; formulas in ../activation.h and ../params.h.
#include "../activation.h"
#include "kernels.h"
#include "operands.cuh"
#include "pointer_table.h"

namespace moe::cuda {
namespace {

template <class A>
struct Limits {
  A alpha, limit;
  __device__ explicit Limits(const Activation& a) : alpha(A(a.alpha)), limit(a.has_limit ? A(a.limit) : A(INFINITY)) {}
};

template <class T, ActivationKind kind>
__global__ void __launch_bounds__(kThreads) forward_kernel(GatedActivationParams p) {
  using A = acc_t<T>;
  const int64_t r = blockIdx.x;
  const bool used = !p.expert_offsets || r < p.expert_offsets[p.E];
  const Limits<A> c(p.activation);
  const int64_t step = p.activation.interleaved ? 2 : 1, up = p.activation.interleaved ? 1 : p.I;
  const T* pre = static_cast<const T*>(p.pre_act) + r * p.I * (p.activation.gated ? 2 : 1);
  T* out = static_cast<T*>(p.out) + r * p.I;
  for (int64_t i = threadIdx.x; i < p.I; i += kThreads) {
    A h = 0;
    if (used && p.activation.gated) h = gated_value<kind>(to_acc(pre[i * step]), to_acc(pre[i * step + up]), c.alpha, c.limit);
    if (used && !p.activation.gated) h = activate<kind>(to_acc(pre[i]), c.alpha).value;
    out[i] = from_acc<T>(h);
  }
}

// <grad_out[token], down_bias[expert of r]>, summed by the whole block; valid in thread 0.
template <class T>
__device__ acc_t<T> bias_dot(const GatedActivationBackwardParams& p, int64_t r, int32_t slot, acc_t<T>* scratch) {
  int64_t low = 0, high = p.E;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.expert_offsets[middle] <= r ? low : high) = middle;
  }
  const T* bias = expert_data<T>(p.down_bias, low);
  const T* grad = static_cast<const T*>(p.grad_out.data) + slot / p.grad_out.top_k * p.grad_out.stride;
  acc_t<T> sum = 0;
  for (int64_t h = threadIdx.x; h < p.H; h += kThreads) sum += to_acc(grad[h]) * to_acc(bias[h]);
  return block_sum(sum, scratch);
}

template <class T, ActivationKind kind>
__global__ void __launch_bounds__(kThreads) backward_kernel(GatedActivationBackwardParams p) {
  using A = acc_t<T>;
  __shared__ A scratch[2][kWarps];
  const int64_t r = blockIdx.x;
  const bool gated = p.activation.gated, used = !p.expert_offsets || r < p.expert_offsets[p.E];  // the same for the whole block
  const Limits<A> c(p.activation);
  const int64_t step = p.activation.interleaved ? 2 : 1, up = p.activation.interleaved ? 1 : p.I, width = p.I * (gated ? 2 : 1);
  const T* pre = static_cast<const T*>(p.pre_act) + r * width;
  T* grad_pre = p.grad_pre ? static_cast<T*>(p.grad_pre) + r * width : nullptr;
  T* scaled = p.scaled ? static_cast<T*>(p.scaled) + r * p.I : nullptr;
  if (!used) {
    for (int64_t i = threadIdx.x; grad_pre && i < width; i += kThreads) grad_pre[i] = T(0);
    for (int64_t i = threadIdx.x; scaled && i < p.I; i += kThreads) scaled[i] = T(0);
    return;
  }
  const int32_t slot = p.row_to_slot ? p.row_to_slot[r] : -1;
  const A w = p.slot_weights ? static_cast<const A*>(p.slot_weights)[slot] : A(1);
  A dot = 0;
  for (int64_t i = threadIdx.x; i < p.I; i += kThreads) {
    const A grad = p.grad ? to_acc(static_cast<const T*>(p.grad)[r * p.I + i]) : A(0);
    A value;
    if (gated) {
      const GatedGradient<A> g = gated_gradient<kind>(to_acc(pre[i * step]), to_acc(pre[i * step + up]), c.alpha, c.limit);
      value = g.value;
      if (grad_pre) {
        grad_pre[i * step] = from_acc<T>(w * grad * g.d_gate);
        grad_pre[i * step + up] = from_acc<T>(w * grad * g.d_up);
      }
    } else {
      const ValueAndSlope<A> a = activate<kind>(to_acc(pre[i]), c.alpha);
      value = a.value;
      if (grad_pre) grad_pre[i] = from_acc<T>(w * grad * a.slope);
    }
    if (scaled) scaled[i] = from_acc<T>(w * value);
    dot += grad * value;
  }
  if (!p.grad_slot_weights) return;
  dot = block_sum(dot, scratch[0]);
  if (p.down_bias) dot += bias_dot<T>(p, r, slot, scratch[1]);
  if (threadIdx.x == 0) static_cast<A*>(p.grad_slot_weights)[slot] = dot;
}

Status launch_forward(const GatedActivationParams& p, const Launch& launch) {
  return visit_dtype<ElementTypes>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return visit_activation(p.activation.kind, [&](auto k) { return launch_rows(forward_kernel<T, decltype(k)::kind>, p.S, launch, p); });
  });
}

int64_t workspace_backward(const GatedActivationBackwardParams& p, int) { return pointer_table_bytes(p.down_bias.list, p.E); }

Status launch_backward(const GatedActivationBackwardParams& host, const Launch& launch) {
  GatedActivationBackwardParams p = host;
  char* place = static_cast<char*>(launch.workspace);
  if (const Status s = move_to_device(p.down_bias, p.E, place, launch); s != Status::kOk) return s;
  return visit_dtype<ElementTypes>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return visit_activation(p.activation.kind, [&](auto k) { return launch_rows(backward_kernel<T, decltype(k)::kind>, p.S, launch, p); });
  });
}

}  // namespace

const Kernel<GatedActivationParams> gated_activation = {nullptr, nullptr, launch_forward};
const Kernel<GatedActivationBackwardParams> gated_activation_backward = {nullptr, workspace_backward, launch_backward};

}  // namespace moe::cuda
