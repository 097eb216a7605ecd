// The CUDA library: the same ops over the CUDA kernel table. What has no kernel yet answers with a sentence that says so.
#include "../kernels/cuda/kernels.h"
#include "../ops/describe.h"
#include "impls.h"

namespace moe::ops {

const KernelTable& kernel_table() { return cuda::table(); }

// One entry for the library: its kernels run on any device of the architectures in `variant`.
std::string describe_variants() { return std::string("{\"name\": \"") + kernel_table().variant + "\"}"; }

}  // namespace moe::ops

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { moe::ops::register_ops(m); }
