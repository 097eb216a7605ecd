// The CUDA library: the same ops over the CUDA kernel table, in torch's current stream on the tensor's device. What has no kernel
// answers with a sentence that says so. The shim that gives the stream lives in libtorch_cuda.so, which a CPU build of torch does not
// have: it is declared weak, so that this library loads there too and says what is missing when used.
#include <cuda_runtime.h>

#define USE_CUDA  // shows the CUDA part of the shims
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../kernels/cuda/kernels.h"
#include "../ops/checks.h"
#include "../ops/device.h"
#include "impls.h"

#pragma weak aoti_torch_get_current_cuda_stream

namespace moe::ops {
namespace {

// Makes a device current and gives the previous one back. Null when it already is current: nothing to undo.
std::shared_ptr<void> make_current(int device) {
  int previous = 0;
  if (cudaGetDevice(&previous) != cudaSuccess) fail("launch", "CUDA has no device: ", cudaGetErrorString(cudaGetLastError()));
  if (previous == device) return nullptr;
  if (cudaSetDevice(device) != cudaSuccess) fail("launch", "cannot use CUDA device ", device, ": ", cudaGetErrorString(cudaGetLastError()));
  return {static_cast<void*>(nullptr), [previous](void*) { cudaSetDevice(previous); }};
}

}  // namespace

const KernelTable& kernel_table() { return cuda::table(); }

// One entry for the library: its kernels run on any device of the architectures in `variant`.
std::string describe_variants() { return std::string("{\"name\": \"") + kernel_table().variant + "\"}"; }

HostLaunch make_launch(const Tensor& like) {
  check(aoti_torch_get_current_cuda_stream != nullptr, "launch", "this torch was built without CUDA");
  HostLaunch launch;
  launch.device_guard = make_current(like.get_device_index());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &launch.stream));
  return launch;
}

}  // namespace moe::ops

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { moe::ops::register_shared(m); }
STABLE_TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) { moe::ops::register_own(m); }
