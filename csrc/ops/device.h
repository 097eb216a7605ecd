// What each op library defines for its device, in registration/impls_{cpu,cuda}.cpp; the ops above it are the same sources in both.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <string>

#include "../kernels/kernel_table.h"

namespace moe::ops {

// The kernels that run on this device.
const KernelTable& kernel_table();

// How to launch them where `like` is: all of Launch but the workspace.
struct HostLaunch : Launch {
  std::shared_ptr<void> device_guard;  // CUDA: makes the tensor's device current until it is released
};
HostLaunch make_launch(const torch::stable::Tensor& like);

// The builds of the kernels in this library, best first, as JSON objects {"name": ..., "runs_here": ...} joined by commas.
std::string describe_variants();

}  // namespace moe::ops
