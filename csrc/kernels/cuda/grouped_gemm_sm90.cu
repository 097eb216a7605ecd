// What happens around a CUTLASS grouped GEMM on sm_90a: gathered rows of x are copied into place, the arrays of problems are filled on
// the device, and what no problem writes is cleared: rows of dropped slots, gradients of experts without rows.
#include "cutlass_launch.h"
#include "element.cuh"
#include "gemm_problems.h"
#include "grouped_gemm.h"
#include "kernels.h"

namespace moe::cuda {
namespace {

constexpr int64_t kElement = 2;  // bytes: these kernels are for 16-bit types

__global__ void __launch_bounds__(kThreads)
    fill_kernel(GemmOperands o, const int32_t* expert_offsets, int64_t E, char* base, Sm90Workspace w) {
  const int64_t e = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (e >= E) return;
  const GemmProblem problem = problem_of(o, expert_offsets, e, kElement);
  int32_t* shape = reinterpret_cast<int32_t*>(base + w.shapes) + 3 * e;
  shape[0] = problem.m, shape[1] = problem.n, shape[2] = problem.k;
  reinterpret_cast<const char**>(base + w.a)[e] = problem.a;
  reinterpret_cast<const char**>(base + w.b)[e] = problem.b;
  reinterpret_cast<char**>(base + w.d)[e] = problem.d;
  reinterpret_cast<int64_t*>(base + w.ld_a)[e] = o.ld_x;
  reinterpret_cast<int64_t*>(base + w.ld_b)[e] = o.ld_other;
  reinterpret_cast<int64_t*>(base + w.ld_d)[e] = o.out.stride;
}

// Rows of dropped slots.
__global__ void __launch_bounds__(kThreads)
    clear_rows_kernel(uint16_t* out, int64_t stride, int64_t N, const int32_t* expert_offsets, int64_t S, int64_t E) {
  for (int64_t r = greatest(expert_offsets[E], 0) + int64_t{blockIdx.x}; r < S; r += gridDim.x) {
    for (int64_t i = threadIdx.x; i < N; i += kThreads) out[r * stride + i] = 0;
  }
}

// Results of experts without rows; kClearBlocks blocks per expert.
constexpr int kClearBlocks = 16;
__global__ void __launch_bounds__(kThreads)
    clear_experts_kernel(OutputTable out, int64_t M, int64_t N, const int32_t* expert_offsets, int64_t S) {
  const int64_t e = blockIdx.x / kClearBlocks;
  if (expert_rows(expert_offsets, e, S).count > 0) return;
  uint16_t* matrix = static_cast<uint16_t*>(expert_bytes(out, e, kElement));
  for (int64_t m = blockIdx.x % kClearBlocks; m < M; m += kClearBlocks) {
    for (int64_t n = threadIdx.x; n < N; n += kThreads) matrix[m * out.stride + n] = 0;
  }
}

// CUTLASS launches as many blocks, and those of the cooperative kernels come in clusters of two.
int even_multiprocessors() {
  const int count = multiprocessors();
  return count < 2 ? count * 2 : count / 2 * 2;
}

int64_t copied_bytes(const Rows& rows, int64_t S, int64_t width) { return rows.row_to_slot ? S * width * kElement : 0; }

// Where the rows are once they need no gathering: copied to `place`, or where they were.
Status bring_into_place(const Rows& rows, DType dtype, int64_t S, int64_t width, char* place, const Launch& launch, const char*& data,
                        int64_t& stride) {
  data = static_cast<const char*>(rows.data);
  stride = rows.stride;
  if (!rows.row_to_slot) return Status::kOk;
  PermuteParams p{dtype, rows, S, width, place};
  data = place;
  stride = width;
  return permute.launch(p, launch);
}

Status multiply(const GemmOperands& o, const int32_t* expert_offsets, int64_t E, char* base, const Sm90Workspace& w, int sms,
                Sm90Launch kernel, const Launch& launch) {
  const unsigned blocks = static_cast<unsigned>(divide_up(E, kThreads));
  fill_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(o, expert_offsets, E, base, w);
  if (launched() != Status::kOk) return Status::kLaunchFailed;
  GemmArrays arrays{static_cast<int>(E), sms};
  arrays.shapes = base + w.shapes;
  arrays.a = base + w.a;
  arrays.b = base + w.b;
  arrays.d = base + w.d;
  arrays.ld_a = base + w.ld_a;
  arrays.ld_b = base + w.ld_b;
  arrays.ld_d = base + w.ld_d;
  arrays.tensor_maps = base + w.tensor_maps;
  return kernel(arrays, launch.stream);
}

int64_t mm_workspace(const GroupedMmParams& p, int) {
  return sm90_workspace(p.E, even_multiprocessors(), copied_bytes(p.x, p.S, p.K)).bytes;
}
int64_t wgrad_workspace(const GroupedMmWgradParams& p, int) { return sm90_workspace(p.E, even_multiprocessors(), 0).bytes; }

template <bool cooperative>
Status launch_mm(const GroupedMmParams& p, const Launch& launch) {
  char* base = static_cast<char*>(launch.workspace);
  const int sms = even_multiprocessors();
  const bool n_major = p.weight.stride_k != 1;
  const Sm90Workspace w = sm90_workspace(p.E, sms, copied_bytes(p.x, p.S, p.K));
  GemmOperands o;
  if (const Status s = bring_into_place(p.x, p.dtype, p.S, p.K, base + w.rows, launch, o.x, o.ld_x); s != Status::kOk) return s;
  o.ld_other = n_major ? p.weight.stride_k : p.weight.stride_n;
  o.weight = p.weight;
  o.out.base = p.out;
  o.out.stride = p.out_stride;
  o.S = p.S;
  o.N = p.N;
  o.K = p.K;
  const unsigned blocks = static_cast<unsigned>(least<int64_t>(p.S, 4 * sms));
  clear_rows_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(static_cast<uint16_t*>(p.out), p.out_stride, p.N,
                                                                                       p.expert_offsets, p.S, p.E);
  const auto pick = p.dtype == DType::kBFloat16 ? sm90_grouped_mm_bf16 : sm90_grouped_mm_f16;
  return multiply(o, p.expert_offsets, p.E, base, w, sms, pick(cooperative, n_major), launch);
}

Status launch_wgrad(const GroupedMmWgradParams& p, const Launch& launch) {
  char* base = static_cast<char*>(launch.workspace);
  const int sms = even_multiprocessors();
  const Sm90Workspace w = sm90_workspace(p.E, sms, 0);
  GemmOperands o;
  o.wgrad = true;
  o.x = static_cast<const char*>(p.a.data);
  o.other = static_cast<const char*>(p.b.data);
  o.ld_x = p.a.stride;
  o.ld_other = p.b.stride;
  o.out = p.out;
  o.S = p.S;
  o.N = p.M;
  o.K = p.N;
  clear_experts_kernel<<<static_cast<unsigned>(p.E * kClearBlocks), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(
      p.out, p.M, p.N, p.expert_offsets, p.S);
  return multiply(o, p.expert_offsets, p.E, base, w, sms, sm90_wgrad(p.dtype), launch);
}

}  // namespace

const Kernel<GroupedMmParams> sm90_grouped_mm_cooperative = {nullptr, mm_workspace, launch_mm<true>};
const Kernel<GroupedMmParams> sm90_grouped_mm_pingpong = {nullptr, mm_workspace, launch_mm<false>};
const Kernel<GroupedMmWgradParams> sm90_wgrad_cooperative = {nullptr, wgrad_workspace, launch_wgrad};

}  // namespace moe::cuda
