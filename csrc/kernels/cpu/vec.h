// One register of accumulators in the natural width of the instruction set, written with vector extensions so that one
// source serves every set: 4, 8 or 16 float32 lanes. Loads widen bfloat16 and float16; nothing needs alignment.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "float_types.h"

namespace moe::cpu::MOE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A, int bytes>
struct VecType {
  typedef A type __attribute__((vector_size(bytes)));
};
template <class A>
using Vec = typename VecType<A, kVectorBytes>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class V>
inline V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// N 16-bit values as 32-bit values. (The general vector conversion compiles to several instructions per load.)
template <int N>
inline typename VecType<uint32_t, N * 4>::type widen_bits(const void* p) {
  using U32 = typename VecType<uint32_t, N * 4>::type;
#if defined(__AVX512F__)
  if constexpr (N == 16) return reinterpret_cast<U32>(_mm512_maskz_cvtepu16_epi32(0xffff, load_raw<__m256i>(p)));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return reinterpret_cast<U32>(_mm256_cvtepu16_epi32(load_raw<__m128i>(p)));
#endif
  if constexpr (N == 4) {
    typedef uint16_t U16 __attribute__((vector_size(16)));
    U16 bits{};
    std::memcpy(&bits, p, 8);
    return reinterpret_cast<U32>(__builtin_shufflevector(bits, U16{}, 0, 8, 1, 9, 2, 10, 3, 11));
  }
}

// N contiguous elements as accumulators.
template <int N, class T>
inline typename VecType<acc_t<T>, N * sizeof(acc_t<T>)>::type load_lanes(const T* p) {
  using V = typename VecType<acc_t<T>, N * sizeof(acc_t<T>)>::type;
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return load_raw<V>(p);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return reinterpret_cast<V>(widen_bits<N>(p) << 16);
  } else {
#if defined(__F16C__)
    if constexpr (N == 4)
      return reinterpret_cast<V>(_mm_cvtph_ps(_mm_loadl_epi64(static_cast<const __m128i*>(static_cast<const void*>(p)))));
    if constexpr (N == 8) return reinterpret_cast<V>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#if defined(__AVX512F__)
    if constexpr (N == 16) return reinterpret_cast<V>(_mm512_maskz_cvtph_ps(0xffff, load_raw<__m256i>(p)));
#endif
#else
    float widened[N];
    for (int i = 0; i < N; ++i) widened[i] = to_acc(p[i]);
    return load_raw<V>(widened);
#endif
  }
}

template <class T>
inline Vec<acc_t<T>> load(const T* p) {
  return load_lanes<kLanes<acc_t<T>>>(p);
}

// The first `count` lanes from memory, the others zero; nothing past them is read.
template <class T>
inline Vec<acc_t<T>> load_partial(const T* p, int64_t count) {
  T padded[kLanes<acc_t<T>>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

template <class V, class A>
inline void store(A* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

typedef float Float4 __attribute__((vector_size(16)));

inline Float4 interleave_low(Float4 a, Float4 b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Float4 interleave_high(Float4 a, Float4 b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }

inline Float4 fold(Float4 v) { return v; }
#if defined(__AVX__)
typedef float Float8 __attribute__((vector_size(32)));
inline Float4 fold(Float8 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7); }
#endif
#if defined(__AVX512F__)
typedef float Float16Lanes __attribute__((vector_size(64)));
inline Float4 fold(Float16Lanes v) {
  return fold(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#endif

// sums[i] = sum of the lanes of v[i], in a fixed order.
inline void sum_lanes(const Vec<float> (&v)[4], float* sums) {
  const Float4 a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
  const Float4 ab = interleave_low(a, b) + interleave_high(a, b), cd = interleave_low(c, d) + interleave_high(c, d);
  store(sums, __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
}
inline void sum_lanes(const Vec<double> (&v)[4], double* sums) {
  for (int i = 0; i < 4; ++i) {
    sums[i] = v[i][0];
    for (int lane = 1; lane < kLanes<double>; ++lane) sums[i] += v[i][lane];
  }
}

}  // namespace moe::cpu::MOE_ISA
