// Between token order and expert-sorted order; the formulas stand in ../params.h, the blocks of rows in row_access.h.
// unpermute sums over k in order, in registers: no atomics, so results repeat bit for bit.
#include "element.cuh"
#include "kernels.h"

namespace moe::cuda {
namespace {

constexpr int kAccessesInFlight = 4;  // of a thread that copies
constexpr int kRowsInFlight = 8;      // of a thread that sums

// What a map says, or -1 where that is no row or slot of the `size` that there are: as for a dropped one, nothing is read.
__device__ __forceinline__ int32_t inside(int32_t entry, int64_t size) {
  return static_cast<uint32_t>(entry) < static_cast<uint32_t>(size) ? entry : -1;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) permute_kernel(PermuteParams p) {
  const int64_t r = row_of_block(), step = column_step<V>();
  if (r >= p.S) return;
  const int32_t slot = inside(p.x.row_to_slot[r], p.S);
  T* out = static_cast<T*>(p.out) + r * p.H;
  const T* x = static_cast<const T*>(p.x.data) + (slot < 0 ? 0 : slot / p.x.top_k * p.x.stride);
  for (int64_t h = first_column<V>(); h < p.H; h += kAccessesInFlight * step) {
    Pack<T, V> part[kAccessesInFlight];
#pragma unroll
    for (int i = 0; i < kAccessesInFlight; ++i) {
      if (slot >= 0 && h + i * step < p.H) part[i] = load<V>(x + h + i * step);
    }
#pragma unroll
    for (int i = 0; i < kAccessesInFlight; ++i) {
      if (h + i * step < p.H) store(out + h + i * step, part[i]);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3) unpermute_kernel(UnpermuteParams p) {
  using A = acc_t<T>;
  const int64_t t = row_of_block();
  if (t >= p.T) return;
  const A* weights = static_cast<const A*>(p.slot_weights);
  for (int64_t h = first_column<V>(); h < p.H; h += column_step<V>()) {
    A sum[V] = {};
    for (int64_t k = 0; k < p.K; k += kRowsInFlight) {
      Pack<T, V> part[kRowsInFlight];  // zero where there is no row
      A w[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const int64_t slot = t * p.K + k + i, row = k + i < p.K ? inside(p.slot_to_row[slot], p.T * p.K) : -1;
        w[i] = row >= 0 && weights ? weights[slot] : A(1);
        if (row >= 0) part[i] = load<V>(static_cast<const T*>(p.rows) + row * p.H + h);
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += w[i] * to_acc(part[i].at[v]);
      }
    }
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.at[v] = from_acc<T>(sum[v]);
    store(static_cast<T*>(p.out) + t * p.H + h, out);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) unpermute_backward_kernel(UnpermuteBackwardParams p) {
  using A = acc_t<T>;
  __shared__ A scratch[kWarps];
  const int64_t r = row_of_block();
  const int32_t slot = r < p.S ? inside(p.grad.row_to_slot[r], p.S) : -1;
  T* grad_row = p.grad_rows ? static_cast<T*>(p.grad_rows) + r * p.H : nullptr;
  if (grad_row && r < p.S && slot < 0) clear_row<V>(grad_row, p.H);
  const A w = p.slot_weights && slot >= 0 ? static_cast<const A*>(p.slot_weights)[slot] : A(1);
  const T* grad = static_cast<const T*>(p.grad.data) + (slot < 0 ? 0 : slot / p.grad.top_k * p.grad.stride);
  const T* row = static_cast<const T*>(p.rows) + r * p.H;
  A dot = 0;
  for (int64_t h = first_column<V>(); slot >= 0 && h < p.H; h += column_step<V>()) {
    const Pack<T, V> g = load<V>(grad + h);
    if (p.grad_slot_weights) {
      const Pack<T, V> x = load<V>(row + h);
#pragma unroll
      for (int v = 0; v < V; ++v) dot += to_acc(g.at[v]) * to_acc(x.at[v]);
    }
    if (!grad_row) continue;
    Pack<T, V> scaled;
#pragma unroll
    for (int v = 0; v < V; ++v) scaled.at[v] = from_acc<T>(w * to_acc(g.at[v]));
    store(grad_row + h, scaled);
  }
  if (!p.grad_slot_weights) return;
  dot = row_sum(dot, scratch);
  if (threadIdx.x == 0 && slot >= 0) static_cast<A*>(p.grad_slot_weights)[slot] = dot;
}

Status launch_permute(const PermuteParams& p, const Launch& launch) {
  return visit_access(p.dtype, is_wide(p), [&](auto access) {
    constexpr int V = decltype(access)::kWidth;
    return launch_grid(permute_kernel<typename decltype(access)::Element, V>, row_grid(p.S, divide_up(p.H, V * kAccessesInFlight)), launch,
                       p);
  });
}
Status launch_unpermute(const UnpermuteParams& p, const Launch& launch) {
  return visit_access(p.dtype, is_wide(p), [&](auto access) {
    constexpr int V = decltype(access)::kWidth;
    return launch_grid(unpermute_kernel<typename decltype(access)::Element, V>, row_grid(p.T, p.H / V), launch, p);
  });
}
Status launch_unpermute_backward(const UnpermuteBackwardParams& p, const Launch& launch) {
  return visit_access(p.dtype, is_wide(p), [&](auto access) {
    constexpr int V = decltype(access)::kWidth;
    return launch_grid(unpermute_backward_kernel<typename decltype(access)::Element, V>, row_grid(p.S, p.H / V), launch, p);
  });
}

}  // namespace

const Kernel<PermuteParams> permute = {nullptr, nullptr, launch_permute};
const Kernel<UnpermuteParams> unpermute = {nullptr, nullptr, launch_unpermute};
const Kernel<UnpermuteBackwardParams> unpermute_backward = {nullptr, nullptr, launch_unpermute_backward};

}  // namespace moe::cuda
