// One small kernel per family of instructions, and one per mistake the simulator must report. tests/test_gpusim.py computes what each
// should give by other means. run(name, in, out, n) launches one; the answer is the CUDA error.
#include <cooperative_groups.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

// ---- arithmetic: one thread per element; in: 2n words, out: several words per element
__global__ void integers(const uint32_t* in, uint32_t* out, int n) {
  const int t = threadIdx.x;
  const uint32_t a = in[t], b = in[n + t];
  uint32_t* o = out + 16 * t;
  const int sa = static_cast<int>(a), sb = static_cast<int>(b);
  o[0] = a + b;
  o[1] = a - b;
  o[2] = a * b;
  o[3] = __umulhi(a, b);
  o[4] = static_cast<uint32_t>(__mulhi(sa, sb));
  o[5] = b ? a / b : 0;
  o[6] = b ? a % b : 0;
  o[7] = sb ? static_cast<uint32_t>(sa / sb) : 0;
  o[8] = static_cast<uint32_t>(sa >> (b & 31));
  o[9] = __funnelshift_l(a, b, 7);
  o[10] = __byte_perm(a, b, 0x6240);
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(o[11]) : "r"(a), "r"(b), "r"(a ^ 0x55555555u));
  asm("bfe.s32 %0, %1, 5, 9;" : "=r"(o[12]) : "r"(a));
  asm("bfi.b32 %0, %1, %2, 3, 11;" : "=r"(o[13]) : "r"(a), "r"(b));
  o[14] = __popc(a) | __clz(a) << 8 | __ffs(a) << 16;
  o[15] = __brev(a);
}
__global__ void carries(const uint64_t* in, uint64_t* out, int n) {
  const unsigned __int128 a = (static_cast<unsigned __int128>(in[threadIdx.x]) << 64) | in[n + threadIdx.x];
  const unsigned __int128 product = a * in[threadIdx.x] + a, difference = a - in[threadIdx.x];
  out[4 * threadIdx.x] = static_cast<uint64_t>(product);
  out[4 * threadIdx.x + 1] = static_cast<uint64_t>(product >> 64);
  out[4 * threadIdx.x + 2] = static_cast<uint64_t>(difference);
  out[4 * threadIdx.x + 3] = static_cast<uint64_t>(difference >> 64);
}
__global__ void floats(const float* in, float* out, int n) {
  const float a = in[threadIdx.x], b = in[n + threadIdx.x];
  float* o = out + 12 * threadIdx.x;
  o[0] = __fmul_rn(a, b);
  o[1] = __fadd_rz(a, b);
  o[2] = __fadd_ru(a, b);
  o[3] = __fadd_rd(a, b);
  o[4] = fmaf(a, b, a);
  o[5] = __fdiv_rn(a, b);
  o[6] = __fsqrt_rn(fabsf(a));
  o[7] = fminf(a, b);
  o[8] = static_cast<float>(__float2int_rz(a));
  o[9] = rintf(a);
  o[10] = copysignf(a, b);
  o[11] = a < b ? a : -b;
}
__global__ void conversions(const float* in, uint16_t* out, int n) {
  const float a = in[threadIdx.x];
  uint16_t* o = out + 6 * threadIdx.x;
  o[0] = __bfloat16_as_ushort(__float2bfloat16_rn(a));
  o[1] = __half_as_ushort(__float2half_rn(a));
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, in[(threadIdx.x + 1) % n]);
  memcpy(o + 2, &pair, 4);
  o[4] = __bfloat16_as_ushort(__hmul(__float2bfloat16_rn(a), __float2bfloat16_rn(3.0f)));
  o[5] = __half_as_ushort(__hfma(__float2half_rn(a), __float2half_rn(a), __float2half_rn(1.0f)));
}
__global__ void doubles(const double* in, double* out, int) {
  const double a = in[threadIdx.x];
  out[3 * threadIdx.x] = exp(a);
  out[3 * threadIdx.x + 1] = sin(a * 1000);
  out[3 * threadIdx.x + 2] = erf(a);
}

