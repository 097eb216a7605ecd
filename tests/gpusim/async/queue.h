// Asynchronous operations of a cluster. GPUSIM_ASYNC=late (default): performed when somebody waits; early: at once; a number: at
// random moments from that seed. All are legal, so a kernel must be right in each.
#pragma once
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "../exec/machine.h"

namespace gpusim {

class AsyncQueue {
 public:
  using Operation = std::function<void()>;
  explicit AsyncQueue(Cluster& cluster);
  // Performed now, later, or at some time before `key` is waited for. A key is the thing waited for: a group, a barrier.
  std::shared_ptr<bool> add(Operation operation);  // *result: whether it was performed
  void perform(const std::shared_ptr<bool>& token);
  void perform_all();
  void turn(bool idle);  // once per round of the scheduler
  void finish();         // the cluster has ended
  bool early() const { return early_; }

 private:
  struct Pending {
    Operation operation;
    std::shared_ptr<bool> done;
  };
  void run(size_t at);
  Cluster& cluster_;
  std::vector<Pending> pending_;
  std::mt19937 random_;
  bool early_ = false, seeded_ = false;
};

std::shared_ptr<AsyncQueue> make_async_queue(Cluster& cluster);

}  // namespace gpusim
