// grouped_mm_wgrad:  out[e] = a[rows of e]^T @ b[rows of e]        [M, N] per expert
// grouped_bias_grad: out[e] = sum over the rows of e of w[r] * g[r, :]
// A task owns one block of one expert's output: it adds up the rows in their order and writes every element once, so there
// are no atomics and the bits do not depend on the number of threads. An expert without rows is cleared, never computed.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "gemm_tile.h"
#include "kernels.h"

namespace moe::cpu::MOE_ISA {
namespace {

// A block of C, the packed rows of A and the packed block of B share a second-level cache.
constexpr int64_t kWgradBlockM = 96;
constexpr int64_t kWgradBlockN = 2 * kBlockN;

// Gradients that no cache can hold are written past the caches: nothing is read before it is overwritten.
constexpr int64_t kStreamingBytes = int64_t{64} << 20;

struct ThreadMemory {
  int64_t a, b, c;
  explicit ThreadMemory(DType dtype) {
    const int64_t bytes = dtype == DType::kFloat64 ? 8 : 4;
    a = kBlockK * kWgradBlockM * bytes;
    b = round_up_64((dtype == DType::kFloat64 ? kPackedBlockSize<double> : kPackedBlockSize<float>)*bytes);
    c = kWgradBlockM * kWgradBlockN * bytes;
  }
  int64_t total() const { return a + b + c; }
};

int64_t workspace_wgrad(const GroupedMmWgradParams& p, int num_threads) { return ThreadMemory(p.dtype).total() * num_threads; }

void copy_streaming(void* to, const void* from, int64_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
#if defined(__SSE2__)
  const int64_t head = min_of(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63));
  std::memcpy(target, source, head);
  target += head, source += head, bytes -= head;
  for (; bytes >= 64; target += 64, source += 64, bytes -= 64) {
    for (int i = 0; i < 64; i += 16) _mm_stream_si128(static_cast<__m128i*>(static_cast<void*>(target + i)), load_raw<__m128i>(source + i));
  }
#endif
  std::memcpy(target, source, bytes);
}

template <class T>
struct WgradBlock {
  using A = acc_t<T>;
  const GroupedMmWgradParams& p;
  int64_t expert, m0, n0, rows, columns;  // rows x columns of out[expert]
  A *a, *b, *c;

  // Rows [r0, r0 + depth) of a, columns [m0, m0 + rows), as tiles [k][rows of the tile].
  void pack_a(const TileRows& tiles, int64_t r0, int64_t depth) const {
    for (int64_t k = 0; k < depth; ++k) {
      const T* source = row_of<T>(p.a, r0 + k) + m0;
      for (int64_t t = 0; t < tiles.tiles; ++t) {
        const int64_t begin = tiles.begin(t), height = tiles.begin(t + 1) - begin;
        for (int64_t i = 0; i < height; ++i) a[begin * depth + k * height + i] = to_acc(source[begin + i]);
      }
    }
  }

