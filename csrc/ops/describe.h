#pragma once
#include <string>

namespace moe::ops {

// The builds of the kernels in this library, best first, as JSON objects {"name": ..., "runs_here": ...} joined by commas.
// Defined once per library.
std::string describe_variants();

}  // namespace moe::ops
