// The problem of each expert covers its rows and nothing else, for stacked and listed weights, for random routings; an expert
// without rows has an empty weight gradient. The parts of the workspace do not overlap.
#include "kernels/cuda/gemm_problems.h"

#include <algorithm>

#include "check.h"

using namespace moe;
using namespace moe::cuda;

static void check_problems(int64_t S, int64_t E, int kind, bool listed, std::mt19937& random) {
  constexpr int64_t kElement = 2, kN = 24, kK = 40, kLdX = 48, kLdOut = 32;
  const std::vector<int32_t> offsets = offsets_of(routing(kind, S, E, random), E);
  std::vector<char> x(S * kLdX * kElement + 1), out(S * kLdOut * kElement + 1), weights(E * kN * kK * kElement);
  std::vector<const void*> weight_list;
  std::vector<void*> result_list;
  for (int64_t e = 0; e < E; ++e) {
    weight_list.push_back(weights.data() + (E - 1 - e) * kN * kK * kElement);
    result_list.push_back(weights.data() + (E - 1 - e) * kN * kK * kElement);
  }
  GemmOperands o;
  o.x = x.data();
  o.ld_x = kLdX;
  o.weight.base = weights.data();
  o.weight.stride_e = kN * kK;
  o.weight.list = listed ? weight_list.data() : nullptr;
  o.out.base = out.data();
  o.out.stride = kLdOut;
  o.N = kN;
  o.K = kK;
  GemmOperands w = o;
  w.wgrad = true;
  w.other = out.data();
  w.ld_other = kLdOut;
  w.out.base = weights.data();
  w.out.stride_e = kN * kK;
  w.out.stride = kK;
  w.out.list = listed ? result_list.data() : nullptr;
  int64_t row = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t rows = offsets[e + 1] - offsets[e];
    const char* matrix = listed ? static_cast<const char*>(weight_list[e]) : weights.data() + e * kN * kK * kElement;
    const GemmProblem p = problem_of(o, offsets.data(), e, kElement), g = problem_of(w, offsets.data(), e, kElement);
    CHECK(p.m == rows && p.n == kN && p.k == kK && p.b == matrix, "S=%ld E=%ld expert %ld", S, E, e);
    CHECK(p.a == x.data() + row * kLdX * kElement && p.d == out.data() + row * kLdOut * kElement, "S=%ld E=%ld expert %ld", S, E, e);
    CHECK(g.m == (rows ? kN : 0) && g.n == (rows ? kK : 0) && g.k == rows && g.d == matrix, "S=%ld E=%ld expert %ld", S, E, e);
    CHECK(g.a == p.a && g.b == out.data() + row * kLdOut * kElement, "S=%ld E=%ld expert %ld", S, E, e);
    row += rows;
  }
}

static void check_workspace(int64_t E, int64_t sms, int64_t rows) {
  const Sm90Workspace w = sm90_workspace(E, sms, rows);
  std::vector<std::pair<int64_t, int64_t>> parts = {
      {w.shapes, 12 * E}, {w.a, 8 * E},    {w.b, 8 * E},    {w.d, 8 * E},
      {w.ld_a, 8 * E},    {w.ld_b, 8 * E}, {w.ld_d, 8 * E}, {w.tensor_maps, sms * kTensorMapBytesPerSm},
      {w.rows, rows}};
  std::sort(parts.begin(), parts.end());
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t limit = i + 1 < parts.size() ? parts[i + 1].first : w.bytes;
    CHECK(parts[i].first % 128 == 0 && parts[i].first + parts[i].second <= limit, "E=%ld part %zu", E, i);
  }
}

int main() {
  std::mt19937 random(3);
  for (int64_t E : {1, 5, 128, 512}) {
    for (int64_t S : {0, 1, 100, 1000}) {
      for (int kind = 0; kind < kRoutings; ++kind) {
        check_problems(S, E, kind, false, random);
        check_problems(S, E, kind, true, random);
      }
    }
    for (int64_t rows : {int64_t{0}, int64_t{2}, int64_t{1} << 33}) check_workspace(E, 132, rows);
  }
  return 0;
}
