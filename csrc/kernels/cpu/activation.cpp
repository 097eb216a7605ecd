// The activation between the two projections, forward and backward; the formulas are in ../activation.h.
// Rows are independent and each is processed in blocks of a fixed width: load to accumulators, compute, store. The block loops
// are free of branches and calls, so the compiler turns them into vector code.
#include "../activation.h"

#include <cstring>

#include "float_types.h"
#include "kernels.h"

namespace moe::cpu::MOE_ISA {
namespace {

constexpr int kBlock = 64;
constexpr int kLanes = 16;
constexpr int64_t kElementsPerTask = 16384;

// Where gate and up of output column i stand in a pre-activation row.
struct Columns {
  int64_t gate, up, step;
};
Columns columns(const Activation& a, int64_t I) { return a.interleaved ? Columns{0, 1, 2} : Columns{0, I, 1}; }

template <class T, class A>
inline void load(A* to, const T* from, int64_t step, int n) {
  if (step == 1) {
    for (int i = 0; i < n; ++i) to[i] = load_as<A>(from + i);
  } else {
    for (int i = 0; i < n; ++i) to[i] = load_as<A>(from + 2 * i);
  }
}
template <class T, class A>
inline void store(T* to, const A* from, int64_t step, int n) {
  if (step == 1) {
    for (int i = 0; i < n; ++i) store_from(to + i, from[i]);
  } else {
    for (int i = 0; i < n; ++i) store_from(to + 2 * i, from[i]);
  }
}

// Rows past the last expert's, if the offsets are known: they hold nothing.
int64_t used_rows(const int32_t* expert_offsets, int64_t E, int64_t S) { return expert_offsets ? expert_offsets[E] : S; }

template <class F>
void for_each_row(const Launch& launch, int64_t rows, int64_t width, const F& f) {
  const int64_t per_task = width < kElementsPerTask ? kElementsPerTask / (width > 0 ? width : 1) : 1;
  for_each_task(launch, (rows + per_task - 1) / per_task, [&](int64_t task, int) {
    const int64_t end = (task + 1) * per_task < rows ? (task + 1) * per_task : rows;
    for (int64_t r = task * per_task; r < end; ++r) f(r);
  });
}

// Block functions: in accumulators, so that they exist once per kind and accumulator type, not once per element type.
// up = nullptr: not gated.
template <class A>
struct Block {
  void (*value)(A* gate, const A* up, A alpha, A limit, int n);                        // gate becomes h
  void (*gradient)(A* gate, A* up, const A* grad, A* value, A alpha, A limit, int n);  // gate, up become their gradients
};

template <ActivationKind kind, class A>
void value_block(A* gate, const A* up, A alpha, A limit, int n) {
  if (up) {
    for (int i = 0; i < n; ++i) gate[i] = gated_value<kind>(gate[i], up[i], alpha, limit);
  } else {
    for (int i = 0; i < n; ++i) gate[i] = activate<kind>(gate[i], alpha).value;
  }
}

template <ActivationKind kind, class A>
void gradient_block(A* __restrict gate, A* __restrict up, const A* __restrict grad, A* __restrict value, A alpha, A limit, int n) {
  if (up) {
    for (int i = 0; i < n; ++i) {
      const GatedGradient<A> g = gated_gradient<kind>(gate[i], up[i], alpha, limit);
      value[i] = g.value;
      gate[i] = grad[i] * g.d_gate;
      up[i] = grad[i] * g.d_up;
    }
  } else {
    for (int i = 0; i < n; ++i) {
      const ValueAndSlope<A> a = activate<kind>(gate[i], alpha);
      value[i] = a.value;
      gate[i] = grad[i] * a.slope;
    }
  }
}

template <class A>
Block<A> block_functions(ActivationKind kind) {
  return visit_activation(kind, [](auto k) { return Block<A>{value_block<decltype(k)::kind, A>, gradient_block<decltype(k)::kind, A>}; });
}

template <class T>
void forward_row(const GatedActivationParams& p, Block<acc_t<T>> block, int64_t r) {
  using A = acc_t<T>;
  const A alpha = A(p.activation.alpha), limit = p.activation.has_limit ? A(p.activation.limit) : A(INFINITY);
  const bool gated = p.activation.gated;
  const Columns c = columns(p.activation, p.I);
  const T* pre = static_cast<const T*>(p.pre_act) + r * p.I * (gated ? 2 : 1);
  T* out = static_cast<T*>(p.out) + r * p.I;
  A gate[kBlock], up[kBlock];
  for (int64_t i0 = 0; i0 < p.I; i0 += kBlock) {
    const int n = p.I - i0 < kBlock ? static_cast<int>(p.I - i0) : kBlock;
    load(gate, pre + c.gate + i0 * c.step, c.step, n);
    if (gated) load(up, pre + c.up + i0 * c.step, c.step, n);
    block.value(gate, gated ? up : nullptr, alpha, limit, n);
    store(out + i0, gate, 1, n);
  }
}

Status launch_forward(const GatedActivationParams& p, const Launch& launch) {
  return visit_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t used = used_rows(p.expert_offsets, p.E, p.S);
    const Block<acc_t<T>> block = block_functions<acc_t<T>>(p.activation.kind);
    for_each_row(launch, used, p.I, [&](int64_t r) { forward_row<T>(p, block, r); });
    std::memset(static_cast<char*>(p.out) + used * p.I * sizeof(T), 0, (p.S - used) * p.I * sizeof(T));
    return Status::kOk;
  });
}

