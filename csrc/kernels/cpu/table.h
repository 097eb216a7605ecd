// One kernel table per instruction set this library was built for; the best one the processor can run is the default.
#pragma once
#include "../kernel_table.h"

namespace moe::cpu {

// Tables from the most capable set to the least; `count` receives their number. All were compiled in; see `runs_here`.
const KernelTable* tables(int* count);
bool runs_here(const KernelTable& table);

}  // namespace moe::cpu
