// Which kernel runs a grouped GEMM: the first line of a table that applies. It depends on dtype, device, shapes and alignment,
// never on the routing, which the host does not know.
#pragma once
#include "../types.h"
#include "host_device.h"

namespace moe::cuda {

enum class GemmKernel {
  kSimt,             // fused multiply-add, any strides: float32 and float64
  kFewRows,          // mma.sync, tiles of 16 rows, weights read straight into registers
  kMmaElements,      // mma.sync, 64-row tiles, operands loaded element by element
  kMma64,            // mma.sync, 64 x 128 tiles
  kMma128,           // mma.sync, 128 x 128 tiles
  kSm90Pingpong,     // wgmma, 64 x 128 tiles
  kSm90Cooperative,  // wgmma, 128 x 256 tiles, clusters of 2
  kSm90Gather,       // wgmma, 128 x 256 tiles, rows gathered by the kernel itself: weight gradients only
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
  bool gathered = false;    // rows of an operand lie elsewhere: GroupedMmWgradParams
  bool n_major = false;     // a weight's outputs are contiguous, not its k
  bool tensor_maps = true;  // matrices are such that TMA can read them
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
    case GemmKernel::kFewRows:
      return {"few_rows", 16, 32, 256};
    case GemmKernel::kMmaElements:
      return {"mma_elements", 64, 128, 32};
    case GemmKernel::kMma64:
      return {"mma_64", 64, 128, 32};
    case GemmKernel::kMma128:
      return {"mma_128", 128, 128, 32};
    case GemmKernel::kSm90Pingpong:
      return {"sm90_pingpong", 64, 128, 64};
    case GemmKernel::kSm90Gather:
      return {"sm90_gather", 128, 256, 64};
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
    {[](const GemmQuery& q) { return q.gathered; }, "rows that are gathered"},
    {[](const GemmQuery& q) { return q.rows < 192 * q.experts; }, "less than 192 rows per expert"},
    {[](const GemmQuery& q) { return q.rows <= greatest<int64_t>(16, 8 * q.experts); }, "at most 16 rows, or 8 per expert"},
    {[](const GemmQuery& q) { return q.K % 8 == 0 && (!q.n_major || q.N % 8 == 0) && q.K < 1 << 30; },
     "K in eights, and N where a weight's outputs are contiguous"},
    {[](const GemmQuery& q) { return element_size(q.dtype) == 2; }, "bfloat16 or float16"},
    {[](const GemmQuery& q) { return q.aligned; }, "rows and matrices that begin at multiples of 16 bytes"},
    {[](const GemmQuery& q) { return q.tensor_maps; }, "matrices that a tensor map can describe"},
};
// A set of them is a bit for each.
enum Requirements : unsigned {
  kNone = 0,
  kExactTypes = 1 << 0,
  kUnaligned = 1 << 1,
  kWgmma = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7,
  kFullCluster = 1 << 8 | 1 << 9,
  kBelow96Rows = 1 << 10,
  kGatheredRows = 1 << 11,
  kBelow192Rows = 1 << 12,
  kFewRowsPerTile = 1 << 6 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 16,
  // Fused with what follows: biases are no obstacle, and loads are TMA's.
  kFusedWgmma = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 15 | 1 << 16 | 1 << 17,
};

// f(text) for those that do not hold.
template <class F>
constexpr void for_each_missing(unsigned requirements, const GemmQuery& query, const F& f) {
  for (const Requirement& r : kRequirements) {
    if (requirements & 1 && !r.holds(query)) f(r.text);
    requirements >>= 1;
  }
}

template <class Kernel>
struct Rule {
  Kernel kernel;
  unsigned requirements;
  const char* reason;

