// The kernel chosen for a query, and that every line of the tables is some query's choice.
// Compiled with and without MOE_CUDA_SM90: without it, no query gets a wgmma kernel.
#include <iterator>
#include <set>

#include "check.h"
#include "kernels/cuda/grouped_mm_config.h"

using namespace moe;
using namespace moe::cuda;

// The requirements of the kernels again, in words of this test.
static bool can_run_wgmma(const GemmQuery& q) {
  return kHasSm90 && q.capability == 90 && q.aligned_out && !q.epilogue && q.rows > 0 && q.K > 0 && q.K % 8 == 0 && q.N % 8 == 0;
}

static GemmQuery query(DType dtype, int capability, int64_t rows, int64_t experts) {
  GemmQuery q{dtype};
  q.capability = capability;
  q.rows = rows;
  q.experts = experts;
  q.N = q.K = 768;
  return q;
}

template <int kCount>
static void check_table(const GemmRule (&rules)[kCount], bool grouped_mm) {
  std::set<const char*> reached;
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int capability : {80, 86, 89, 90, 100, 120}) {
      for (int64_t rows : {0, 1, 1000, 100000}) {
        for (int bits = 0; bits < 32; ++bits) {
          GemmQuery q = query(dtype, capability, rows, 128);
          q.aligned = bits & 1;
          q.aligned_out = bits & 2;
          q.epilogue = bits & 4;
          if (bits & 8) q.N = 64;
          if (bits & 16) q.K = 20;
          const GemmRule& rule = choose(rules, q);
          reached.insert(rule.reason);
          CHECK((rule.kernel == GemmKernel::kSimt) == (element_size(dtype) > 2), "%s", rule.reason);
          const bool wgmma = rule.kernel == GemmKernel::kSm90Cooperative || rule.kernel == GemmKernel::kSm90Pingpong;
          CHECK(wgmma == (can_run_wgmma(q) && q.aligned && element_size(dtype) == 2), "%s", rule.reason);
          for (const GemmRule& other : rules) {
            int missing = 0;
            for_each_missing(other.requirements, q, [&](const char*) { ++missing; });
            CHECK(other.applies(q) == (missing == 0), "%s", other.reason);
            CHECK(&other >= &rule || missing, "%s comes first", other.reason);
          }
          CHECK(q.aligned || element_size(dtype) > 2 || rule.kernel == GemmKernel::kMmaElements, "%s", rule.reason);
          if (!grouped_mm) CHECK(rule.kernel != GemmKernel::kMma64 && rule.kernel != GemmKernel::kSm90Pingpong, "%s", rule.reason);
        }
      }
    }
  }
  int expected = 0;
  for (const GemmRule& rule : rules) {
    expected += kHasSm90 || (rule.kernel != GemmKernel::kSm90Cooperative && rule.kernel != GemmKernel::kSm90Pingpong);
  }
  CHECK(static_cast<int>(reached.size()) == expected, "%zu of %d lines are reached", reached.size(), expected);
}

int main() {
  check_table(kGroupedMmRules, true);
  check_table(kWgradRules, false);
  const auto kernel = [](int capability, int64_t rows) {
    return choose(kGroupedMmRules, query(DType::kBFloat16, capability, rows, 128)).kernel;
  };
  CHECK(kernel(80, 64) == GemmKernel::kMma64 && kernel(80, 128 * 1024) == GemmKernel::kMma128, "sm_80");
  CHECK(kernel(90, 64) == (kHasSm90 ? GemmKernel::kSm90Pingpong : GemmKernel::kMma64), "sm_90, few rows");
  CHECK(kernel(90, 128 * 1024) == (kHasSm90 ? GemmKernel::kSm90Cooperative : GemmKernel::kMma128), "sm_90, many rows");
  for (int capability : {100, 103, 110, 120, 121}) {
    CHECK(kernel(capability, 64) == GemmKernel::kMma64 && kernel(capability, 128 * 1024) == GemmKernel::kMma128, "no wgmma but on 9.0");
  }
  CHECK(static_cast<unsigned>(kFewRows) < 1u << std::size(kRequirements), "a bit without a requirement");
  return 0;
}
