// As instructions.cu, for what exists on sm_90a only: mbarriers, bulk and tensor copies, clusters, wgmma, register pools.
#include <cooperative_groups.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ void init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count));
  asm volatile("fence.mbarrier_init.release.cluster;");
}
__device__ void expect(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
__device__ void wait(uint64_t* bar, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nLOOP:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra END;\nbra LOOP;\nEND:\n}" ::"r"(
          shared_address(bar)),
      "r"(parity)
      : "memory");
}
__device__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ void bulk_done() {
  asm volatile("cp.async.bulk.commit_group;");
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
__device__ void load_box(void* box, const CUtensorMap* map, int column, int row, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(box)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(bar))
      : "memory");
}

// ---- mbarriers: two arrivals; the state of the first is tested before and after the second
__global__ void test_wait(const int*, int* out, int) {
  __shared__ uint64_t bar;
  init(&bar, 2);
  uint64_t state;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(shared_address(&bar)) : "memory");
  for (int k = 0; k < 2; ++k) {
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(out[2 * k])
                 : "r"(shared_address(&bar)), "l"(state)
                 : "memory");
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(out[2 * k + 1])
                 : "r"(shared_address(&bar)), "r"(0)
                 : "memory");
    if (k == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 1;" ::"r"(shared_address(&bar)) : "memory");
  }
}
// Copies of 32 threads that arrive when they have landed: .noinc is one of the expected arrivals, the other form adds its own.
__global__ void copy_arrivals(const int* in, int* out, int noinc) {
  __shared__ __align__(16) int s[128];
  __shared__ uint64_t bar;
  const int t = threadIdx.x;
  if (t == 0) init(&bar, 32);
  __syncthreads();
  if (t < 32) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(s + 4 * t)), "l"(in + 4 * t) : "memory");
    if (noinc) {
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&bar)) : "memory");
    } else {
      asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(shared_address(&bar)) : "memory");
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&bar)) : "memory");
    }
  }
  wait(&bar, 0);
  out[t] = s[t];
}

// ---- bulk copies: 512 bytes to shared memory and, each number larger by 1, back; then shared memory is written again
__global__ void bulk(const int* in, int* out, int) {
  __shared__ __align__(128) int s[128];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    init(&bar, 1);
    expect(&bar, 512);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 512, [%2];" ::"r"(shared_address(s)),
                 "l"(in), "r"(shared_address(&bar))
                 : "memory");
  }
  __syncthreads();
  wait(&bar, 0);
  ++s[threadIdx.x];
  proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 512;" ::"l"(out), "r"(shared_address(s)) : "memory");
    bulk_done();
  }
  __syncthreads();
  static_cast<volatile int*>(s)[threadIdx.x] = 0;
}

