// Lists of per-expert matrices on the device. The list is in host memory and gone when the op returns, so its pointers travel as
// kernel arguments, which a launch (and a captured graph) keeps: no copy that waits, no pinned memory.
#pragma once
#include <cstdint>

#include "../types.h"

namespace moe::cuda {

inline int64_t pointer_table_bytes(const void* const* list, int64_t E) { return list ? (E * 8 + 63) / 64 * 64 : 0; }

// Fills `device_table` with the E pointers of `list`, in the launch's stream.
Status upload_pointers(const void* const* list, int64_t E, void* device_table, const Launch& launch);

// Replaces the host's list in a WeightTable, BiasTable or OutputTable by a device copy at `place`, which moves past it.
template <class Table>
Status move_to_device(Table& table, int64_t E, char*& place, const Launch& launch) {
  if (!table.list) return Status::kOk;
  char* mine = place;
  place += pointer_table_bytes(table.list, E);
  const Status status = upload_pointers(table.list, E, mine, launch);
  table.list = reinterpret_cast<decltype(table.list)>(mine);
  return status;
}

// The launch of a kernel whose workspace begins that much further on.
inline Launch after(Launch launch, int64_t bytes) {
  launch.workspace = static_cast<char*>(launch.workspace) + bytes;
  return launch;
}

}  // namespace moe::cuda
