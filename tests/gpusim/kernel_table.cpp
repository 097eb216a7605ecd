// The kernel table of csrc/kernels/cuda, for moe_ext.testing.simulated_gpu().
#include <kernels/cuda/kernels.h>

extern "C" __attribute__((visibility("default"))) const void* moe_simulated_kernel_table() { return &moe::cuda::table(); }
