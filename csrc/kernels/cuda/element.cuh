// Element types on the device, their accumulators, and the one way kernels here are launched.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../params.h"
#include "../visit_dtype.h"

namespace moe::cuda {

struct ElementTypes {
  using Float64 = double;
  using Float32 = float;
  using BFloat16 = __nv_bfloat16;
  using Float16 = __half;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccumulatorOf<T>::type;

template <class T>
__device__ __forceinline__ acc_t<T> to_acc(T v) {
  return static_cast<acc_t<T>>(v);
}
template <class T>
__device__ __forceinline__ T from_acc(acc_t<T> v) {
  return static_cast<T>(v);  // round to nearest even for the 16-bit types
}

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Sum over the block in a fixed order (within warps by shuffles, then over warps), valid in thread 0. `scratch`: kWarps values.
template <class A>
__device__ A block_sum(A v, A* scratch) {
  for (int delta = 16; delta > 0; delta /= 2) v += __shfl_down_sync(0xffffffffu, v, delta);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  A sum = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kWarps; ++w) sum += scratch[w];
  return sum;
}

// Whether the launches so far were accepted.
inline Status launched() { return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed; }

// Of the current device, as 80, 90, 120; 0 when there is none.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major * 10 + minor;
}

// One block per row; row counts are below 2^31, the limit of gridDim.x. Nothing is launched for no rows.
template <class... Params, class... Args>
Status launch_rows(void (*kernel)(Params...), int64_t rows, const Launch& launch, Args... args) {
  if (rows == 0) return Status::kOk;
  kernel<<<static_cast<unsigned>(rows), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(args...);
  return launched();
}

}  // namespace moe::cuda
