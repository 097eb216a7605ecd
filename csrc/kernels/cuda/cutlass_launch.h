// What a CUTLASS kernel for sm_90a is given (cutlass_sm90.cuh): arrays on the device, one entry per expert.
#pragma once
#include "../types.h"

namespace moe::cuda {

struct GemmArrays {
  int experts = 0, multiprocessors = 0;
  void* shapes = nullptr;  // (m, n, k), 32 bits each
  void *a = nullptr, *b = nullptr, *d = nullptr, *ld_a = nullptr, *ld_b = nullptr, *ld_d = nullptr;
  void* tensor_maps = nullptr;  // kTensorMapBytesPerSm for every multiprocessor
};
constexpr int64_t kTensorMapBytesPerSm = 1024;  // A, B, and D of up to three warp groups, 128 bytes each, with room

using Sm90Launch = Status (*)(const GemmArrays& arrays, void* stream);

// The kernel for an element type, a tile and the layout of the weights.
Sm90Launch sm90_grouped_mm_bf16(bool cooperative, bool n_major);
Sm90Launch sm90_grouped_mm_f16(bool cooperative, bool n_major);
Sm90Launch sm90_wgrad(DType dtype);

}  // namespace moe::cuda
