// How every op launches a kernel of its library's table.
#pragma once
#include "device.h"
#include "tensor_access.h"

namespace moe::ops {

// Whether the device has a kernel for these parameters; asked before results are allocated.
template <class Params>
bool is_supported(const Kernel<Params>& kernel, const Params& params) {
  return kernel.launch && (!kernel.supports || kernel.supports(params) == Status::kOk);
}

// Launches a kernel, or fails with what is missing. Its workspace lives until the launch returns; on CUDA torch's allocator then hands
// it only to what follows in the same stream.
template <class Params>
void run(const char* op, const Kernel<Params>& kernel, const Params& params, const Tensor& like, const char* detail) {
  if (!kernel.launch) fail_missing(op);
  if (kernel.supports) {
    const Status status = kernel.supports(params);
    if (status != Status::kOk) fail_status(op, status, detail);
  }
  HostLaunch launch = make_launch(like);
  const int64_t bytes = kernel.workspace ? kernel.workspace(params, launch.num_threads) : 0;
  std::optional<Tensor> workspace;
  if (bytes > 0) {
    workspace = empty(like, {bytes}, ScalarType::Byte);
    launch.workspace = workspace->data_ptr();
  }
  const Status status = kernel.launch(params, launch);
  if (status != Status::kOk) fail_status(op, status, detail);
}

}  // namespace moe::ops
