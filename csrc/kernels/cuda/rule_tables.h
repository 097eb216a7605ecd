// Every table of rules, by the kernel of kernel_table.h whose implementations it chooses among.
#pragma once
#include "grouped_down_backward_config.h"
#include "grouped_mm_config.h"
#include "grouped_up_config.h"

namespace moe::cuda {

// f(name, rules) for each.
template <class F>
constexpr void for_each_rule_table(const F& f) {
  f("grouped_mm", kGroupedMmRules);
  f("grouped_mm_wgrad", kWgradRules);
  f("grouped_up", kGroupedUpRules);
  f("grouped_down_backward", kDownBackwardRules);
}

}  // namespace moe::cuda
