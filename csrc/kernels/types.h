// The words every kernel shares: element types, status, and how a kernel reaches the host that launched it.
// No torch, no Python: this directory can be compiled and tested with a C++ compiler alone.
#pragma once
#include <cstdint>

namespace moe {

enum class DType : int8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t element_size(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

// float64 is accumulated in float64, everything else in float32.
constexpr DType accumulator(DType t) { return t == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

constexpr const char* name(DType t) {
  return t == DType::kFloat64 ? "float64" : t == DType::kFloat32 ? "float32" : t == DType::kBFloat16 ? "bfloat16" : "float16";
}

// What a kernel answers. Kernels never throw; ops/checks.cpp turns all but kOk into an error with values.
enum class Status : int8_t {
  kOk,
  kUnsupportedDtype,   // no kernel for this element type
  kUnsupportedLayout,  // strides or alignment this kernel cannot read
  kLaunchFailed,       // the device refused the launch
};

// Runs body(context, i) for every i in [0, tasks), on the host's threads, in any order; returns when all are done.
using TaskBody = void (*)(void* context, int64_t task, int thread);
using ParallelTasks = void (*)(int64_t tasks, TaskBody body, void* context);

// How a kernel is launched. The caller owns everything here; a kernel keeps none of it.
struct Launch {
  void* stream = nullptr;                  // cudaStream_t on CUDA, unused on the CPU
  ParallelTasks parallel_tasks = nullptr;  // CPU: the host's thread pool
  int num_threads = 1;                     // CPU: `thread` in TaskBody is in [0, num_threads)
  void* workspace = nullptr;               // 64-byte aligned, at least Kernel::workspace(...) bytes
};

// CPU kernels: f(task, thread) over all tasks, through the host's pool.
template <class F>
void for_each_task(const Launch& launch, int64_t tasks, const F& f) {
  if (tasks <= 0) return;
  if (tasks == 1 || launch.num_threads == 1 || !launch.parallel_tasks) {
    for (int64_t i = 0; i < tasks; ++i) f(i, 0);
    return;
  }
  launch.parallel_tasks(
      tasks, [](void* context, int64_t task, int thread) { (*static_cast<const F*>(context))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace moe
