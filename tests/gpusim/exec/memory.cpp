#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <sstream>

namespace gpusim {

void poison(void* data, size_t bytes) {
  auto* p = static_cast<uint8_t*>(data);
  for (size_t i = 0; i < bytes; ++i) p[i] = static_cast<uint8_t>(kPoison >> (reinterpret_cast<uintptr_t>(p + i) % 2 * 8));
}

Memory::Memory() {
  const auto reserve = [] {
    return reinterpret_cast<uint64_t>(mmap(nullptr, kWindow, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  };
  shared_window = reserve();
  local_window = reserve();
}

Memory& Memory::get() {
  static Memory* memory = new Memory;  // never destroyed: allocations are freed until the very end of the process
  return *memory;
}

void Memory::add(void* begin, size_t bytes, const char* kind, bool writable) {
  Allocation a;
  a.begin = reinterpret_cast<uint64_t>(begin);
  a.end = a.begin + bytes;
  a.kind = kind;
  a.writable = writable;
  std::fill(std::begin(last_), std::end(last_), nullptr);
  // Memory that its owner freed unseen may come back at an overlapping place.
  auto after = allocations_.lower_bound(a.begin);
  if (after != allocations_.begin() && std::prev(after)->second.end > a.begin) allocations_.erase(std::prev(after));
  while ((after = allocations_.lower_bound(a.begin)) != allocations_.end() && after->first < a.end) allocations_.erase(after);
  allocations_[a.begin] = a;
}

bool Memory::remove(void* begin) {
  std::fill(std::begin(last_), std::end(last_), nullptr);
  return allocations_.erase(reinterpret_cast<uint64_t>(begin)) > 0;
}

Allocation* Memory::find(uint64_t address, size_t bytes) {
  for (Allocation* a : last_)
    if (a && address >= a->begin && address + bytes <= a->end) return a;
  auto after = allocations_.upper_bound(address);
  if (after == allocations_.begin()) return nullptr;
  Allocation* a = &std::prev(after)->second;
  if (address + bytes > a->end) return nullptr;
  return last_[turn_++ % 4] = a;
}

std::string Memory::describe(uint64_t address) const {
  std::ostringstream s;
  s << "0x" << std::hex << address << std::dec;
  auto after = allocations_.upper_bound(address);
  if (after != allocations_.begin()) {
    const Allocation& a = std::prev(after)->second;
    s << ", " << address - a.begin << " bytes after the start of a " << a.kind << " of " << a.end - a.begin << " bytes";
  }
  if (after != allocations_.end())
    s << ", " << after->first - address << " bytes before a " << after->second.kind << " of " << after->second.end - after->first
      << " bytes";
  return s.str();
}

void Memory::start_counting() {
  for (auto& [begin, a] : allocations_) {
    a.loaded.clear();
    a.stored.clear();
    a.units.clear();
  }
}

void Memory::count_unique(uint64_t* loaded, uint64_t* stored) const {
  for (const auto& [begin, a] : allocations_) {
    *loaded += 32 * static_cast<uint64_t>(std::count(a.loaded.begin(), a.loaded.end(), true));
    *stored += 32 * static_cast<uint64_t>(std::count(a.stored.begin(), a.stored.end(), true));
  }
}

}  // namespace gpusim