  void run(bool streaming) const {
    const TileRows tiles(rows);
    const int64_t first = p.expert_offsets[expert], end = p.expert_offsets[expert + 1];
    for (int64_t r = first; r < end; r += kBlockK) {
      const int64_t depth = min_of(kBlockK, end - r);
      pack_a(tiles, r, depth);
      for (int64_t n = 0; n < columns; n += kBlockN) {
        const int64_t width = min_of(kBlockN, columns - n);
        for (int64_t k = 0; k < depth; ++k) pack_row(row_of<T>(p.b, r + k) + n0 + n, width, b + k * kTileN<A>);
        multiply_packed(tiles, PackedA<A>{a, depth, 0}, depth, divide_up(width, kTileN<A>), b, Sums<A>{c + n, kWgradBlockN, r > first});
      }
    }
    T* out = static_cast<T*>(at(p.out, expert, sizeof(T))) + m0 * p.out.stride + n0;
    for (int64_t i = 0; i < rows; ++i, out += p.out.stride) {
      const A* sums = c + i * kWgradBlockN;
      if (streaming) {
        T rounded[kWgradBlockN];
        for (int64_t j = 0; j < columns; ++j) rounded[j] = from_acc<T>(sums[j]);
        copy_streaming(out, rounded, columns * static_cast<int64_t>(sizeof(T)));
      } else {
        for (int64_t j = 0; j < columns; ++j) out[j] = from_acc<T>(sums[j]);
      }
    }
#if defined(__SSE2__)
    if (streaming) _mm_sfence();
#endif
  }
};

template <class T>
Status run_wgrad(const GroupedMmWgradParams& p, const Launch& launch) {
  using A = acc_t<T>;
  const ThreadMemory memory(p.dtype);
  const int64_t m_blocks = divide_up(p.M, kWgradBlockM), n_blocks = divide_up(p.N, kWgradBlockN);
  const bool streaming = p.E * p.M * p.N * static_cast<int64_t>(sizeof(T)) >= kStreamingBytes;
  for_each_task(launch, p.E * m_blocks * n_blocks, [&](int64_t task, int thread) {
    const int64_t e = task / (m_blocks * n_blocks), m0 = task / n_blocks % m_blocks * kWgradBlockM, n0 = task % n_blocks * kWgradBlockN;
    const int64_t rows = min_of(kWgradBlockM, p.M - m0);
    if (p.expert_offsets[e] == p.expert_offsets[e + 1]) {
      T* out = static_cast<T*>(at(p.out, e, sizeof(T))) + m0 * p.out.stride;
      for (int64_t i = 0; n0 == 0 && i < rows; ++i) std::memset(out + i * p.out.stride, 0, p.N * sizeof(T));
      return;
    }
    char* mine = static_cast<char*>(launch.workspace) + thread * memory.total();
    const WgradBlock<T> block{p,
                              e,
                              m0,
                              n0,
                              rows,
                              min_of(kWgradBlockN, p.N - n0),
                              reinterpret_cast<A*>(mine),
                              reinterpret_cast<A*>(mine + memory.a),
                              reinterpret_cast<A*>(mine + memory.a + memory.b)};
    block.run(streaming);
  });
  return Status::kOk;
}

template <class T>
Status run_bias(const GroupedBiasGradParams& p, const Launch& launch) {
  using Acc = acc_t<T>;
  constexpr int64_t kBlock = 256;
  const int64_t blocks = (p.N + kBlock - 1) / kBlock;
  const Acc* weights = static_cast<const Acc*>(p.slot_weights);
  for_each_task(launch, p.E * blocks, [&](int64_t task, int) {
    const int64_t e = task / blocks, n0 = task % blocks * kBlock, count = p.N - n0 < kBlock ? p.N - n0 : kBlock;
    T* out = static_cast<T*>(at(p.out, e, sizeof(T))) + n0;
    double acc[kBlock] = {};  // one long chain of additions: in float32 its error would exceed that of a blocked sum
    for (int64_t r = p.expert_offsets[e]; r < p.expert_offsets[e + 1]; ++r) {
      const Acc w = weights ? weights[p.row_to_slot[r]] : Acc(1);
      const T* g = row_of<T>(p.g, r) + n0;
      for (int64_t i = 0; i < count; ++i) acc[i] += w * to_acc(g[i]);
    }
    for (int64_t i = 0; i < count; ++i) out[i] = from_acc<T>(static_cast<Acc>(acc[i]));
  });
  return Status::kOk;
}

Status launch_wgrad(const GroupedMmWgradParams& p, const Launch& launch) {
  return visit_dtype(p.dtype, [&](auto type) { return run_wgrad<typename decltype(type)::type>(p, launch); });
}

Status launch_bias(const GroupedBiasGradParams& p, const Launch& launch) {
  return visit_dtype(p.dtype, [&](auto type) { return run_bias<typename decltype(type)::type>(p, launch); });
}

}  // namespace

extern const Kernel<GroupedMmWgradParams> grouped_mm_wgrad{nullptr, workspace_wgrad, launch_wgrad};
extern const Kernel<GroupedBiasGradParams> grouped_bias_grad{nullptr, nullptr, launch_bias};

}  // namespace moe::cpu::MOE_ISA
