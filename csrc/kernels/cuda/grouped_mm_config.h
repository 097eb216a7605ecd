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

#if defined(MOE_CUDA_SM90)
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

struct GemmQuery {
  DType dtype;
  int capability = 80;      // of the device, as 80, 90, 120
  int64_t rows = 0;         // S
  int64_t experts = 0;      // E
  int64_t N = 0, K = 0;     // of one expert's matrix
  bool aligned = true;      // all operands can be read 16 bytes at a time
  bool aligned_out = true;  // so can the results be written
  bool epilogue = false;    // a bias, or adding to what the result holds
  bool has_sm90 = kHasSm90;
};

struct GemmKernelInfo {
  const char* name;
  int tile_m, tile_n, tile_k;  // outputs of a block and the depth of one step
};
constexpr GemmKernelInfo info(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::kSimt:
      return {"simt", 64, 64, 16};
    case GemmKernel::kMmaElements:
      return {"mma_elements", 64, 128, 32};
    case GemmKernel::kMma64:
      return {"mma_64", 64, 128, 32};
    case GemmKernel::kMma128:
      return {"mma_128", 128, 128, 32};
    case GemmKernel::kSm90Pingpong:
      return {"sm90_pingpong", 64, 128, 64};
    default:
      return {"sm90_cooperative", 128, 256, 64};
  }
}

// What a kernel may need of a query, as a user reads it.
struct Requirement {
  bool (*holds)(const GemmQuery&);
  const char* text;
};
constexpr Requirement kRequirements[] = {
    {[](const GemmQuery& q) { return element_size(q.dtype) > 2; }, "float32 or float64"},
    {[](const GemmQuery& q) { return !q.aligned; }, "a row or matrix that does not begin at a multiple of 16 bytes"},
    {[](const GemmQuery& q) { return q.has_sm90; }, "a build for sm_90a"},
    {[](const GemmQuery& q) { return q.capability == 90; }, "a device of compute capability 9.0"},
    {[](const GemmQuery& q) { return q.aligned_out; }, "results whose rows begin at multiples of 16 bytes"},
    {[](const GemmQuery& q) { return !q.epilogue; }, "no bias, and nothing in the result to add to"},
    {[](const GemmQuery& q) { return q.rows > 0 && q.K > 0; }, "at least one row and one column of weights"},
    {[](const GemmQuery& q) { return q.N % 8 == 0 && q.K % 8 == 0; }, "N and K that are multiples of 8"},
    {[](const GemmQuery& q) { return q.N > 128; }, "N above 128"},
    {[](const GemmQuery& q) { return q.rows >= 256 * q.experts; }, "256 rows per expert"},
    {[](const GemmQuery& q) { return q.rows < 96 * q.experts; }, "less than 96 rows per expert"},
};
// A set of them is a bit for each.
enum Requirements : unsigned {
  kNone = 0,
  kExactTypes = 1 << 0,
  kUnaligned = 1 << 1,
  kWgmma = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7,
  kFullCluster = 1 << 8 | 1 << 9,
  kFewRows = 1 << 10,
};

// f(text) for those that do not hold.
template <class F>
constexpr void for_each_missing(unsigned requirements, const GemmQuery& query, const F& f) {
  for (const Requirement& r : kRequirements) {
    if (requirements & 1 && !r.holds(query)) f(r.text);
    requirements >>= 1;
  }
}

struct GemmRule {
  GemmKernel kernel;
  unsigned requirements;
  const char* reason;

  constexpr bool applies(const GemmQuery& query) const {
    bool all = true;
    for_each_missing(requirements, query, [&all](const char*) { all = false; });
    return all;
  }
};

constexpr GemmRule kGroupedMmRules[] = {
    {GemmKernel::kSimt, kExactTypes, "float32 and float64 are multiplied exactly: tensor cores would round the operands"},
    {GemmKernel::kMmaElements, kUnaligned,
     "a row or matrix does not begin at a multiple of 16 bytes: neither cp.async nor TMA can read it"},
    {GemmKernel::kSm90Cooperative, kWgmma | kFullCluster,
     "256 rows per expert fill both blocks of a cluster, which then share the weights' tile"},
    {GemmKernel::kSm90Pingpong, kWgmma,
     "few rows per expert: 64-row tiles waste least, and one group's epilogue hides behind the other's products"},
    {GemmKernel::kMma64, kFewRows, "most experts have less than one 128-row tile"},
    {GemmKernel::kMma128, kNone, "every device from 8.0 has mma.sync and cp.async"},
};

// The weight gradient: N and K are the sides of one expert's result, its rows the summed dimension.
constexpr GemmRule kWgradRules[] = {
    kGroupedMmRules[0],
    kGroupedMmRules[1],
    {GemmKernel::kSm90Cooperative, kWgmma, "results are large whatever the routing"},
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
