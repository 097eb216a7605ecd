// Element types on the device, their accumulators, accesses of one or several elements, and the one way kernels here are launched.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../params.h"
#include "../visit_dtype.h"
#include "row_access.h"

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

// V neighbouring elements, which one access moves: 16 bytes, or a single element.
template <class T, int V>
struct Pack {
  static_assert(V == 1 || V * sizeof(T) == kAccessBytes);
  T at[V] = {};
};

// From and to global memory. Written as instructions: the compiler splits vectors whose address it rewrites in a loop.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  Pack<T, V> pack;
  if constexpr (V == 1) {
    pack.at[0] = *from;
  } else {
    uint4 bytes;
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bytes.x), "=r"(bytes.y), "=r"(bytes.z), "=r"(bytes.w)
                 : "l"(__cvta_generic_to_global(from)));
    memcpy(pack.at, &bytes, sizeof(bytes));
  }
  return pack;
}

template <int V, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, V>& pack) {
  if constexpr (V == 1) {
    *to = pack.at[0];
  } else {
    uint4 bytes;
    memcpy(&bytes, pack.at, sizeof(bytes));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(bytes.x), "r"(bytes.y), "r"(bytes.z),
                 "r"(bytes.w)
                 : "memory");
  }
}

// f(Access<T, V>{}) for an element type and a decision of row_access.h.
template <class T, int V>
struct Access {
  using Element = T;
  static constexpr int kWidth = V;
};
template <class F>
Status visit_access(DType dtype, bool wide, const F& f) {
  return visit_dtype<ElementTypes>(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return wide ? f(Access<T, kAccessBytes / sizeof(T)>{}) : f(Access<T, 1>{});
  });
}

constexpr int kWarps = kThreads / 32;

// Blocks of several rows side by side: threadIdx.x runs along a row, threadIdx.y over the rows of a block. The last block may
// have rows too many.
__device__ __forceinline__ int64_t row_of_block() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
template <int V>
__device__ __forceinline__ int64_t first_column() {
  return threadIdx.x * V;
}
template <int V>
__device__ __forceinline__ int64_t column_step() {
  return blockDim.x * V;
}

template <int V, class T>
__device__ __forceinline__ void clear_row(T* row, int64_t width) {
  for (int64_t i = first_column<V>(); i < width; i += column_step<V>()) store(row + i, Pack<T, V>{});
}

// Sum over the threads of a row in a fixed order (within warps by shuffles, then over warps), valid where threadIdx.x is 0. All
// threads of the block call it. `scratch`: kWarps values.
template <class A>
__device__ A row_sum(A v, A* scratch) {
  for (int delta = 16; delta > 0; delta /= 2) v += __shfl_down_sync(0xffffffffu, v, delta);
  const int warps = blockDim.x / 32, warp = threadIdx.y * warps + threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) scratch[warp] = v;
  __syncthreads();
  A sum = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < warps; ++w) sum += scratch[warp + w];
  return sum;
}

// Whether the launches so far were accepted.
inline Status launched() { return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed; }

// Whether a call of the runtime was. A refusal is taken from the runtime too, or the next launch, of whatever, would report it.
inline Status accepted(cudaError_t error) {
  if (error == cudaSuccess) return Status::kOk;
  cudaGetLastError();
  return Status::kLaunchFailed;
}

// Of the current device, as 80, 90, 120; 0 when there is none.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (accepted(cudaGetDevice(&device)) != Status::kOk) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major * 10 + minor;
}

// Of the current device; 0 when there is none.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (accepted(cudaGetDevice(&device)) != Status::kOk) return 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

struct Grid {
  int64_t blocks;
  dim3 threads = kThreads;
  int shared = 0;  // bytes
};

// Nothing is launched for no blocks. More than 48 KB of shared memory have to be asked for.
template <class... Params, class... Args>
Status launch_grid(void (*kernel)(Params...), const Grid& grid, const Launch& launch, const Args&... args) {
  if (grid.blocks == 0) return Status::kOk;
  if (grid.blocks > INT32_MAX) return Status::kUnsupportedLayout;
  if (grid.shared > 48 * 1024) {
    const Status s = accepted(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared));
    if (s != Status::kOk) return s;
  }
  kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared, static_cast<cudaStream_t>(launch.stream)>>>(args...);
  return launched();
}

// The grid of rows of so many accesses.
inline Grid row_grid(int64_t rows, int64_t accesses) {
  const int threads = threads_per_row(accesses), rows_per_block = kThreads / threads;
  return {divide_up(rows, rows_per_block), dim3(threads, rows_per_block)};
}

}  // namespace moe::cuda
