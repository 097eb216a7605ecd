// moe_describe(): this library in JSON, for moe_ext/_C and `moe-ext doctor`. Plain C linkage, no torch types.
#include "describe.h"

#include <moe_build_info.h>

#include <sstream>

#include "ops.h"

namespace moe::ops {
namespace {

template <class Params>
void add(std::ostringstream& s, const char* op, const Kernel<Params>& kernel) {
  s << (s.tellp() > 1 ? ", " : "") << '"' << op << "\": " << (kernel.launch ? "true" : "false");
}

std::string describe() {
  const KernelTable& t = kernel_table();
  std::ostringstream ops;
  ops << '{';
  add(ops, "sort_by_expert", t.sort_by_expert);
  add(ops, "permute", t.permute);
  add(ops, "unpermute", t.unpermute);
  add(ops, "unpermute_backward", t.unpermute_backward);
  add(ops, "grouped_mm", t.grouped_mm);
  add(ops, "grouped_mm_wgrad", t.grouped_mm_wgrad);
  add(ops, "grouped_bias_grad", t.grouped_bias_grad);
  add(ops, "gated_activation", t.gated_activation);
  add(ops, "gated_activation_backward", t.gated_activation_backward);
  ops << '}';
  std::ostringstream s;
  s << "{\"build\": " << MOE_BUILD_INFO << ", \"device\": \"" << t.device << "\", \"variant\": \"" << t.variant << "\", \"variants\": ["
    << describe_variants() << "], \"ops\": " << ops.str() << ", \"dtypes\": \"" << t.dtypes << "\"}";
  return s.str();
}

}  // namespace
}  // namespace moe::ops

extern "C" __attribute__((visibility("default"))) const char* moe_describe() {
  static const std::string text = moe::ops::describe();
  return text.c_str();
}