// ---- TMA: a 64 x 8 box (bf16, 128-byte swizzle) at column 40, row -2 of a 90 x 20 tensor; stored back at (8, 13) of another
__global__ void tma_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, uint16_t* image) {
  __shared__ __align__(1024) uint16_t box[64 * 8];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) init(&bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(&bar, 1024);
    load_box(box, &from, 40, -2, &bar);
  }
  wait(&bar, 0);
  for (int i = threadIdx.x; i < 512; i += blockDim.x) image[i] = box[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&to), "r"(8), "r"(13),
                 "r"(shared_address(box))
                 : "memory");
    bulk_done();
  }
}
// Each of 4 CTAs shows its box; rank 0 loads it for ranks 0, 2 and 3.
__global__ void __cluster_dims__(4, 1, 1) multicast_kernel(const __grid_constant__ CUtensorMap from, uint16_t* image) {
  __shared__ __align__(1024) uint16_t box[64 * 8];
  __shared__ uint64_t bar;
  const auto cluster = cooperative_groups::this_cluster();
  const unsigned rank = cluster.block_rank(), mask = 0b1101;
  for (int i = threadIdx.x; i < 512; i += blockDim.x) box[i] = 0;
  proxy_fence();
  if (threadIdx.x == 0) init(&bar, 1);
  cluster.sync();
  if (threadIdx.x == 0 && mask >> rank & 1) expect(&bar, 1024);
  if (threadIdx.x == 0 && rank == 0)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::
            "r"(shared_address(box)),
        "l"(&from), "r"(40), "r"(-2), "r"(shared_address(&bar)), "h"(static_cast<uint16_t>(mask))
        : "memory");
  if (mask >> rank & 1) wait(&bar, 0);
  for (int i = threadIdx.x; i < 512; i += blockDim.x) image[512 * rank + i] = box[i];
  cluster.sync();
}
// The map is changed to every second row from the third on, 50 columns and 7 rows of them, and the box is loaded through the new one.
__device__ __align__(128) CUtensorMap changed_map;
__global__ void replace_kernel(const __grid_constant__ CUtensorMap from, const uint16_t* data, uint16_t* image) {
  __shared__ __align__(1024) uint16_t box[64 * 8];
  __shared__ __align__(128) uint32_t map[32];
  __shared__ uint64_t bar;
  const int t = threadIdx.x;
  map[t] = reinterpret_cast<const uint32_t*>(&from)[t];
  if (t == 0) init(&bar, 1);
  __syncwarp();
  if (t == 0) {
    const uint32_t at = shared_address(map);
    asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" ::"r"(at), "l"(data + 3 * 96) : "memory");
    asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 0, %1;" ::"r"(at), "r"(50) : "memory");
    asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 1, %1;" ::"r"(at), "r"(7) : "memory");
    asm volatile("tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%0], 0, %1;" ::"r"(at), "l"(uint64_t{2 * 192}) : "memory");
  }
  __syncwarp();
  asm volatile(
      "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;" ::"l"(&changed_map),
      "r"(shared_address(map))
      : "memory");
  if (t == 0) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(&changed_map) : "memory");
    expect(&bar, 1024);
    load_box(box, &changed_map, 40, -2, &bar);
  }
  wait(&bar, 0);
  for (int i = t; i < 512; i += 32) image[i] = box[i];
}
// A 16 x 8 box of float32 is added at (8, 13) of a 20 x 18 tensor, twice.
__global__ void reduce_kernel(const __grid_constant__ CUtensorMap to, const float* in) {
  __shared__ __align__(128) float box[16 * 8];
  box[threadIdx.x] = in[threadIdx.x];
  proxy_fence();
  __syncthreads();
  if (threadIdx.x) return;
  for (int k = 0; k < 2; ++k)
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&to), "r"(8), "r"(13),
                 "r"(shared_address(box))
                 : "memory");
  bulk_done();
}

// ---- matrices
template <bool kTransposed>
__global__ void stmatrix(const uint32_t* in, uint16_t* out, int) {
  __shared__ __align__(16) uint16_t s[4 * 64];
  const int t = threadIdx.x;
  const uint32_t row = shared_address(s + 8 * t);  // lane 8 j + r: row r of matrix j
  if (kTransposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(in[t]), "r"(in[32 + t]),
                 "r"(in[64 + t]), "r"(in[96 + t])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(in[t]), "r"(in[32 + t]),
                 "r"(in[64 + t]), "r"(in[96 + t])
                 : "memory");
  __syncwarp();
  for (int i = t; i < 256; i += 32) out[i] = s[i];
}

// wgmma m64n8: A 64 x k and B 8 x k with rows of 32 bytes, K-major without swizzle: cores of 8 rows x 16 bytes, 128 bytes each.
template <class T>
__device__ uint64_t to_cores(T* shared, const T* in, int rows) {
  constexpr int chunk = 16 / sizeof(T), k = 2 * chunk;
  for (int i = threadIdx.x; i < rows * k; i += 128)
    shared[i / k / 8 * (16 * chunk) + i % k / chunk * (8 * chunk) + i / k % 8 * chunk + i % chunk] = in[i];
  const uint64_t leading = 128 >> 4, stride = 256 >> 4;
  return shared_address(shared) >> 4 | leading << 16 | stride << 32;
}
#define GPUSIM_WGMMA(shape, scales, ...)                                                                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned." shape " {%0, %1, %2, %3}, " scales ";\n}" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                  \
               : __VA_ARGS__)
