// For the programs of this folder: the first false statement ends the program with its text and the values named with it.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s is false: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                            \
      std::printf("\n");                                                   \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

// Ids of S slots: 0 uniform, 1 skewed to low ids, 2 one expert, 3 every third expert, 4 some outside [0, E), 5 all outside.
inline std::vector<int64_t> routing(int kind, int64_t S, int64_t E, std::mt19937& random) {
  std::vector<int64_t> ids(S);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  for (int64_t& id : ids) {
    id = kind == 0   ? below(E)
         : kind == 1 ? below(below(E) + 1)
         : kind == 2 ? E / 2
         : kind == 3 ? below((E + 2) / 3) * 3
         : kind == 4 ? below(E + 4) - 2
                     : -1 - below(3);
  }
  return ids;
}
constexpr int kRoutings = 6;

inline std::vector<int32_t> offsets_of(const std::vector<int64_t>& ids, int64_t E) {
  std::vector<int32_t> offsets(E + 1);
  for (int64_t id : ids) {
    if (id >= 0 && id < E) ++offsets[id + 1];
  }
  for (int64_t e = 0; e < E; ++e) offsets[e + 1] += offsets[e];
  return offsets;
}
