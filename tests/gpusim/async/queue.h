// Asynchronous operations and mbarriers of a cluster. GPUSIM_ASYNC=late (default): performed when somebody waits; early: at once; a
// number: at random moments from that seed. All are legal, so a kernel must be right in each.
#pragma once
#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include "../exec/machine.h"
#include "../exec/race.h"

namespace gpusim {

// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier". A phase ends when nobody and no byte is pending.
struct MBarrier {
  int32_t pending = 0, initial = 0;
  int64_t bytes = 0;  // may be below zero for a while: data can come before it is announced
  uint32_t phase = 0;
  std::vector<uint32_t> clock, released;
  ShadowEntry made;  // by mbarrier.init, which others must know of
};

// cp.async of one thread: copies in order, committed in groups.
struct ThreadCopies {
  struct Copy {
    uint8_t* to;
    const uint8_t* from;
    uint8_t bytes, filled;
  };
  std::deque<Copy> pending;
  uint64_t first = 0;           // number of pending.front()
  std::deque<uint64_t> groups;  // where each committed group ends
  uint64_t next() const { return first + pending.size(); }
  void perform(uint64_t end);
};

// Groups of bulk operations of one thread, and of warpgroup products of one warp.
struct Group {
  std::vector<std::function<void()>> operations;
  std::vector<SharedRead> reads;  // of shared memory, that the thread has to wait for before it may be written
};
struct AsyncState {
  std::array<ThreadCopies, kLanes> copies;
  std::array<Group, kLanes> bulk_open;
  std::array<std::deque<Group>, kLanes> bulk;
  Group products_open;
  std::deque<Group> products;
  uint64_t products_committed = 0, products_done = 0;
};

class AsyncQueue {
 public:
  using Operation = std::function<void()>;
  using Key = uint64_t;
  explicit AsyncQueue(Cluster& cluster);
  static Key key(const Cta& cta, uint32_t offset) { return uint64_t{static_cast<uint32_t>(cta.rank)} << 32 | offset; }

  void add(Key key, Operation operation);  // one that ends at the mbarrier `key`
  bool perform(Key key);                   // all of those; whether there were any
  void turn(bool idle);                    // once per round of the scheduler
  void finish();                           // the cluster has ended
  bool now();                              // whether to perform something at once

  std::unordered_map<Key, MBarrier> barriers;
  void arrive(Key key, int count, int64_t bytes);  // and ends the phase when that was the last
  AsyncState& state(Warp& w);
  // The 128 bytes of a tensor map as this CTA has cached them: read once, and again after fence.proxy.tensormap.
  template <class Read>
  const uint8_t* descriptor(const Cta& cta, uint64_t address, const Read& read) {
    auto& cached = descriptors_[{cta.rank, address}];
    if (cached.empty()) {
      const uint8_t* bytes = read();
      cached.assign(bytes, bytes + 128);
    }
    return cached.data();
  }
  void forget_descriptor(const Cta& cta, uint64_t address) { descriptors_.erase({cta.rank, address}); }

 private:
  struct Pending {
    Key key;
    Operation operation;
  };
  void run(size_t at);
  Cluster& cluster_;
  std::vector<Pending> pending_;
  std::map<std::pair<int, uint64_t>, std::vector<uint8_t>> descriptors_;
  std::unordered_map<const Warp*, std::unique_ptr<AsyncState>> states_;
  std::mt19937 random_;
  bool early_ = false, seeded_ = false;
};

std::shared_ptr<AsyncQueue> make_async_queue(Cluster& cluster);

}  // namespace gpusim
