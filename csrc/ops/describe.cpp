// moe_describe(): this library in JSON, for moe_ext/_C and `moe-ext doctor`. Plain C linkage, no torch types.
#include <moe_build_info.h>

#include <sstream>

#include "device.h"

namespace moe::ops {
namespace {

std::string describe() {
  const KernelTable& t = kernel_table();
  std::ostringstream s;
  s << "{\"build\": " << MOE_BUILD_INFO << ", \"cuda_sources\": \"" << MOE_CUDA_SOURCES << "\", \"device\": \"" << t.device
    << "\", \"variant\": \"" << t.variant << "\", \"variants\": [" << describe_variants() << "], \"dtypes\": \"" << t.dtypes
    << "\", \"ops\": {";
  const char* comma = "";
#define MOE_DESCRIBE(name, Params)                                       \
  s << comma << "\"" #name "\": " << (t.name.launch ? "true" : "false"); \
  comma = ", ";
  MOE_KERNELS(MOE_DESCRIBE)
  s << "}, \"fused\": [";
  comma = "";
#define MOE_QUOTE(name, Params)  \
  s << comma << "\"" #name "\""; \
  comma = ", ";
  MOE_FUSED_KERNELS(MOE_QUOTE)
  s << "]}";
  return s.str();
}

}  // namespace
}  // namespace moe::ops

extern "C" __attribute__((visibility("default"))) const char* moe_describe() {
  static const std::string text = moe::ops::describe();
  return text.c_str();
}
