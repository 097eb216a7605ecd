// Pointers from kernel arguments to device memory; see pointer_table.h.
#include "element.cuh"
#include "pointer_table.h"

namespace moe::cuda {
namespace {

constexpr int kPerLaunch = 480;  // kernel arguments hold 4 KB

struct Pointers {
  const void* at[kPerLaunch];
};

__global__ void __launch_bounds__(kThreads) store_kernel(const __grid_constant__ Pointers pointers, int count, const void** table) {
  for (int i = threadIdx.x; i < count; i += kThreads) table[i] = pointers.at[i];
}

}  // namespace

Status upload_pointers(const void* const* list, int64_t E, void* device_table, const Launch& launch) {
  for (int64_t first = 0; first < E; first += kPerLaunch) {
    const int count = static_cast<int>(E - first < kPerLaunch ? E - first : kPerLaunch);
    Pointers pointers{};
    for (int i = 0; i < count; ++i) pointers.at[i] = list[first + i];
    store_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(pointers, count,
                                                                               static_cast<const void**>(device_table) + first);
  }
  return launched();
}

}  // namespace moe::cuda
