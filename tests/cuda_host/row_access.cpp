// Which operands are reached 16 bytes at a time, against the addresses of every access; and that the threads of a block of rows
// cover every access of every row once.
#include "kernels/cuda/row_access.h"

#include "check.h"

using namespace moe;
using namespace moe::cuda;

static const char* const kBase = reinterpret_cast<const char*>(4096);

static const void* at(int64_t bytes) { return kBase + bytes; }

// Whether rows of `width` elements, `stride` apart, are whole 16-byte accesses.
static bool can(const void* data, int64_t width, int64_t stride, int64_t element) {
  if (width * element % 16) return false;
  for (int64_t r = 0; data && r < 16; ++r) {
    if ((reinterpret_cast<uintptr_t>(data) + r * stride * element) % 16) return false;
  }
  return true;
}

static void check_rows(DType dtype, int64_t width, int64_t gap, int64_t first, int64_t second) {
  const int64_t element = element_size(dtype);
  const void *a = at(first * element), *b = at(second * element);
  Rows rows{a, width + gap, nullptr, 1};
  const bool gathered = can(a, width, width + gap, element), plain = can(a, width, width, element), other = can(b, width, width, element);
  const auto name = moe::name(dtype);
  void* out = const_cast<void*>(b);
  CHECK(is_wide(PermuteParams{dtype, rows, 8, width, out}) == (gathered && other), "%s %ld %ld", name, width, gap);
  UnpermuteParams unpermute{dtype, a, nullptr, nullptr, 8, 2, width, out};
  CHECK(is_wide(unpermute) == (plain && other), "%s %ld", name, width);
  UnpermuteBackwardParams backward{dtype, rows, nullptr, nullptr, 8, width, out, nullptr};
  CHECK(is_wide(backward) == (gathered && other), "%s %ld %ld", name, width, gap);
  backward.rows = a;
  backward.grad_rows = nullptr;
  CHECK(is_wide(backward) == (gathered && plain), "%s %ld %ld", name, width, gap);
  GatedActivationParams forward{dtype, {}, a, nullptr, 8, width, 4, out};
  CHECK(is_wide(forward) == (plain && other), "%s %ld", name, width);
  GatedActivationBackwardParams g;
  g.dtype = dtype;
  g.I = width;
  for (const void** field : {&g.grad, &g.pre_act}) {
    *field = a;
    g.scaled = out;
    CHECK(is_wide(g) == (plain && other), "%s %ld", name, width);
    *field = g.scaled = nullptr;
  }
  g.grad_pre = out;
  CHECK(is_wide(g) == other, "%s %ld", name, width);
  g.H = width;
  g.grad_out = rows;  // read only with a bias
  CHECK(is_wide(g) == other, "%s %ld", name, width);
  g.E = 4;
  g.down_bias.base = a;
  g.down_bias.stride_e = width + gap;
  CHECK(is_wide(g) == (other && gathered), "%s %ld %ld", name, width, gap);
  GroupedBiasGradParams bias_grad{dtype, rows, nullptr, nullptr, nullptr, 8, 4, width, {}};
  CHECK(is_wide(bias_grad) == gathered, "%s %ld %ld", name, width, gap);
}

static void check_results(DType dtype, int64_t N, int64_t gap, int64_t first, int64_t second) {
  const int64_t element = element_size(dtype);
  const void *a = at(first * element), *b = at(second * element);
  GroupedMmParams p;
  p.dtype = dtype;
  p.N = N;
  p.E = 3;
  p.out = const_cast<void*>(a);
  p.out_stride = N + gap;
  const bool out = can(a, N, N + gap, element), bias = can(b, N, N, element);
  CHECK(has_wide_results(p) == out, "%s %ld %ld", moe::name(dtype), N, gap);
  p.bias.base = b;
  p.bias.stride_e = N;
  CHECK(has_wide_results(p) == (out && bias), "%s %ld %ld", moe::name(dtype), N, gap);
  const void* list[] = {kBase, b, kBase};
  p.bias = {nullptr, 0, list};
  CHECK(has_wide_results(p) == (out && bias), "%s %ld %ld", moe::name(dtype), N, gap);
  GroupedMmWgradParams w;
  w.dtype = dtype;
  w.E = 3;
  w.N = N;
  void* outs[] = {const_cast<char*>(kBase), const_cast<void*>(a), const_cast<char*>(kBase)};
  w.out = {nullptr, 0, outs, N + gap};
  CHECK(has_wide_results(w) == out, "%s %ld %ld", moe::name(dtype), N, gap);
  w.out = {outs[1], 5 * (N + gap), nullptr, N + gap};
  CHECK(has_wide_results(w) == out, "%s %ld %ld", moe::name(dtype), N, gap);
}

int main() {
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t width : {8, 16, 20, 21, 24, 768}) {
      for (int64_t gap : {0, 1, 2, 4, 8}) {
        for (int64_t first : {0, 1, 4, 8}) {
          for (int64_t second : {0, 2, 8}) {
            check_rows(dtype, width, gap, first, second);
            check_results(dtype, width, gap, first, second);
          }
        }
      }
    }
  }
  for (int64_t accesses : {0, 1, 31, 32, 33, 64, 96, 128, 200, 256, 257, 5000}) {
    const int threads = threads_per_row(accesses);
    CHECK(threads % 32 == 0 && kThreads % threads == 0, "%ld accesses: %d threads", accesses, threads);
    CHECK(threads == kThreads || threads >= accesses, "%ld accesses: %d threads", accesses, threads);
    CHECK(threads == 32 || threads / 2 < accesses, "%ld accesses: %d threads", accesses, threads);
  }
  return 0;
}
