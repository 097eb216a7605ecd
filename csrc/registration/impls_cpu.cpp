// The CPU library: the ops over the kernel table of the best instruction set this processor runs, on torch's thread pool.
// MOE_EXT_CPU_ISA=generic|avx2|avx512|avx512bf16, read once at load, chooses another set; one this processor lacks is an error.
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "../kernels/cpu/table.h"
#include "../ops/checks.h"
#include "../ops/device.h"
#include "impls.h"

namespace moe::ops {
namespace {

const KernelTable* choose_table() {
  int count = 0;
  const KernelTable* all = cpu::tables(&count);
  const char* wanted = std::getenv("MOE_EXT_CPU_ISA");
  const bool any = !wanted || !*wanted;
  std::string known;
  for (int i = 0; i < count; ++i) {
    if ((any || !std::strcmp(all[i].variant, wanted)) && cpu::runs_here(all[i])) return &all[i];
    if (cpu::runs_here(all[i])) known += std::string(known.empty() ? "" : ", ") + all[i].variant;
  }
  fail("load", "MOE_EXT_CPU_ISA=", wanted ? wanted : "", " cannot run here; this processor runs: ", known);
}

// Tasks are handed out one by one, so that uneven experts balance. parallel_for may run several threads' share in one thread
// (nested parallelism, one core): whoever comes first takes all tasks.
void parallel_tasks(int64_t tasks, TaskBody body, void* context) {
  std::atomic<int64_t> next{0};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task, static_cast<int>(thread));
  });
}

const KernelTable*& current_table() {
  static const KernelTable* table = choose_table();
  return table;
}

}  // namespace

const KernelTable& kernel_table() { return *current_table(); }

std::string describe_variants() {
  int count = 0;
  const KernelTable* all = cpu::tables(&count);
  std::string text;
  for (int i = 0; i < count; ++i)
    text += std::string(i ? ", " : "") + "{\"name\": \"" + all[i].variant +
            "\", \"runs_here\": " + (cpu::runs_here(all[i]) ? "true}" : "false}");
  return text;
}

HostLaunch make_launch(const Tensor&) {
  HostLaunch launch;
  launch.parallel_tasks = parallel_tasks;
  launch.num_threads = static_cast<int>(torch::stable::get_num_threads());
  return launch;
}

}  // namespace moe::ops

STABLE_TORCH_LIBRARY_IMPL(moe, CPU, m) { moe::ops::register_shared(m); }
STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { moe::ops::register_own(m); }

// For tests: the ops on CPU tensors run the kernels of `table` from here on; the table they ran before is returned. Its kernels get
// a null stream and must work on host memory: moe_ext.testing.simulated_gpu() passes the CUDA kernels of the simulator.
extern "C" __attribute__((visibility("default"))) const void* moe_replace_kernel_table(const void* table) {
  return std::exchange(moe::ops::current_table(), static_cast<const moe::KernelTable*>(table));
}