// ---- warps
__global__ void warps(const int* in, int* out, int) {
  const int t = threadIdx.x, v = in[t];
  int* o = out + 8 * t;
  o[0] = __shfl_up_sync(~0u, v, 3);
  o[1] = __shfl_down_sync(~0u, v, 5, 16);
  o[2] = __shfl_xor_sync(~0u, v, 9);
  o[3] = __shfl_sync(~0u, v, v & 31);
  o[4] = static_cast<int>(__ballot_sync(~0u, v & 1));
  o[5] = static_cast<int>(__match_any_sync(~0u, v & 7));
  o[6] = __reduce_add_sync(~0u, v);
  o[7] = __any_sync(~0u, v == 77) + 2 * __all_sync(~0u, v < 100);
}
__device__ __noinline__ int collatz(int n) {
  int steps = 0;
  while (n != 1) {
    n = n % 2 ? 3 * n + 1 : n / 2;
    ++steps;
  }
  return steps;
}
__global__ void divergence(const int*, int* out, int) {
  int v = collatz(threadIdx.x + 1);
  if (threadIdx.x % 3 == 0)
    v += 1000;
  else if (threadIdx.x % 3 == 1)
    v -= __popc(__activemask());
  out[threadIdx.x] = v;
}
// A spin lock taken by every lane of a warp: lanes must not starve one another.
__global__ void lock(const int*, int* out, int) {
  bool mine = false;
  while (!mine) {
    if (atomicCAS(out, 0, 1) == 0) {
      out[1] = out[1] + 1;
      __threadfence();
      atomicExch(out, 0);
      mine = true;
    }
  }
}
// The last block sums what all have written.
__global__ void ticket(const int* in, int* out, int n) {
  __shared__ bool last;
  out[2 + blockIdx.x] = in[blockIdx.x] * 2;
  __threadfence();
  if (threadIdx.x == 0) last = atomicAdd(out, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (last && threadIdx.x == 0)
    for (int b = 0; b < n; ++b) atomicAdd(out + 1, out[2 + b]);
}

// ---- tensor cores of sm_80: out = A (16 x 16, row) times B (16 x 8, as 8 rows of k), through ldmatrix
__global__ void mma(const __nv_bfloat16* in, float* out, int) {
  __shared__ __align__(16) __nv_bfloat16 A[16 * 16], B[8 * 16];
  const int t = threadIdx.x;
  for (int i = t; i < 256; i += 32) A[i] = in[i];
  for (int i = t; i < 128; i += 32) B[i] = in[256 + i];
  __syncwarp();
  uint32_t a[4], b[2];
  const auto at = [](const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); };
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(at(A + (t % 16) * 16 + t / 16 * 8)));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(at(B + (t % 8) * 16 + t / 8 % 2 * 8)));
  float c[4] = {};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int i = 0; i < 4; ++i) out[(t / 4 + 8 * (i / 2)) * 8 + t % 4 * 2 + i % 2] = c[i];
}
__global__ void transposed(const uint16_t* in, uint16_t* out, int) {
  __shared__ __align__(16) uint16_t A[64];
  const int t = threadIdx.x;
  A[t] = in[t];
  A[t + 32] = in[t + 32];
  __syncwarp();
  uint32_t r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(A + t % 8 * 8))));
  memcpy(out + t / 4 * 8 + t % 4 * 2, &r, 4);
}
__global__ void tf32(const float* in, float* out, int) {  // A: 16 x 8, B: 8 rows of k
  const int t = threadIdx.x, g = t / 4, k = t % 4;
  uint32_t a[4], b[2];
  const int rows[4] = {g, g + 8, g, g + 8}, columns[4] = {k, k, k + 4, k + 4};
  for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(in[rows[i] * 8 + columns[i]]);
  for (int i = 0; i < 2; ++i) b[i] = __float_as_uint(in[128 + g * 8 + k + 4 * i]);
  float c[4] = {1, 1, 1, 1};
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + k * 2 + i % 2] = c[i];
}