// <grad_out[token], down_bias[expert]>: what the down bias adds to the routing weight's gradient.
template <class T>
acc_t<T> bias_dot(const GatedActivationBackwardParams& p, int64_t r, int32_t slot) {
  using A = acc_t<T>;
  int64_t low = 0, high = p.E;  // the expert whose rows contain r
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.expert_offsets[middle] <= r ? low : high) = middle;
  }
  const T* bias = static_cast<const T*>(at(p.down_bias, low, sizeof(T)));
  const T* grad = static_cast<const T*>(p.grad_out.data) + slot / p.grad_out.top_k * p.grad_out.stride;
  double sum = 0;  // one chain of H additions
  for (int64_t h = 0; h < p.H; ++h) sum += load_as<A>(grad + h) * load_as<A>(bias + h);
  return static_cast<A>(sum);
}

template <class T>
void backward_row(const GatedActivationBackwardParams& p, Block<acc_t<T>> block, int64_t r) {
  using A = acc_t<T>;
  const bool gated = p.activation.gated;
  const A alpha = A(p.activation.alpha), limit = p.activation.has_limit ? A(p.activation.limit) : A(INFINITY);
  const int32_t slot = p.row_to_slot ? p.row_to_slot[r] : -1;
  const A w = p.slot_weights ? static_cast<const A*>(p.slot_weights)[slot] : A(1);
  const Columns c = columns(p.activation, p.I);
  const int64_t width = p.I * (gated ? 2 : 1);
  const T* pre = static_cast<const T*>(p.pre_act) + r * width;
  const T* grad_row = p.grad ? static_cast<const T*>(p.grad) + r * p.I : nullptr;
  T* grad_pre = p.grad_pre ? static_cast<T*>(p.grad_pre) + r * width : nullptr;
  T* scaled = p.scaled ? static_cast<T*>(p.scaled) + r * p.I : nullptr;
  A gate[kBlock], up[kBlock], grad[kBlock] = {}, value[kBlock], lane[kLanes] = {};
  for (int64_t i0 = 0; i0 < p.I; i0 += kBlock) {
    const int n = p.I - i0 < kBlock ? static_cast<int>(p.I - i0) : kBlock;
    if (grad_row) load(grad, grad_row + i0, 1, n);
    load(gate, pre + c.gate + i0 * c.step, c.step, n);
    if (gated) load(up, pre + c.up + i0 * c.step, c.step, n);
    block.gradient(gate, gated ? up : nullptr, grad, value, alpha, limit, n);
    if (grad_pre) {
      for (int i = 0; i < n; ++i) gate[i] *= w;
      store(grad_pre + c.gate + i0 * c.step, gate, c.step, n);
    }
    if (grad_pre && gated) {
      for (int i = 0; i < n; ++i) up[i] *= w;
      store(grad_pre + c.up + i0 * c.step, up, c.step, n);
    }
    if (p.grad_slot_weights) {
      for (int i = 0; i < n; ++i) grad[i] *= value[i];
      for (int i = n; i < kBlock; ++i) grad[i] = A(0);
      for (int j = 0; j < kBlock; j += kLanes)
        for (int l = 0; l < kLanes; ++l) lane[l] += grad[j + l];
    }
    if (scaled) {
      for (int i = 0; i < n; ++i) value[i] *= w;
      store(scaled + i0, value, 1, n);
    }
  }
  if (p.grad_slot_weights) {
    A sum = p.down_bias ? bias_dot<T>(p, r, slot) : A(0);
    for (int l = 0; l < kLanes; ++l) sum += lane[l];
    static_cast<A*>(p.grad_slot_weights)[slot] = sum;
  }
}

// A dropped slot has no row: its gradient is the zero that the caller put there.
Status launch_backward(const GatedActivationBackwardParams& p, const Launch& launch) {
  return visit_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t used = used_rows(p.expert_offsets, p.E, p.S), width = p.I * (p.activation.gated ? 2 : 1);
    const Block<acc_t<T>> block = block_functions<acc_t<T>>(p.activation.kind);
    for_each_row(launch, used, p.I, [&](int64_t r) { backward_row<T>(p, block, r); });
    if (p.grad_pre) std::memset(static_cast<char*>(p.grad_pre) + used * width * sizeof(T), 0, (p.S - used) * width * sizeof(T));
    if (p.scaled) std::memset(static_cast<char*>(p.scaled) + used * p.I * sizeof(T), 0, (p.S - used) * p.I * sizeof(T));
    return Status::kOk;
  });
}

}  // namespace

const Kernel<GatedActivationParams> gated_activation = {nullptr, nullptr, launch_forward};
const Kernel<GatedActivationBackwardParams> gated_activation_backward = {nullptr, nullptr, launch_backward};

}  // namespace moe::cpu::MOE_ISA
