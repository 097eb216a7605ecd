// Global memory as the device may see it: a table of allocations, each with a name, and address windows for the other spaces.
// PTX ISA 5.1 (state spaces), 6.4.1 (generic addressing). Device pointers are host pointers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace gpusim {

enum Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParameter, kFrame };

// What fresh memory holds: a NaN in every float type, and no likely integer.
constexpr uint16_t kPoison = 0xffa5;
void poison(void* data, size_t bytes);

constexpr uint32_t kSharedBase = 1024;  // sm_90 keeps the first KiB
constexpr int kRankShift = 24;          // an address in shared::cluster: CTA rank + 1, then the offset

struct Allocation {
  uint64_t begin = 0, end = 0;
  const char* kind = "";
  bool writable = true;
  std::vector<bool> loaded, stored;  // sectors of 32 bytes, of this launch
};

class Memory {
 public:
  static Memory& get();
  void add(void* begin, size_t bytes, const char* kind, bool writable = true);
  bool remove(void* begin);                          // false: not known
  Allocation* find(uint64_t address, size_t bytes);  // the allocation that holds all of it, or null
  std::string describe(uint64_t address) const;      // where an address lies, in words
  void start_counting();
  void count_unique(uint64_t* loaded, uint64_t* stored) const;

  uint64_t shared_window = 0, local_window = 0;  // 4 GiB each, reserved and inaccessible

 private:
  Memory();
  std::map<uint64_t, Allocation> allocations_;
  Allocation* last_[4] = {};
  int turn_ = 0;
};

constexpr uint64_t kWindow = uint64_t{1} << 32;

}  // namespace gpusim