// ---- cp.async: thread t copies 16 bytes, of which t % 17 are read and the rest is zero
__global__ void copies(const uint8_t* in, uint8_t* out, int) {
  __shared__ __align__(16) uint8_t buffer[32 * 16];
  const int t = threadIdx.x, bytes = t % 5 * 4;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(buffer + 16 * t))),
               "l"(in + 16 * t), "r"(bytes));
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.wait_group 0;");
  for (int i = 0; i < 16; ++i) out[16 * t + i] = buffer[16 * t + i];
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ void init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count));
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
#define GPUSIM_HOPPER(...) __VA_ARGS__
#define GPUSIM_CLUSTER __cluster_dims__(4, 1, 1)
#else
#define GPUSIM_HOPPER(...)
#define GPUSIM_CLUSTER
#endif

// ---- TMA: a 64 x 8 box (bf16, 128-byte swizzle) at column 40, row -2 of a 90 x 20 tensor; stored back at (8, 13) of another
__global__ void tma(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, uint16_t* image) {
  GPUSIM_HOPPER(
      __shared__ __align__(1024) uint16_t box[64 * 8]; __shared__ uint64_t bar; if (threadIdx.x == 0) {
        init(&bar, 1);
        asm volatile("fence.mbarrier_init.release.cluster;");
      } __syncthreads();
      if (threadIdx.x == 0) {
        expect(&bar, 1024);
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                         shared_address(box)),
                     "l"(&from), "r"(40), "r"(-2), "r"(shared_address(&bar))
                     : "memory");
      } wait(&bar, 0);
      for (int i = threadIdx.x; i < 512; i += blockDim.x) image[i] = box[i]; __syncthreads(); if (threadIdx.x == 0) {
        asm volatile("fence.proxy.async.shared::cta;");
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&to), "r"(8), "r"(13),
                     "r"(shared_address(box))
                     : "memory");
        asm volatile("cp.async.bulk.commit_group;");
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
      })
}
// ---- wgmma m64n8k16: A 64 x 16 and B 8 x 16, K-major without swizzle (8 x 8 cores of 128 bytes)
__global__ void wgmma(const __nv_bfloat16* in, float* out, int) {
  GPUSIM_HOPPER(__shared__ __align__(1024) __nv_bfloat16 A[64 * 16]; __shared__ __align__(1024) __nv_bfloat16 B[8 * 16];
                const int t = threadIdx.x;
                for (int i = t; i < 64 * 16; i += 128) A[i / 16 / 8 * 128 + i % 16 / 8 * 64 + i / 16 % 8 * 8 + i % 8] = in[i];
                B[t % 16 / 8 * 64 + t / 16 % 8 * 8 + t % 8] = in[1024 + t]; asm volatile("fence.proxy.async.shared::cta;"); __syncthreads();
                const uint64_t leading = 128 >> 4; const uint64_t stride = 256 >> 4;
                const uint64_t a = (shared_address(A) >> 4) | leading << 16 | stride << 32;
                const uint64_t b = (shared_address(B) >> 4) | leading << 16 | stride << 32; float c[4] = {0.5f, 0.5f, 0.5f, 0.5f};
                asm volatile("wgmma.fence.sync.aligned;");
                asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, "
                             "%3}, %4, %5, p, 1, 1, 0, 0;\n}" : "+f"(c[0]),
                             "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "l"(a), "l"(b));
                asm volatile("wgmma.commit_group.sync.aligned;");
                asm volatile("wgmma.wait_group.sync.aligned 0;" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])::"memory");
                for (int i = 0; i < 4; ++i) out[(t / 32 * 16 + t % 32 / 4 + 8 * (i / 2)) * 8 + t % 4 * 2 + i % 2] = c[i];)
}
// ---- clusters: every CTA adds its rank into the shared memory of the next, then reports what it received
__global__ void GPUSIM_CLUSTER cluster(const int*, int* out, int) {
  GPUSIM_HOPPER(__shared__ int received; auto group = cooperative_groups::this_cluster(); if (threadIdx.x == 0) received = 100;
                group.sync(); if (threadIdx.x == 0)
                    atomicAdd(group.map_shared_rank(&received, (group.block_rank() + 1) % 4), static_cast<int>(group.block_rank()));
                group.sync(); if (threadIdx.x == 0) out[blockIdx.x] = received;)
}

