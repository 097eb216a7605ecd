// Global memory as the device may see it: a table of allocations, each with a name, and address windows for the other spaces.
// PTX ISA, "State Spaces", "Generic Addressing". Device pointers are host pointers.
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

// Who did something to two bytes of global memory: a warp of a cluster, at its clock (0: nobody).
struct GlobalEntry {
  uint64_t clock : 34, atomic : 1, cluster : 21, warp : 8;
};
struct GlobalUnit {
  GlobalEntry write = {}, reads[2] = {};  // the last readers of two clusters
};

struct Allocation {
  uint64_t begin = 0, end = 0;
  const char* kind = "";
  bool writable = true;
  std::vector<bool> loaded, stored;  // sectors of 32 bytes, of this launch
  std::vector<GlobalUnit> units;     // of 2 bytes, of this launch
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
