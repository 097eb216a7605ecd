// One small kernel per family of instructions, and one per mistake the simulator must report. test_gpusim.py computes what each
// should give by other means. run(name, in, out, n) launches one; the answer is the CUDA error. What needs sm_90a: instructions_sm90.cu.
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
// redux and match among two groups of lanes: those that 3 divides, and the others
__global__ void groups(const int* in, int* out, int) {
  const int t = threadIdx.x, v = in[t];
  const unsigned u = static_cast<unsigned>(v), thirds = 0x49249249u;
  int* o = out + 10 * t;
  const auto reduce = [&](unsigned mask) {
    o[0] = __reduce_add_sync(mask, v);
    o[1] = __reduce_min_sync(mask, v);
    o[2] = __reduce_max_sync(mask, v);
    o[3] = static_cast<int>(__reduce_min_sync(mask, u));
    o[4] = static_cast<int>(__reduce_max_sync(mask, u));
    o[5] = static_cast<int>(__reduce_and_sync(mask, u | 0x100));
    o[6] = static_cast<int>(__reduce_or_sync(mask, u));
    o[7] = static_cast<int>(__reduce_xor_sync(mask, u));
    int all;
    o[8] = static_cast<int>(__match_all_sync(mask, t % 3 ? v : 7, &all));  // all values of one group are 7
    o[9] = 2 * all + static_cast<int>(__match_any_sync(mask, static_cast<unsigned long long>(v & 1) << 40) >> t & 1);
  };
  if (t % 3)
    reduce(~thirds);
  else
    reduce(thirds);
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
// The last block sums what all have written. Without the fence it may read what was there before.
template <bool kFence>
__global__ void ticket(const int* in, int* out, int n) {
  if (threadIdx.x) return;
  out[2 + blockIdx.x] = in[blockIdx.x] * 2;
  if (kFence) __threadfence();
  if (atomicAdd(out, 1) != static_cast<int>(gridDim.x) - 1) return;
  __threadfence();
  for (int b = 0; b < n; ++b) out[1] += out[2 + b];
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
__global__ void movmatrix(const uint32_t* in, uint32_t* out, int) {
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out[threadIdx.x]) : "r"(in[threadIdx.x]));
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

// ---- atomics: one number each of n threads
__global__ void atomics(const int* in, int* out, int) {
  const int v = in[threadIdx.x];
  __shared__ unsigned least;
  if (threadIdx.x == 0) least = 0xffffffffu;
  __syncthreads();
  atomicMin(&least, static_cast<unsigned>(v));
  __syncthreads();
  if (threadIdx.x == 0) out[0] = static_cast<int>(least);
  atomicAdd(out + 1, v);
  atomicMin(out + 2, v);
  atomicMax(out + 3, v);
  atomicAnd(out + 4, v);
  atomicOr(out + 5, v);
  atomicXor(out + 6, v);
  atomicAdd(reinterpret_cast<float*>(out + 7), static_cast<float>(threadIdx.x));
  atomicAdd(reinterpret_cast<unsigned long long*>(out + 8), 0x100000001ull);
}

// ---- counters: 32 threads load 128 bytes twice and store 64; one store conflicts 4 ways, one load in half of the banks; one barrier
__global__ void counted(const int* in, short* out, int) {
  __shared__ int s[128];
  const volatile int* again = in;
  const int t = threadIdx.x, v = again[t] + again[t];
  s[4 * t] = v;
  __syncthreads();
  out[t] = static_cast<short>(s[t / 2 * 4]);
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
__global__ void two_writers(const int*, int* out, int) { out[threadIdx.x + 16 * blockIdx.x] = 1; }
__global__ void reader_and_writer(const int*, int* out, int) {
  if (blockIdx.x)
    out[threadIdx.x + 32] = 1;
  else
    out[threadIdx.x] = out[63 - threadIdx.x];
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
  GPUSIM_RUN(groups, 1, 32)
  GPUSIM_RUN(divergence, 1, 64)
  GPUSIM_RUN(lock, 3, 64)
  GPUSIM_RUN(ticket<true>, n, 64)
  GPUSIM_RUN(mma, 1, 32)
  GPUSIM_RUN(transposed, 1, 32)
  GPUSIM_RUN(movmatrix, 1, 32)
  GPUSIM_RUN(tf32, 1, 32)
  GPUSIM_RUN(copies, 1, 32)
  GPUSIM_RUN(atomics, 1, 64)
  GPUSIM_RUN(counted, 1, 32)
  GPUSIM_RUN(out_of_bounds, 1, 32)
  GPUSIM_RUN(misaligned, 1, 32)
  GPUSIM_RUN(unwritten_shared, 1, 32)
  GPUSIM_RUN(missing_barrier, 1, 64)
  GPUSIM_RUN(missing_warp_barrier, 1, 32)
  GPUSIM_RUN(two_writers, 2, 32)
  GPUSIM_RUN(reader_and_writer, 2, 32)
  GPUSIM_RUN(ticket<false>, n / 16, 32)
  GPUSIM_RUN(half_barrier, 1, 64)
  GPUSIM_RUN(bounded, 1, 64)
  GPUSIM_RUN(missing_copy_wait, 1, 32)
  GPUSIM_RUN(wrong_mask, 1, 32)
  GPUSIM_RUN(unknown_opcode, 1, 32)
#undef GPUSIM_RUN
  return -1;
}