// The sum begins at 0.5. kRegisters: A comes from registers and counts negative.
template <class T, bool kRegisters>
__global__ void wgmma(const T* in, float* out, int) {
  constexpr int k = 32 / sizeof(T), half = k / 2;
  __shared__ __align__(1024) T A[64 * k], B[8 * k];
  const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4;
  const uint64_t a = to_cores(A, in, 64), b = to_cores(B, in + 64 * k, 8);
  uint32_t r[4];
  for (int j = 0; j < 4; ++j)  // of A: rows 8 apart, then the second half of k; 4 bytes of a row per lane
    memcpy(&r[j], in + (row + 8 * (j & 1)) * k + (j >> 1) * half + t % 4 * (half / 4), 4);
  proxy_fence();
  __syncthreads();
  float c[4] = {0.5f, 0.5f, 0.5f, 0.5f};
  asm volatile("wgmma.fence.sync.aligned;");
  if (kRegisters && sizeof(T) == 2)
    GPUSIM_WGMMA("m64n8k16.f32.bf16.bf16", "{%4, %5, %6, %7}, %8, p, -1, 1, 0", "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(b));
  else if (kRegisters)
    GPUSIM_WGMMA("m64n8k8.f32.tf32.tf32", "{%4, %5, %6, %7}, %8, p, -1, 1", "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(b));
  else if (sizeof(T) == 2)
    GPUSIM_WGMMA("m64n8k16.f32.bf16.bf16", "%4, %5, p, 1, 1, 0, 0", "l"(a), "l"(b));
  else
    GPUSIM_WGMMA("m64n8k8.f32.tf32.tf32", "%4, %5, p, 1, 1", "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])::"memory");
  for (int i = 0; i < 4; ++i) out[(row + 8 * (i / 2)) * 8 + t % 4 * 2 + i % 2] = c[i];
}

// ---- clusters: every CTA adds its rank into the shared memory of the next, then reports what it received
__global__ void __cluster_dims__(4, 1, 1) cluster(const int*, int* out, int) {
  __shared__ int received;
  auto group = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) received = 100;
  group.sync();
  const int rank = static_cast<int>(group.block_rank());
  if (threadIdx.x == 0) atomicAdd(group.map_shared_rank(&received, (rank + 1) % 4), rank);
  group.sync();
  if (threadIdx.x == 0) out[blockIdx.x] = received;
}
// ---- registers: 384 threads start with 168 each; one warpgroup gives some back, two take more. 40 + 2 * 232 = 3 * 168
__global__ void __launch_bounds__(384, 1) registers(const int*, int* out, int) {
  if (threadIdx.x < 128)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  else
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  out[threadIdx.x] = 1;
}

CUtensorMap encode(const void* data, CUtensorMapDataType type, int bytes, uint64_t columns, uint64_t rows, uint32_t width) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
  alignas(64) CUtensorMap map;
  const cuuint64_t dims[2] = {columns, rows}, strides[1] = {(columns * bytes + 15) / 16 * 16};
  const cuuint32_t box[2] = {width, 8}, steps[2] = {1, 1};
  reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, type, 2, const_cast<void*>(data), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      width * bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return map;
}
CUtensorMap bf16_map(const void* data, uint64_t columns, uint64_t rows) {
  return encode(data, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, columns, rows, 64);
}

template <class In, class Out>
void launch(void (*kernel)(const In*, Out*, int), int blocks, int threads, const void* in, void* out, int n) {
  kernel<<<blocks, threads>>>(static_cast<const In*>(in), static_cast<Out*>(out), n);
}

}  // namespace

// The image of a box comes before the tensor that `tma` stores to.
extern "C" __attribute__((visibility("default"))) int run(const char* name, const void* in, void* out, int n) {
  const auto is = [&](const char* other) { return !std::strcmp(name, other); };
  auto* image = static_cast<uint16_t*>(out);
  if (is("test_wait")) launch(test_wait, 1, 1, in, out, n);
  if (is("copy_arrivals")) launch(copy_arrivals, 1, 64, in, out, n);
  if (is("bulk")) launch(bulk, 1, 128, in, out, n);
  if (is("tma")) tma_kernel<<<1, 64>>>(bf16_map(in, 90, 20), bf16_map(image + 512, 40, 20), image);
  if (is("multicast")) multicast_kernel<<<4, 64>>>(bf16_map(in, 90, 20), image);
  if (is("replace")) replace_kernel<<<1, 32>>>(bf16_map(in, 90, 20), static_cast<const uint16_t*>(in), image);
  if (is("reduce")) reduce_kernel<<<1, 128>>>(encode(out, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, 20, 18, 16), static_cast<const float*>(in));
  if (is("stmatrix")) launch(stmatrix<false>, 1, 32, in, out, n);
  if (is("stmatrix_trans")) launch(stmatrix<true>, 1, 32, in, out, n);
  if (is("wgmma")) launch(wgmma<__nv_bfloat16, false>, 1, 128, in, out, n);
  if (is("wgmma_registers")) launch(wgmma<__nv_bfloat16, true>, 1, 128, in, out, n);
  if (is("wgmma_tf32")) launch(wgmma<float, false>, 1, 128, in, out, n);
  if (is("wgmma_tf32_registers")) launch(wgmma<float, true>, 1, 128, in, out, n);
  if (is("cluster")) launch(cluster, 8, 32, in, out, n);
  if (is("registers")) launch(registers, 1, 384, in, out, n);
  return cudaGetLastError();
}
