// The activation between the two projections, forward and backward; formulas in ../activation.h and ../params.h, the blocks of rows
// in row_access.h. Rows past expert_offsets[E] belong to dropped slots: they are written as zero and not read.
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

// Gate and up of V outputs: from two halves of a row, or from V neighbouring pairs.
template <class T, int V>
struct GateUp {
  Pack<T, V> gate, up;
};

template <int V, class T>
__device__ __forceinline__ GateUp<T, V> load_gate_up(const T* row, int64_t i, int64_t I, bool interleaved) {
  const Pack<T, V> first = load<V>(row + (interleaved ? 2 * i : i)), second = load<V>(row + (interleaved ? 2 * i + V : I + i));
  GateUp<T, V> x{first, second};
  if constexpr (V > 1) {
#pragma unroll
    for (int v = 0; interleaved && v < V; ++v) {
      const Pack<T, V>& from = v < V / 2 ? first : second;
      x.gate.at[v] = from.at[2 * v % V];
      x.up.at[v] = from.at[2 * v % V + 1];
    }
  }
  return x;
}

template <int V, class T>
__device__ __forceinline__ void store_gate_up(T* row, int64_t i, int64_t I, bool interleaved, const GateUp<T, V>& x) {
  Pack<T, V> first = x.gate, second = x.up;
  if constexpr (V > 1) {
#pragma unroll
    for (int v = 0; interleaved && v < V; ++v) {
      Pack<T, V>& to = v < V / 2 ? first : second;
      to.at[2 * v % V] = x.gate.at[v];
      to.at[2 * v % V + 1] = x.up.at[v];
    }
  }
  store(row + (interleaved ? 2 * i : i), first);
  store(row + (interleaved ? 2 * i + V : I + i), second);
}

template <class T, ActivationKind kind, int V>
__global__ void __launch_bounds__(kThreads) forward_kernel(GatedActivationParams p) {
  const int64_t r = row_of_block();
  if (r >= p.S) return;
  const bool gated = p.activation.gated;
  const Limits<acc_t<T>> c(p.activation);
  const T* pre = static_cast<const T*>(p.pre_act) + r * p.I * (gated ? 2 : 1);
  T* out = static_cast<T*>(p.out) + r * p.I;
  if (p.expert_offsets && r >= p.expert_offsets[p.E]) return clear_row<V>(out, p.I);
  for (int64_t i = first_column<V>(); i < p.I; i += column_step<V>()) {
    Pack<T, V> h;
    if (gated) {
      const GateUp<T, V> x = load_gate_up<V>(pre, i, p.I, p.activation.interleaved);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        h.at[v] = from_acc<T>(gated_value<kind>(to_acc(x.gate.at[v]), to_acc(x.up.at[v]), c.alpha, c.limit));
      }
    } else {
      const Pack<T, V> x = load<V>(pre + i);
#pragma unroll
      for (int v = 0; v < V; ++v) h.at[v] = from_acc<T>(activate<kind>(to_acc(x.at[v]), c.alpha).value);
    }
    store(out + i, h);
  }
}

// This thread's part of <grad_out[token], down_bias[expert of r]>.
template <int V, class T>
__device__ acc_t<T> bias_dot(const GatedActivationBackwardParams& p, int64_t r, int32_t slot) {
  int64_t low = 0, high = p.E;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.expert_offsets[middle] <= r ? low : high) = middle;
  }
  const T* bias = expert_data<T>(p.down_bias, low);
  const T* grad = static_cast<const T*>(p.grad_out.data) + slot / p.grad_out.top_k * p.grad_out.stride;
  acc_t<T> sum = 0;
  for (int64_t h = first_column<V>(); h < p.H; h += column_step<V>()) {
    const Pack<T, V> g = load<V>(grad + h), b = load<V>(bias + h);
#pragma unroll
    for (int v = 0; v < V; ++v) sum += to_acc(g.at[v]) * to_acc(b.at[v]);
  }
  return sum;
}

