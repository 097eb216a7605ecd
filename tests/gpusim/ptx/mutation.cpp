#include "mutation.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "module.h"

namespace gpusim {

Mutation::Mutation(const std::string& function) : function_(function) {
  const char* setting = std::getenv("GPUSIM_MUTATE");
  if (!setting || !*setting) return;
  std::vector<std::string> parts{""};
  for (const char* c = setting; *c; ++c) {
    if (*c == ';' && parts.size() < 4) {
      parts.emplace_back();
    } else {
      parts.back() += *c;
    }
  }
  if (parts.size() != 4 || function.find(parts[0]) == std::string::npos) return;
  active_ = true;
  text_ = parts[1];
  count_only_ = parts[2] == "count";
  wanted_ = std::atoi(parts[2].c_str());
  action_ = parts[3];
}

Mutation::~Mutation() {
  if (active_ && count_only_) std::fprintf(stderr, "gpusim: %d statements of %s contain \"%s\"\n", seen_, function_.c_str(), text_.c_str());
}

void Mutation::apply(std::string* statement) {
  if (!active_ || statement->find(text_) == std::string::npos) return;
  if (seen_++ != wanted_ || count_only_) return;
  const size_t guard = (*statement)[0] == '@' ? statement->find(' ') + 1 : 0;
  if (action_ == "drop") {
    statement->clear();
  } else if (action_ == "trap") {
    statement->replace(guard, std::string::npos, "trap");
  } else if (action_ == "true" || action_ == "false") {
    const size_t begin = statement->find_first_not_of(' ', statement->find(' ', guard)), end = statement->find_first_of(",| ", begin);
    *statement = statement->substr(0, guard) + "mov.pred " + statement->substr(begin, end - begin) + (action_ == "true" ? ", 1" : ", 0");
  } else if (const size_t arrow = action_.find("=>"); arrow != std::string::npos) {
    const std::string from = action_.substr(0, arrow);
    const size_t at = statement->find(from);
    if (at == std::string::npos) throw Failure{"GPUSIM_MUTATE does not apply to: " + *statement};
    statement->replace(at, from.size(), action_.substr(arrow + 2));
  }
}

}  // namespace gpusim
