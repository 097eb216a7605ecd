// Which kernel runs a grouped GEMM: grouped_mm and grouped_mm_wgrad. See rules.h.
#pragma once
#include "rules.h"

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

constexpr KernelInfo info(GemmKernel kernel) {
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

using GemmRule = Rule<GemmKernel>;
// Sums are stored as they are.
constexpr Needs kPlainWgmma = kWgmma + kAlignedResults + kPlainResults;

constexpr GemmRule kSimtRule{GemmKernel::kSimt, kExactDtype,
                             "float32 and float64 are multiplied exactly: tensor cores would round the operands"};
constexpr GemmRule kMmaElementsRule{GemmKernel::kMmaElements, kUnaligned,
                                    "a row or matrix does not begin at a multiple of 16 bytes: neither cp.async nor TMA can read it"};
constexpr GemmRule kMma128Rule{GemmKernel::kMma128, {}, "every device from 8.0 has mma.sync and cp.async"};

constexpr GemmRule kGroupedMmRules[] = {
    kSimtRule,
    kMmaElementsRule,
    {GemmKernel::kFewRows, kFewRowsPerExpert, kFewRowsReason},
    {GemmKernel::kSm90Cooperative, kPlainWgmma + kNAbove128 + kRows256,
     "256 rows per expert fill both blocks of a cluster, which then share the weights' tile"},
    {GemmKernel::kSm90Pingpong, kPlainWgmma,
     "few rows per expert: 64-row tiles waste least, and one group's epilogue hides behind the other's products"},
    {GemmKernel::kMma64, kRowsBelow96, "most experts have less than one 128-row tile"},
    kMma128Rule,
};

// The weight gradient: N and K are the sides of one expert's result, its rows the summed dimension. By arithmetic, not measured:
// Copying gathered rows of width H reads and writes 4 H bytes each, of Qwen3-30B-A3B (H = 2048, I = 768) at 4.3 TB/s a quarter of the
// product's 2 * 2I * H operations at 790 TFLOP/s, and needs S * H * 2 bytes of workspace. Writing a result (2 bytes for every 2 n
// operations, n rows) takes longer than its product below n = 184; then the tensor maps that kSm90Cooperative replaces for every
// expert, and its launches that fill arrays and clear experts without rows, are not hidden behind products.
constexpr GemmRule kWgradRules[] = {
    kSimtRule,
    kMmaElementsRule,
    {GemmKernel::kSm90Gather, kPlainWgmma + kGatheredRows, "rows are gathered as they are loaded: no copy of them is made"},
    {GemmKernel::kSm90Gather, kPlainWgmma + kRowsBelow192,
     "few rows per expert: no tensor maps, and the zeros of experts without rows come from the same kernel"},
    {GemmKernel::kSm90Cooperative, kPlainWgmma, "rows in place: TMA loads them, and the blocks of a cluster share what they read"},
    kMma128Rule,
};

}  // namespace moe::cuda