// ---- mistakes
__global__ void out_of_bounds(const int* in, int* out, int n) { out[threadIdx.x] = in[threadIdx.x + n - 31]; }
__global__ void misaligned(const char* in, int* out, int) { out[threadIdx.x] = *reinterpret_cast<const int*>(in + threadIdx.x); }
__global__ void unwritten_shared(const int*, int* out, int) {
  __shared__ int s[64];
  s[threadIdx.x] = 1;
  __syncwarp();
  out[threadIdx.x] = s[threadIdx.x + 1];
}
__global__ void missing_barrier(const int* in, int* out, int) {
  __shared__ int s[64];
  s[threadIdx.x] = 0;
  __syncthreads();
  s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void missing_warp_barrier(const int* in, int* out, int) {
  __shared__ int s[32];
  s[threadIdx.x] = 0;
  __syncwarp();
  s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = s[31 - threadIdx.x];
}
__global__ void half_barrier(const int*, int* out, int) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");
  out[threadIdx.x] = 1;
}
__global__ void __launch_bounds__(32) bounded(const int*, int* out, int) { out[threadIdx.x] = 1; }
__global__ void missing_copy_wait(const int* in, int* out, int) {
  __shared__ __align__(16) int s[128];
  const int t = threadIdx.x;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(s + 4 * t))),
               "l"(in + 4 * t));
  asm volatile("cp.async.commit_group;");
  out[t] = s[4 * t];
}
__global__ void wrong_mask(const int* in, int* out, int) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffff0000u, in[threadIdx.x], 0);
}
__global__ void unknown_opcode(const int*, int* out, int) {
  unsigned r;
  asm volatile("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(1), "r"(2), "r"(3));
  out[threadIdx.x] = static_cast<int>(r);
}

template <class In, class Out>
int launch(void (*kernel)(const In*, Out*, int), int blocks, int threads, const void* in, void* out, int n) {
  kernel<<<blocks, threads>>>(static_cast<const In*>(in), static_cast<Out*>(out), n);
  return cudaGetLastError();
}

CUtensorMap encode(const void* data, uint64_t columns, uint64_t rows) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
  alignas(64) CUtensorMap map;
  const cuuint64_t dims[2] = {columns, rows}, strides[1] = {(columns * 2 + 15) / 16 * 16};
  const cuuint32_t box[2] = {64, 8}, steps[2] = {1, 1};
  reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return map;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int run(const char* name, const void* in, void* out, int n) {
#define GPUSIM_RUN(kernel, blocks, threads) \
  if (!std::strcmp(name, #kernel)) return launch(kernel, blocks, threads, in, out, n);
  GPUSIM_RUN(integers, 1, n)
  GPUSIM_RUN(carries, 1, n)
  GPUSIM_RUN(floats, 1, n)
  GPUSIM_RUN(conversions, 1, n)
  GPUSIM_RUN(doubles, 1, n)
  GPUSIM_RUN(warps, 1, 32)
  GPUSIM_RUN(divergence, 1, 64)
  GPUSIM_RUN(lock, 3, 64)
  GPUSIM_RUN(ticket, n, 64)
  GPUSIM_RUN(mma, 1, 32)
  GPUSIM_RUN(transposed, 1, 32)
  GPUSIM_RUN(tf32, 1, 32)
  GPUSIM_RUN(copies, 1, 32)
  GPUSIM_RUN(wgmma, 1, 128)
  GPUSIM_RUN(cluster, 8, 32)
  GPUSIM_RUN(out_of_bounds, 1, 32)
  GPUSIM_RUN(misaligned, 1, 32)
  GPUSIM_RUN(unwritten_shared, 1, 32)
  GPUSIM_RUN(missing_barrier, 1, 64)
  GPUSIM_RUN(missing_warp_barrier, 1, 32)
  GPUSIM_RUN(half_barrier, 1, 64)
  GPUSIM_RUN(bounded, 1, 64)
  GPUSIM_RUN(missing_copy_wait, 1, 32)
  GPUSIM_RUN(wrong_mask, 1, 32)
  GPUSIM_RUN(unknown_opcode, 1, 32)
#undef GPUSIM_RUN
  return -1;
}
extern "C" __attribute__((visibility("default"))) int run_tma(const void* from, void* to, void* image) {
  const CUtensorMap a = encode(from, 90, 20), b = encode(to, 40, 20);
  tma<<<1, 64>>>(a, b, static_cast<uint16_t*>(image));
  return cudaGetLastError();
}
