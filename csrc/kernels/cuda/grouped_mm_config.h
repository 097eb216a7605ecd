// Which kernel runs a grouped GEMM: the first line of a table that applies. It depends on dtype, device, shapes and alignment,
// never on the routing, which the host does not know.
#pragma once
#include "../types.h"

namespace moe::cuda {

enum class GemmKernel {
  kSimt,             // fused multiply-add, any strides: float32 and float64
  kMmaElements,      // mma.sync, 64-row tiles, operands loaded element by element
  kMma64,            // mma.sync, 64 x 128 tiles
  kMma128,           // mma.sync, 128 x 128 tiles
  kSm90Pingpong,     // wgmma, 64 x 128 tiles
  kSm90Cooperative,  // wgmma, 128 x 256 tiles, clusters of 2
};

struct GemmQuery {
  DType dtype;
  int capability = 80;      // of the device, as 80, 90, 120
  int64_t rows = 0;         // S
  int64_t experts = 0;      // E
  int64_t N = 0, K = 0;     // of one expert's matrix
  bool aligned = true;      // all operands can be read 16 bytes at a time
  bool aligned_out = true;  // so can the results be written
  bool epilogue = false;    // a bias, or adding to what the result holds
};

struct GemmRule {
  GemmKernel kernel;
  bool (*applies)(const GemmQuery&);
  const char* reason;
};

#if defined(MOE_CUDA_SM90)
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

constexpr bool runs_wgmma(const GemmQuery& q) {
  return kHasSm90 && q.capability == 90 && q.aligned_out && !q.epilogue && q.rows > 0 && q.K > 0 && q.K % 8 == 0 && q.N % 8 == 0;
}
constexpr bool has_few_rows(const GemmQuery& q, int64_t rows) { return q.rows < rows * q.experts; }

constexpr GemmRule kGroupedMmRules[] = {
    {GemmKernel::kSimt, [](const GemmQuery& q) { return element_size(q.dtype) > 2; },
     "float32 and float64 are multiplied exactly: tensor cores would round the operands"},
    {GemmKernel::kMmaElements, [](const GemmQuery& q) { return !q.aligned; },
     "a row or matrix does not begin at a multiple of 16 bytes: neither cp.async nor TMA can read it"},
    {GemmKernel::kSm90Cooperative, [](const GemmQuery& q) { return runs_wgmma(q) && !has_few_rows(q, 256) && q.N > 128; },
     "256 rows per expert fill both blocks of a cluster, which then share the weights' tile"},
    {GemmKernel::kSm90Pingpong, [](const GemmQuery& q) { return runs_wgmma(q); },
     "few rows per expert: 64-row tiles waste least, and one group's epilogue hides behind the other's products"},
    {GemmKernel::kMma64, [](const GemmQuery& q) { return has_few_rows(q, 96); }, "most experts have less than one 128-row tile"},
    {GemmKernel::kMma128, [](const GemmQuery&) { return true; }, "every device from 8.0 has mma.sync and cp.async"},
};

// The weight gradient: N and K are the sides of one expert's result, its rows the summed dimension.
constexpr GemmRule kWgradRules[] = {
    kGroupedMmRules[0],
    kGroupedMmRules[1],
    {GemmKernel::kSm90Cooperative, [](const GemmQuery& q) { return runs_wgmma(q); }, "results are large whatever the routing"},
    kGroupedMmRules[5],
};

template <int kCount>
constexpr const GemmRule& choose(const GemmRule (&rules)[kCount], const GemmQuery& query) {
  for (const GemmRule& rule : rules) {
    if (rule.applies(query)) return rule;
  }
  return rules[kCount - 1];
}

}  // namespace moe::cuda