template <class T, ActivationKind kind, int V>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(GatedActivationBackwardParams p) {
  using A = acc_t<T>;
  __shared__ A scratch[2][kWarps];
  const int64_t r = row_of_block();
  const bool gated = p.activation.gated, used = r < (p.expert_offsets ? p.expert_offsets[p.E] : p.S);
  const Limits<A> c(p.activation);
  const int64_t width = p.I * (gated ? 2 : 1);
  const T* pre = static_cast<const T*>(p.pre_act) + r * width;
  T* grad_pre = p.grad_pre ? static_cast<T*>(p.grad_pre) + r * width : nullptr;
  T* scaled = p.scaled ? static_cast<T*>(p.scaled) + r * p.I : nullptr;
  if (!used && r < p.S && grad_pre) clear_row<V>(grad_pre, width);
  if (!used && r < p.S && scaled) clear_row<V>(scaled, p.I);
  const int32_t slot = used && p.row_to_slot ? p.row_to_slot[r] : -1;
  const A w = used && p.slot_weights ? static_cast<const A*>(p.slot_weights)[slot] : A(1);
  A dot = 0;
  for (int64_t i = first_column<V>(); used && i < p.I; i += column_step<V>()) {
    Pack<T, V> grad, scaled_value;
    if (p.grad) grad = load<V>(static_cast<const T*>(p.grad) + r * p.I + i);
    if (gated) {
      GateUp<T, V> x = load_gate_up<V>(pre, i, p.I, p.activation.interleaved);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A g = to_acc(grad.at[v]);
        const GatedGradient<A> h = gated_gradient<kind>(to_acc(x.gate.at[v]), to_acc(x.up.at[v]), c.alpha, c.limit);
        x.gate.at[v] = from_acc<T>(w * g * h.d_gate);
        x.up.at[v] = from_acc<T>(w * g * h.d_up);
        scaled_value.at[v] = from_acc<T>(w * h.value);
        dot += g * h.value;
      }
      if (grad_pre) store_gate_up(grad_pre, i, p.I, p.activation.interleaved, x);
    } else {
      Pack<T, V> x = load<V>(pre + i);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A g = to_acc(grad.at[v]);
        const ValueAndSlope<A> h = activate<kind>(to_acc(x.at[v]), c.alpha);
        x.at[v] = from_acc<T>(w * g * h.slope);
        scaled_value.at[v] = from_acc<T>(w * h.value);
        dot += g * h.value;
      }
      if (grad_pre) store(grad_pre + i, x);
    }
    if (scaled) store(scaled + i, scaled_value);
  }
  if (!p.grad_slot_weights) return;
  dot = row_sum(dot, scratch[0]);
  if (p.down_bias) dot += row_sum(used ? bias_dot<V, T>(p, r, slot) : A(0), scratch[1]);
  if (threadIdx.x == 0 && used) static_cast<A*>(p.grad_slot_weights)[slot] = dot;
}

Status launch_forward(const GatedActivationParams& p, const Launch& launch) {
  return visit_access(p.dtype, is_wide(p), [&](auto access) {
    using T = typename decltype(access)::Element;
    constexpr int V = decltype(access)::kWidth;
    return visit_activation(
        p.activation.kind, [&](auto k) { return launch_grid(forward_kernel<T, decltype(k)::kind, V>, row_grid(p.S, p.I / V), launch, p); });
  });
}

int64_t workspace_backward(const GatedActivationBackwardParams& p, int) { return pointer_table_bytes(p.down_bias.list, p.E); }

Status launch_backward(const GatedActivationBackwardParams& host, const Launch& launch) {
  GatedActivationBackwardParams p = host;
  char* place = static_cast<char*>(launch.workspace);
  if (const Status s = move_to_device(p.down_bias, p.E, place, launch); s != Status::kOk) return s;
  return visit_access(p.dtype, is_wide(host), [&](auto access) {
    using T = typename decltype(access)::Element;
    constexpr int V = decltype(access)::kWidth;
    return visit_activation(p.activation.kind, [&](auto k) {
      return launch_grid(backward_kernel<T, decltype(k)::kind, V>, row_grid(p.S, p.I / V), launch, p);
    });
  });
}

}  // namespace

const Kernel<GatedActivationParams> gated_activation = {nullptr, nullptr, launch_forward};
const Kernel<GatedActivationBackwardParams> gated_activation_backward = {nullptr, workspace_backward, launch_backward};

}  // namespace moe::cuda
