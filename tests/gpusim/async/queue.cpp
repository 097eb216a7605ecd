#include "queue.h"

#include <cstdlib>

namespace gpusim {

AsyncQueue::AsyncQueue(Cluster& cluster) : cluster_(cluster) {
  const char* setting = std::getenv("GPUSIM_ASYNC");
  const std::string mode = setting ? setting : "late";
  early_ = mode == "early";
  seeded_ = !mode.empty() && mode.find_first_not_of("0123456789") == std::string::npos;
  if (seeded_) random_.seed(static_cast<unsigned>(std::strtoul(mode.c_str(), nullptr, 10)) + 7919 * cluster.index);
}

std::shared_ptr<bool> AsyncQueue::add(Operation operation) {
  auto done = std::make_shared<bool>(false);
  pending_.push_back({std::move(operation), done});
  if (early_) run(pending_.size() - 1);
  return done;
}

void AsyncQueue::run(size_t at) {
  Pending p = std::move(pending_[at]);
  pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(at));
  *p.done = true;
  ++cluster_.launch->progress;
  p.operation();
}

void AsyncQueue::perform(const std::shared_ptr<bool>& token) {
  for (size_t k = 0; k < pending_.size(); ++k)
    if (pending_[k].done == token) return run(k);
}

void AsyncQueue::perform_all() {
  while (!pending_.empty()) run(0);
}

void AsyncQueue::turn(bool idle) {
  if (pending_.empty()) return;
  if (seeded_) {
    for (size_t n = random_() % 4; n > 0 && !pending_.empty(); --n) run(random_() % pending_.size());
  }
  if (idle && !pending_.empty()) run(0);
}

void AsyncQueue::finish() { perform_all(); }

std::shared_ptr<AsyncQueue> make_async_queue(Cluster& cluster) { return std::make_shared<AsyncQueue>(cluster); }

}  // namespace gpusim
