// How one of several kernels for the same op is chosen: the first rule of a table whose needs are all met. It depends on dtype, device,
// shapes and alignment, never on the routing, which the host does not know. No CUDA header is included: rules are read and tested
// without a GPU. rule_tables.h lists the tables; `_C.rules` and `_C.explain_kernel` show them.
#pragma once
#include "../types.h"
#include "host_device.h"

namespace moe::cuda {

#if defined(MOE_CUDA_SM90)
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

// What rules may ask. An op that has no such thing (gathered rows, a bias) leaves the field as it is.
struct KernelQuery {
  DType dtype;
  int capability = 80;      // of the device, as 80, 90, 120
  int64_t rows = 0;         // S
  int64_t experts = 0;      // E
  int64_t N = 0, K = 0;     // of one expert's matrix: outputs and inputs; of a weight gradient its two sides
  bool aligned = true;      // all operands can be read 16 bytes at a time
  bool aligned_out = true;  // so can the results be written
  bool epilogue = false;    // a bias, or adding to what the result holds
  bool gathered = false;    // rows of an operand lie elsewhere: GroupedMmWgradParams
  bool n_major = false;     // a weight's outputs are contiguous, not its k
  bool tensor_maps = true;  // matrices are such that TMA can read them
  bool gated = true;        // of the activation
  bool has_sm90 = kHasSm90;
};

// One thing that a kernel may need, and how a user reads it.
struct Requirement {
  bool (*holds)(const KernelQuery&);
  const char* text;
};

// Several of them, written as a sum of named requirements. Too many do not compile: tables of rules are constexpr.
struct Needs {
  constexpr Needs() = default;
  constexpr Needs(const Requirement& one) : all{&one}, count(1) {}
  Needs(Requirement&&) = delete;  // its address is kept

  constexpr const Requirement* const* begin() const { return all; }
  constexpr const Requirement* const* end() const { return all + count; }

  const Requirement* all[12] = {};
  int count = 0;
};
constexpr Needs operator+(Needs sum, const Needs& more) {
  for (const Requirement* r : more) sum.all[sum.count++] = r;
  return sum;
}

template <class Kernel>
struct Rule {
  Kernel kernel;
  Needs needs;
  const char* reason;  // why this kernel, where its needs are met

  constexpr bool applies(const KernelQuery& query) const {
    for (const Requirement* r : needs) {
      if (!r->holds(query)) return false;
    }
    return true;
  }
};

// The last rule of a table needs nothing.
template <class Kernel, int kCount>
constexpr const Rule<Kernel>& choose(const Rule<Kernel> (&rules)[kCount], const KernelQuery& query) {
  for (const Rule<Kernel>& rule : rules) {
    if (rule.applies(query)) return rule;
  }
  return rules[kCount - 1];
}

// A kernel as a user reads it: info() of every enum of kernels gives one.
struct KernelInfo {
  const char* name;
  int tile_m = 0, tile_n = 0, tile_k = 0;  // outputs of a block and the depth of one step; 0: no kernel of its own
};

// ---- what kernels need
constexpr Requirement kExactDtype{[](const KernelQuery& q) { return element_size(q.dtype) > 2; }, "float32 or float64"};
constexpr Requirement kHalfDtype{[](const KernelQuery& q) { return element_size(q.dtype) == 2; }, "bfloat16 or float16"};
constexpr Requirement kUnaligned{[](const KernelQuery& q) { return !q.aligned; },
                                 "a row or matrix that does not begin at a multiple of 16 bytes"};
constexpr Requirement kAlignedOperands{[](const KernelQuery& q) { return q.aligned; },
                                       "rows and matrices that begin at multiples of 16 bytes"};
constexpr Requirement kAlignedResults{[](const KernelQuery& q) { return q.aligned_out; },
                                      "results whose rows begin at multiples of 16 bytes"};
constexpr Requirement kPlainResults{[](const KernelQuery& q) { return !q.epilogue; }, "no bias, and nothing in the result to add to"};
constexpr Requirement kTensorMaps{[](const KernelQuery& q) { return q.tensor_maps; }, "matrices that a tensor map can describe"};
constexpr Requirement kGatedActivation{[](const KernelQuery& q) { return q.gated; }, "a gated activation"};
constexpr Requirement kGatheredRows{[](const KernelQuery& q) { return q.gathered; }, "rows that are gathered"};

constexpr Requirement kBuiltForSm90{[](const KernelQuery& q) { return q.has_sm90; }, "a build for sm_90a"};
constexpr Requirement kDevice90{[](const KernelQuery& q) { return q.capability == 90; }, "a device of compute capability 9.0"};

constexpr Requirement kNotEmpty{[](const KernelQuery& q) { return q.rows > 0 && q.K > 0; }, "at least one row and one column of weights"};
constexpr Requirement kSidesInEights{[](const KernelQuery& q) { return q.N % 8 == 0 && q.K % 8 == 0; }, "N and K that are multiples of 8"};
constexpr Requirement kDepthInEights{[](const KernelQuery& q) { return q.K % 8 == 0 && (!q.n_major || q.N % 8 == 0) && q.K < 1 << 30; },
                                     "K in eights, and N where a weight's outputs are contiguous"};
constexpr Requirement kNAbove128{[](const KernelQuery& q) { return q.N > 128; }, "N above 128"};
constexpr Requirement kRows256{[](const KernelQuery& q) { return q.rows >= 256 * q.experts; }, "256 rows per expert"};
constexpr Requirement kRows16{[](const KernelQuery& q) { return q.rows >= 16 * q.experts; }, "16 rows per expert"};
constexpr Requirement kRowsBelow192{[](const KernelQuery& q) { return q.rows < 192 * q.experts; }, "less than 192 rows per expert"};
constexpr Requirement kRowsBelow96{[](const KernelQuery& q) { return q.rows < 96 * q.experts; }, "less than 96 rows per expert"};
constexpr Requirement kRowsAtMost8{[](const KernelQuery& q) { return q.rows <= greatest<int64_t>(16, 8 * q.experts); },
                                   "at most 16 rows, or 8 per expert"};

// wgmma and TMA.
constexpr Needs kWgmma = kBuiltForSm90 + kDevice90 + kNotEmpty + kSidesInEights;
// Fused with what follows: no rule before has told dtypes and alignment apart, and weights are loaded by TMA.
constexpr Needs kFusedWgmma = kWgmma + kHalfDtype + kAlignedOperands + kTensorMaps + kGatedActivation;

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
constexpr Needs kFewRowsPerExpert = kNotEmpty + kRowsAtMost8 + kDepthInEights + kHalfDtype + kAlignedOperands;
constexpr const char* kFewRowsReason =
    "at most 16 rows, or 8 per expert on average: the time is that of reading the weights, which is done once";

}  // namespace moe::cuda
