// The kernel table of csrc/kernels/cuda, for moe_ext.testing.simulated_gpu(), and its fused kernels by themselves, for fused.py.
#include <kernels/cuda/grouped_gemm.h>
#include <kernels/cuda/kernels.h>
#include <kernels/cuda/rules.h>

#define MOE_SIMULATED extern "C" __attribute__((visibility("default")))

MOE_SIMULATED const void* moe_simulated_kernel_table() { return &moe::cuda::table(); }

// The Status of a launch, or of `supports`; -1 when the caller's struct has another size, -2 when there is no such kernel. Without
// a workspace, `bytes` is set to what it must have and nothing is launched.
template <class Params>
static int run(const moe::Kernel<Params>& kernel, const Params& p, int64_t size, int64_t* bytes, void* workspace) {
  if (size != sizeof(Params)) return -1;
  if (!kernel.launch) return -2;
  const moe::Status status = kernel.supports ? kernel.supports(p) : moe::Status::kOk;
  if (status != moe::Status::kOk) return static_cast<int>(status);
  *bytes = kernel.workspace ? kernel.workspace(p, 1) : 0;
  if (!workspace) return 0;
  moe::Launch launch;
  launch.workspace = workspace;
  return static_cast<int>(kernel.launch(p, launch));
}

// Those for many rows, whatever their number.
MOE_SIMULATED int moe_simulated_grouped_up(const moe::GroupedUpParams* p, int64_t size, int64_t* bytes, void* workspace) {
  using namespace moe::cuda;
  const bool two_full_blocks = kRows256.holds({p->dtype, 90, p->S, p->E});
  return run(two_full_blocks ? sm90_up_cooperative : sm90_up_pingpong, *p, size, bytes, workspace);
}
MOE_SIMULATED int moe_simulated_grouped_mm_wgrad(const moe::GroupedMmWgradParams* p, int64_t size, int64_t* bytes, void* workspace) {
  return run(moe::cuda::table().grouped_mm_wgrad, *p, size, bytes, workspace);
}
MOE_SIMULATED int moe_simulated_grouped_down_backward(const moe::GroupedDownBackwardParams* p, int64_t size, int64_t* bytes,
                                                      void* workspace) {
  return run(moe::cuda::table().grouped_down_backward, *p, size, bytes, workspace);
}
