// Every activation and its derivative, once, for host and device. A is the accumulator type: float, or double for float64.
//   gated:   h = act(g) * up,  g = min(gate, limit),  up = clamp(up, -limit, limit)     (limit = +inf when there is none)
//   ungated: h = act(g)
// swigluoai is gpt-oss's form: act(g) = g * sigmoid(alpha * g), multiplied by (up + 1). Where a clamp is active its derivative is 0.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "params.h"

#if defined(__CUDACC__)
#define MOE_FN static __host__ __device__ __forceinline__
#else
#define MOE_FN static inline __attribute__((always_inline))
#endif

namespace moe {

MOE_FN double exp_(double x) { return exp(x); }

// exp(x) within 2 ulp for x in [-87, 88]. Below that it is 0, above infinity.
#if !defined(__CUDA_ARCH__)
MOE_FN float exp_(float argument) {
  float x = argument < -87.0f ? -87.0f : argument;
  x = x > 88.0f ? 88.0f : x;
  // x = n ln2 + r, a degree-6 polynomial on |r| <= ln2/2, and 2^n put into the exponent. Free of branches and calls, so that a loop
  // over it becomes vector code.
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits, scale;
  memcpy(&bits, &shifted, 4);
  scale = (bits + 127u) << 23;
  float two_n;
  memcpy(&two_n, &scale, 4);
  const float small = argument < -87.0f ? 0.0f : p * two_n;
  return argument > 88.0f ? INFINITY : small;
}
#else
// On the device within 5 ulp; outside of [-87, 88], and for NaN, it is what it is at an end: no result below depends on more.
MOE_FN float exp_(float argument) {
  const float x = fminf(fmaxf(argument, -87.0f), 88.0f);
  // 2^t with t = x log2(e), and what t lacks to that product made up for: 2^d = 1 + d ln2.
  const float t = x * 1.44269504088896341f, d = fmaf(x, 1.44269504088896341f, -t) + x * 1.92596303e-8f;
  float two_t;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(two_t) : "f"(t));
  return fmaf(two_t * 0.69314718f, d, two_t);
}
#endif

MOE_FN double reciprocal(double x) { return 1.0 / x; }
// Within 1 ulp; on the device 0 where the result would be below the smallest normal number.
MOE_FN float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return 1.0f / x;
#endif
}

// sigmoid(x) and 1 - sigmoid(x), both without cancellation, and without inf * 0 where exp(-x) overflows.
template <class A>
struct Sigmoid {
  A value, rest;
};
template <class A>
MOE_FN Sigmoid<A> sigmoid_(A x) {
  const A e = exp_(-x), s = reciprocal(A(1) + e);
  return {s, e > A(1) ? A(1) - s : e * s};
}

// act(g) and its derivative. One specialisation per ActivationKind.
template <class A>
struct ValueAndSlope {
  A value, slope;
};

template <ActivationKind kind, class A>
MOE_FN ValueAndSlope<A> activate(A g, A alpha) {
  if constexpr (kind == ActivationKind::kSilu) {
    const Sigmoid<A> s = sigmoid_(g);
    return {g * s.value, s.value * (A(1) + g * s.rest)};
  } else if constexpr (kind == ActivationKind::kSwigluOai) {
    const Sigmoid<A> s = sigmoid_(alpha * g);
    return {g * s.value, s.value * (A(1) + alpha * g * s.rest)};
  } else if constexpr (kind == ActivationKind::kGelu) {
    const A cdf = A(0.5) * (A(1) + std::erf(g * A(0.70710678118654752440)));
    return {g * cdf, cdf + g * A(0.39894228040143267794) * exp_(A(-0.5) * g * g)};
  } else if constexpr (kind == ActivationKind::kGeluTanh) {  // 0.5 (1 + tanh u) = sigmoid(2u)
    const A k = A(1.5957691216057307117);                    // 2 sqrt(2/pi)
    const Sigmoid<A> s = sigmoid_(k * (g + A(0.044715) * g * g * g));
    return {g * s.value, s.value + g * s.value * s.rest * k * (A(1) + A(0.134145) * g * g)};
  } else if constexpr (kind == ActivationKind::kRelu) {
    return {g <= A(0) ? A(0) : g, g <= A(0) ? A(0) : A(1)};  // NaN stays NaN
  } else {
    const A r = g <= A(0) ? A(0) : g;
    return {r * r, A(2) * r};
  }
}

// NaN stays NaN.
template <class A>
MOE_FN A clamp_max(A x, A limit) {
  return x > limit ? limit : x;
}
template <class A>
MOE_FN A clamp_both(A x, A limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}
#if defined(__CUDA_ARCH__)  // an instruction each
MOE_FN float clamp_max(float x, float limit) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(limit));
  return r;
}
MOE_FN float clamp_both(float x, float limit) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(clamp_max(x, limit)), "f"(-limit));
  return r;
}
#endif

template <ActivationKind kind, class A>
MOE_FN A gated_value(A gate, A up, A alpha, A limit) {
  const A offset = kind == ActivationKind::kSwigluOai ? A(1) : A(0);
  return activate<kind>(clamp_max(gate, limit), alpha).value * (clamp_both(up, limit) + offset);
}

template <class A>
struct GatedGradient {
  A value, d_gate, d_up;  // h, dh/dgate, dh/dup
};

template <ActivationKind kind, class A>
MOE_FN GatedGradient<A> gated_gradient(A gate, A up, A alpha, A limit) {
  const A offset = kind == ActivationKind::kSwigluOai ? A(1) : A(0);
  const ValueAndSlope<A> act = activate<kind>(clamp_max(gate, limit), alpha);
  const A factor = clamp_both(up, limit) + offset;
  const A d_gate = gate > limit ? A(0) : act.slope * factor;
  const A d_up = (up > limit || up < -limit) ? A(0) : act.value;
  return {act.value * factor, d_gate, d_up};
}

// f(KindConstant<kind>{}) for a run-time kind.
template <ActivationKind k>
struct KindConstant {
  static constexpr ActivationKind kind = k;
};

#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // f may be for the host or the device
#endif
template <class F>
MOE_FN auto visit_activation(ActivationKind kind, const F& f) {
  switch (kind) {
    case ActivationKind::kSilu:
      return f(KindConstant<ActivationKind::kSilu>{});
    case ActivationKind::kGelu:
      return f(KindConstant<ActivationKind::kGelu>{});
    case ActivationKind::kGeluTanh:
      return f(KindConstant<ActivationKind::kGeluTanh>{});
    case ActivationKind::kRelu:
      return f(KindConstant<ActivationKind::kRelu>{});
    case ActivationKind::kRelu2:
      return f(KindConstant<ActivationKind::kRelu2>{});
    default:
      return f(KindConstant<ActivationKind::kSwigluOai>{});
  }
}

}  // namespace moe
