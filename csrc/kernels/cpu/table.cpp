// Collects the CPU kernels of each instruction set. The list MOE_ISAS comes from the build, best first.
#include "table.h"

#include <cstring>

#include "kernels.h"

#define MOE_FOR_EACH_ISA(F) MOE_ISAS(F)

MOE_FOR_EACH_ISA(MOE_DECLARE_CPU_KERNELS)

namespace moe::cpu {
namespace {

constexpr const char* kDtypes = "float64, float32, bfloat16, float16";

}  // namespace

const KernelTable* tables(int* count) {
  // Function-local, so that no order of static initialisation across files matters.
#define MOE_TABLE(isa)                        \
  KernelTable{"cpu",                          \
              #isa,                           \
              kDtypes,                        \
              isa::sort_by_expert,            \
              isa::permute,                   \
              isa::grouped_mm,                \
              isa::grouped_mm_wgrad,          \
              isa::grouped_bias_grad,         \
              isa::gated_activation,          \
              isa::gated_activation_backward, \
              isa::unpermute,                 \
              isa::unpermute_backward,        \
              {},                             \
              {}},
  static const KernelTable all[] = {MOE_FOR_EACH_ISA(MOE_TABLE)};
  *count = static_cast<int>(sizeof(all) / sizeof(all[0]));
  return all;
}

bool runs_here(const KernelTable& table) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(table.variant, "avx2")) return avx2;
  if (!std::strcmp(table.variant, "avx512")) return avx512;
  if (!std::strcmp(table.variant, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return !std::strcmp(table.variant, "generic");
}

}  // namespace moe::cpu
