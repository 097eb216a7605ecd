// Collects the CPU kernels of each instruction set. The list MOE_ISAS comes from the build, best first.
#include "table.h"

#include <cstring>

#include "kernels.h"

MOE_ISAS(MOE_DECLARE_CPU_KERNELS)

#define MOE_CPU_TABLE(isa)                                                                                                  \
  namespace moe::cpu::isa {                                                                                                 \
  static KernelTable table() { return {"cpu", #isa, "float64, float32, bfloat16, float16", MOE_KERNELS(MOE_KERNEL_NAME)}; } \
  }
MOE_ISAS(MOE_CPU_TABLE)

namespace moe::cpu {

const KernelTable* tables(int* count) {
  // Function-local, so that no order of static initialisation across files matters.
#define MOE_CALL_TABLE(isa) isa::table(),
  static const KernelTable all[] = {MOE_ISAS(MOE_CALL_TABLE)};
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
