#include "queue.h"

#include <algorithm>
#include <cstdlib>

namespace gpusim {

void ThreadCopies::perform(uint64_t end) {
  for (; first < end; ++first) {
    const Copy c = pending.front();
    pending.pop_front();
    std::memcpy(c.to, c.from, c.filled);
    std::memset(c.to + c.filled, 0, c.bytes - c.filled);
  }
}

AsyncQueue::AsyncQueue(Cluster& cluster) : cluster_(cluster) {
  const char* setting = std::getenv("GPUSIM_ASYNC");
  const std::string mode = setting ? setting : "late";
  early_ = mode == "early";
  seeded_ = !mode.empty() && mode.find_first_not_of("0123456789") == std::string::npos;
  if (seeded_) random_.seed(static_cast<unsigned>(std::strtoul(mode.c_str(), nullptr, 10)) + 7919 * cluster.index);
}

bool AsyncQueue::now() { return early_ || (seeded_ && random_() % 3 == 0); }

void AsyncQueue::add(Key key, Operation operation) {
  pending_.push_back({key, std::move(operation)});
  if (now()) run(pending_.size() - 1);
}

void AsyncQueue::run(size_t at) {
  Pending p = std::move(pending_[at]);
  pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(at));
  ++cluster_.launch->progress;
  p.operation();
}

bool AsyncQueue::perform(Key key) {
  bool any = false;
  for (size_t k = 0; k < pending_.size();) {
    if (pending_[k].key != key) {
      ++k;
      continue;
    }
    run(k);
    any = true;
  }
  return any;
}

void AsyncQueue::turn(bool idle) {
  if (seeded_)
    for (size_t n = random_() % 4; n > 0 && !pending_.empty(); --n) run(random_() % pending_.size());
  if (idle && !pending_.empty()) run(0);
}

// What nobody waited for still happens.
void AsyncQueue::finish() {
  while (!pending_.empty()) run(0);
  for (auto& [warp, state] : states_)
    for (int l = 0; l < kLanes; ++l) {
      const auto reads = [](const Group& group) { return !group.reads.empty(); };
      if (reads(state->bulk_open[l]) || std::any_of(state->bulk[l].begin(), state->bulk[l].end(), reads))
        throw Failure{cluster_.launch->kernel->name +
                      ": a thread exits without having waited (cp.async.bulk.wait_group) for a bulk store to read its shared memory"};
      for (Group& group : state->bulk[l])
        for (auto& operation : group.operations) operation();
      for (auto& operation : state->bulk_open[l].operations) operation();
    }
}

void AsyncQueue::arrive(Key key, int count, int64_t bytes) {
  MBarrier& b = barriers[key];
  b.pending -= count;
  b.bytes -= bytes;
  if (b.pending < 0) throw Failure{cluster_.launch->kernel->name + ": more arrivals at an mbarrier than its phase expects"};
  if (b.pending || b.bytes) return;
  b.pending = b.initial;
  ++b.phase;
  b.released = b.clock;
  ++cluster_.launch->progress;
}

AsyncState& AsyncQueue::state(Warp& w) {
  if (!w.async) {
    auto& mine = states_[&w];
    mine = std::make_unique<AsyncState>();
    w.async = mine.get();
  }
  return *w.async;
}

std::shared_ptr<AsyncQueue> make_async_queue(Cluster& cluster) { return std::make_shared<AsyncQueue>(cluster); }

}  // namespace gpusim
