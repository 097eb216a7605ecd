// Functions of this folder that are no memory traffic run on the host too, where tests compare them with brute force.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MOE_HD __host__ __device__ __forceinline__
#else
#define MOE_HD inline
#endif

namespace moe::cuda {

template <class T>
MOE_HD constexpr T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
MOE_HD constexpr T greatest(T a, T b) {
  return a > b ? a : b;
}
MOE_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
MOE_HD constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// How many of the warp's 32 lanes fulfil the predicate; on the device all lanes call it together.
template <class F>
MOE_HD int count_lanes(const F& holds) {
#if defined(__CUDA_ARCH__)
  return __popc(__ballot_sync(0xffffffffu, holds(static_cast<int>(threadIdx.x) % 32)));
#else
  int count = 0;
  for (int lane = 0; lane < 32; ++lane) count += holds(lane) ? 1 : 0;
  return count;
#endif
}

}  // namespace moe::cuda
