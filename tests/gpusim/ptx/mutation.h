// GPUSIM_MUTATE=kernel;text;k;action changes the k-th statement (from 0) that contains `text` in functions whose name contains
// `kernel`. Actions: drop; true or false (a statement with a predicate result becomes that constant); from=>to (replacement);
// trap (whether it is reached at all).
// GPUSIM_MUTATE=kernel;text;count;print reports how many statements match, on stderr.
#pragma once
#include <string>

namespace gpusim {

class Mutation {
 public:
  explicit Mutation(const std::string& function);
  ~Mutation();
  void apply(std::string* statement);  // leaves it empty to drop it

 private:
  bool active_ = false, count_only_ = false;
  std::string function_, text_, action_;
  int wanted_ = 0, seen_ = 0;
};

}  // namespace gpusim
