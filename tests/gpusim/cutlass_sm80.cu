// CUTLASS's grouped GEMM for sm_80 (tiles 128 x 128 x 32, 4 stages), known to be right on hardware: what it computes on the simulated
// device holds the simulator to the real meaning of mma.sync, ldmatrix and cp.async. Compiled by its test only.
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_grouped.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>

#include <vector>

namespace {

using T = cutlass::bfloat16_t;
using Kernel = cutlass::gemm::kernel::DefaultGemmGrouped<
    T, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 8, T, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 8,
    T, cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, cutlass::gemm::GemmShape<128, 128, 32>,
    cutlass::gemm::GemmShape<64, 64, 32>, cutlass::gemm::GemmShape<16, 8, 16>,
    cutlass::epilogue::thread::LinearCombination<T, 8, float, float>, cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 4,
    cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly, cutlass::arch::OpMultiplyAdd,
    cutlass::gemm::SharedMemoryClearOption::kZfill>::GemmKernel;  // without it, what lies past the edges is read but not used
using Gemm = cutlass::gemm::device::GemmGrouped<Kernel>;

template <class E>
E* to_device(const std::vector<E>& host) {
  void* device = nullptr;
  cudaMalloc(&device, host.size() * sizeof(E));
  cudaMemcpy(device, host.data(), host.size() * sizeof(E), cudaMemcpyHostToDevice);
  return static_cast<E*>(device);
}

}  // namespace

// out[r, :] = x[r, :] w[e]^T for the rows of each of E experts; x [S, K], w [E, N, K], out [S, N]; offsets on the host.
extern "C" __attribute__((visibility("default"))) int run(T* x, T* w, T* out, const int* offsets, int E, int N, int K) {
  std::vector<cutlass::gemm::GemmCoord> sizes;
  std::vector<T*> a, b, d;
  for (int e = 0; e < E; ++e) {
    sizes.emplace_back(offsets[e + 1] - offsets[e], N, K);
    a.push_back(x + int64_t{offsets[e]} * K);
    b.push_back(w + int64_t{e} * N * K);
    d.push_back(out + int64_t{offsets[e]} * N);
  }
  auto* device_sizes = to_device(sizes);
  T **device_a = to_device(a), **device_b = to_device(b), **device_d = to_device(d);
  auto* ld_k = to_device(std::vector<int64_t>(E, K));
  auto* ld_n = to_device(std::vector<int64_t>(E, N));
  Gemm::Arguments arguments(device_sizes, E, 8, {1.0f, 0.0f}, device_a, device_b, device_d, device_d, ld_k, ld_k, ld_n, ld_n, sizes.data());
  Gemm gemm;
  const bool ok = gemm.initialize(arguments) == cutlass::Status::kSuccess && gemm.run() == cutlass::Status::kSuccess;
  for (void* p : {static_cast<void*>(device_sizes), static_cast<void*>(device_a), static_cast<void*>(device_b),
                  static_cast<void*>(device_d), static_cast<void*>(ld_k), static_cast<void*>(ld_n)})
    cudaFree(p);
  return ok ? cudaGetLastError() : -1;
}
