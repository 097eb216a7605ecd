// The kernel chosen for a query, and that every line of the tables is some query's choice.
// Compiled with and without MOE_CUDA_SM90: without it, no query gets a wgmma kernel.
#include <iterator>
#include <set>

#include "check.h"
#include "kernels/cuda/rule_tables.h"

using namespace moe;
using namespace moe::cuda;

// The requirements of the kernels again, in words of this test.
static bool can_run_wgmma(const KernelQuery& q) {
  return kHasSm90 && q.capability == 90 && q.aligned_out && !q.epilogue && q.rows > 0 && q.K > 0 && q.K % 8 == 0 && q.N % 8 == 0;
}
static bool is_wgmma(GemmKernel kernel) {
  return kernel == GemmKernel::kSm90Cooperative || kernel == GemmKernel::kSm90Pingpong || kernel == GemmKernel::kSm90Gather;
}

static KernelQuery query(DType dtype, int capability, int64_t rows, int64_t experts) {
  KernelQuery q{dtype};
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
      for (int64_t rows : {0, 1, 1024, 1025, 100000}) {
        for (int bits = 0; bits < 128; ++bits) {
          KernelQuery q = query(dtype, capability, rows, 128);
          q.aligned = bits & 1;
          q.aligned_out = bits & 2;
          q.epilogue = bits & 4;
          if (bits & 8) q.N = 64;
          if (bits & 16) q.K = 20;
          q.gathered = !grouped_mm && bits & 32;
          q.n_major = bits & 64;
          const GemmRule& rule = choose(rules, q);
          reached.insert(rule.reason);
          CHECK((rule.kernel == GemmKernel::kSimt) == (element_size(dtype) > 2), "%s", rule.reason);
          const bool few = rule.kernel == GemmKernel::kFewRows;
          CHECK(few == (grouped_mm && q.aligned && rows > 0 && rows <= 1024 && q.K % 8 == 0 && element_size(dtype) == 2), "%s",
                rule.reason);
          CHECK(is_wgmma(rule.kernel) == (can_run_wgmma(q) && q.aligned && element_size(dtype) == 2 && !few), "%s", rule.reason);
          for (const GemmRule& other : rules) {
            CHECK(&other >= &rule || !other.applies(q), "%s comes first", other.reason);
          }
          CHECK(q.aligned || element_size(dtype) > 2 || rule.kernel == GemmKernel::kMmaElements, "%s", rule.reason);
          if (!grouped_mm) CHECK(rule.kernel != GemmKernel::kMma64 && rule.kernel != GemmKernel::kSm90Pingpong, "%s", rule.reason);
          const bool gathers = rule.kernel == GemmKernel::kSm90Gather;
          CHECK(!gathers || !grouped_mm, "%s", rule.reason);
          if (is_wgmma(rule.kernel) && !grouped_mm) CHECK(gathers == (q.gathered || rows < 192 * q.experts), "%s", rule.reason);
        }
      }
    }
  }
  int expected = 0;
  for (const GemmRule& rule : rules) {
    expected += kHasSm90 || !is_wgmma(rule.kernel);
  }
  CHECK(static_cast<int>(reached.size()) == expected, "%zu of %d lines are reached", reached.size(), expected);
}

// Few rows: T tokens, each to k of E experts of H x I, in bfloat16 on any device.
static void check_few_rows() {
  const auto few = [](int64_t T, int64_t k, int64_t E, int64_t H, int64_t I, bool n_major = false) {
    KernelQuery q = query(DType::kBFloat16, 90, T * k, E);
    q.N = I;
    q.K = H;
    q.n_major = n_major;
    const bool up = choose(kGroupedUpRules, q).kernel == UpKernel::kFewRows;
    CHECK(up == (choose(kGroupedMmRules, q).kernel == GemmKernel::kFewRows), "both projections round the same sums");
    return up;
  };
  CHECK(few(1, 8, 128, 2048, 768) && few(64, 8, 128, 2048, 768) && !few(129, 8, 128, 2048, 768), "Qwen3-30B-A3B");
  CHECK(few(1, 2, 8, 4096, 14336) && few(32, 2, 8, 4096, 14336) && !few(33, 2, 8, 4096, 14336), "Mixtral");
  CHECK(few(64, 4, 32, 2880, 5760, true) && !few(65, 4, 32, 2880, 5760, true), "gpt-oss-20b");
  CHECK(few(16, 1, 1, 64, 64) && !few(17, 1, 1, 64, 64), "one tile holds them whatever the routing");
  CHECK(!few(0, 8, 128, 2048, 768) && !few(1, 8, 128, 2044, 768) && few(1, 8, 128, 2048, 766), "no rows, k not in eights");
  CHECK(!few(1, 8, 128, 2048, 766, true), "contiguous outputs not in eights");
}

// grouped_up of many rows: the two tiles of sm_90a, or the steps.
static void check_up() {
  std::set<const char*> reached;
  for (int capability : {80, 90, 100}) {
    for (int64_t rows : {0, 1024, 1025, 256 * 128 - 1, 256 * 128}) {
      for (int bits = 0; bits < 16; ++bits) {
        KernelQuery q = query(DType::kBFloat16, capability, rows, 128);
        q.aligned = bits & 1;
        q.tensor_maps = bits & 2;
        q.gated = bits & 4;
        if (bits & 8) q.N = 20;
        const auto& rule = choose(kGroupedUpRules, q);
        reached.insert(rule.reason);
        const bool sm90 = rule.kernel == UpKernel::kSm90Cooperative || rule.kernel == UpKernel::kSm90Pingpong;
        CHECK(sm90 == (kHasSm90 && capability == 90 && rows > 1024 && bits == 7), "%s", rule.reason);
        CHECK(!sm90 || (rule.kernel == UpKernel::kSm90Cooperative) == (rows >= 256 * 128), "two blocks are full from 256 rows on");
      }
    }
  }
  CHECK(reached.size() == (kHasSm90 ? 4 : 2), "%zu lines are reached", reached.size());
}

int main() {
  check_few_rows();
  check_up();
  check_table(kGroupedMmRules, true);
  check_table(kWgradRules, false);
  const auto kernel = [](int capability, int64_t rows) {
    return choose(kGroupedMmRules, query(DType::kBFloat16, capability, rows, 128)).kernel;
  };
  CHECK(kernel(80, 64) == GemmKernel::kFewRows && kernel(80, 2000) == GemmKernel::kMma64 && kernel(80, 128 * 1024) == GemmKernel::kMma128,
        "sm_80");
  CHECK(kernel(90, 2000) == (kHasSm90 ? GemmKernel::kSm90Pingpong : GemmKernel::kMma64), "sm_90, few rows");
  CHECK(kernel(90, 128 * 1024) == (kHasSm90 ? GemmKernel::kSm90Cooperative : GemmKernel::kMma128), "sm_90, many rows");
  for (int capability : {100, 103, 110, 120, 121}) {
    CHECK(kernel(capability, 2000) == GemmKernel::kMma64 && kernel(capability, 128 * 1024) == GemmKernel::kMma128, "no wgmma but on 9.0");
  }
  for_each_rule_table([](const char* name, const auto& rules) {
    CHECK(std::rbegin(rules)->needs.count == 0, "%s: the last rule needs nothing", name);
    for (const auto& rule : rules) CHECK(*info(rule.kernel).name && *rule.reason, "%s: a rule has a name and a reason", name);
  });
  return 0;
}