  constexpr bool applies(const GemmQuery& query) const {
    bool all = true;
    for_each_missing(requirements, query, [&all](const char*) { all = false; });
    return all;
  }
};
using GemmRule = Rule<GemmKernel>;

// Whether the time is that of reading the weights, and tiles of 16 rows read them once. With n = S / E rows per expert on average,
// more than 16 meet in one expert with probability 0.4 % at n = 8 (Poisson): 1.004 reads. At n = 16 it would be 43 %, and each
// tile of 32 outputs would load half as many bytes of x as of weights (a quarter at n = 8), though from L1 and L2: wider tiles win.
// So T <= 128 of Qwen3-30B-A3B (k = 8, E = 128), T <= 64 of gpt-oss-20b (4, 32), T <= 32 of Mixtral (2, 8).
// Routing is not known here. At worst all S rows go to one expert: its matrix is asked for S / 16 <= E / 2 times by blocks that run
// side by side, mostly from L2, and the other E - 1 are not read: fewer bytes than evenly spread rows need.
// Bytes in flight: 2 blocks per multiprocessor x 256 threads x 12 loads (8 where outputs are contiguous) x 16 bytes = 96 KiB (64),
// of which 23 are needed on an H200 (4.3 TB/s x 700 ns / 132). Qwen3's up and down projection are 48 and 64 tiles of outputs by one
// row tile per expert with rows, and 264 blocks run at once: T = 1: 384 and 512 blocks of 128 and 48 KiB of weights. T = 16: 4 and 8
// tiles per block, 1644 and 1096 blocks, of which about 980 and 660 have rows. T = 64: 4 and 8, 1932 and 1288, 1540 and 1020.
constexpr const char* kFewRowsReason =
    "at most 16 rows, or 8 per expert on average: the time is that of reading the weights, which is done once";

constexpr GemmRule kGroupedMmRules[] = {
    {GemmKernel::kSimt, kExactTypes, "float32 and float64 are multiplied exactly: tensor cores would round the operands"},
    {GemmKernel::kMmaElements, kUnaligned,
     "a row or matrix does not begin at a multiple of 16 bytes: neither cp.async nor TMA can read it"},
    {GemmKernel::kFewRows, kFewRowsPerTile, kFewRowsReason},
    {GemmKernel::kSm90Cooperative, kWgmma | kFullCluster,
     "256 rows per expert fill both blocks of a cluster, which then share the weights' tile"},
    {GemmKernel::kSm90Pingpong, kWgmma,
     "few rows per expert: 64-row tiles waste least, and one group's epilogue hides behind the other's products"},
    {GemmKernel::kMma64, kBelow96Rows, "most experts have less than one 128-row tile"},
    {GemmKernel::kMma128, kNone, "every device from 8.0 has mma.sync and cp.async"},
};

// The weight gradient: N and K are the sides of one expert's result, its rows the summed dimension. By arithmetic, not measured:
// Copying gathered rows of width H reads and writes 4 H bytes each, of Qwen3-30B-A3B (H = 2048, I = 768) at 4.3 TB/s a quarter of the
// product's 2 * 2I * H operations at 790 TFLOP/s, and needs S * H * 2 bytes of workspace. Writing a result (2 bytes for every 2 n
// operations, n rows) takes longer than its product below n = 184; then the tensor maps that kSm90Cooperative replaces for every
// expert, and its launches that fill arrays and clear experts without rows, are not hidden behind products.
constexpr GemmRule kWgradRules[] = {
    kGroupedMmRules[0],
    kGroupedMmRules[1],
    {GemmKernel::kSm90Gather, kWgmma | kGatheredRows, "rows are gathered as they are loaded: no copy of them is made"},
    {GemmKernel::kSm90Gather, kWgmma | kBelow192Rows,
     "few rows per expert: no tensor maps, and the zeros of experts without rows come from the same kernel"},
    {GemmKernel::kSm90Cooperative, kWgmma, "rows in place: TMA loads them, and the blocks of a cluster share what they read"},
    kGroupedMmRules[6],
};

template <class Kernel, int kCount>
constexpr const Rule<Kernel>& choose(const Rule<Kernel> (&rules)[kCount], const GemmQuery& query) {
  for (const Rule<Kernel>& rule : rules) {
    if (rule.applies(query)) return rule;
  }
  return rules[kCount - 1];
}

}  // namespace moe::cuda
