// A tile of a matrix product on mma.sync, for every device from sm_80: operands come in by cp.async through a ring of stages,
// swizzled as mma_tile.h says, and go to the tensor cores through ldmatrix. Sums are float32.
#pragma once
#include "element.cuh"
#include "mma_tile.h"

namespace moe::cuda {

__device__ __forceinline__ unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, those past `bytes` as zero; nothing is read when `bytes` is 0.
__device__ __forceinline__ void copy_async(unsigned shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <Major major>
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned shared) {
  if constexpr (major == Major::kK) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
  }
}

__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One chunk into shared memory, elements past `count` as zero. kAligned: 16-byte copies; else element by element.
template <bool kAligned, class T>
__device__ __forceinline__ void copy_chunk(char* shared, const T* global, int count) {
  if constexpr (kAligned) {
    copy_async(shared_address(shared), global, count * 2);
  } else {
    alignas(16) T chunk[kChunkElements];
#pragma unroll
    for (int i = 0; i < kChunkElements; ++i) chunk[i] = i < count ? global[i] : T(0.0f);
    *reinterpret_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(chunk);
  }
}

// Brings in stages of a K-major operand: `extent` rows, of which the first `rows` exist; row r begins at row_at(r).
template <class T, int kExtent, bool kAligned>
struct KMajorLoader {
  static constexpr Major kMajor = Major::kK;
  static constexpr int kCopies = copies_per_thread<kMajor>(kExtent);
  const T* row[kCopies];  // of the chunks this thread copies; an absent row reads nothing
  bool present[kCopies];
  const T* any;  // a valid address

  template <class RowAt>
  __device__ KMajorLoader(const T* base, int rows, const RowAt& row_at) : any(base) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int r = copied_chunk<kMajor>(kExtent, threadIdx.x, i).row;
      present[i] = r < rows;
      row[i] = present[i] ? row_at(r) : base;
    }
  }

  __device__ void load(int64_t k0, int64_t k_end, char* stage) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const ChunkIndex c = copied_chunk<kMajor>(kExtent, threadIdx.x, i);
      const int64_t k = k0 + c.chunk * kChunkElements;
      const int count = present[i] ? valid_elements(k, k_end) : 0;
      copy_chunk<kAligned>(stage + chunk_position<kMajor>(kExtent, c.row, c.chunk) * 16, count ? row[i] + k : any, count);
    }
  }
};

// Brings in stages of an MN-major operand: k is the row of a matrix whose rows begin at row_at(k), of which this thread needs
// the columns from `column` on, up to `columns`.
template <class T, int kExtent, bool kAligned, class RowAt>
struct MnMajorLoader {
  static constexpr Major kMajor = Major::kMN;
  static constexpr int kCopies = copies_per_thread<kMajor>(kExtent);
  const T* any;
  RowAt row_at;
  int64_t column;
  int valid;

  __device__ MnMajorLoader(const T* base, int64_t first_column, int64_t columns, const RowAt& rows)
      : any(base),
        row_at(rows),
        column(first_column + copied_chunk<kMajor>(kExtent, threadIdx.x, 0).chunk * kChunkElements),
        valid(valid_elements(column, columns)) {}

  __device__ void load(int64_t k0, int64_t k_end, char* stage) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const ChunkIndex c = copied_chunk<kMajor>(kExtent, threadIdx.x, i);  // the same chunk of another row for every i
      const int count = k0 + c.row < k_end ? valid : 0;
      copy_chunk<kAligned>(stage + chunk_position<kMajor>(kExtent, c.row, c.chunk) * 16, count ? row_at(k0 + c.row) + column : any, count);
    }
  }
};

template <class Tile>
using Accumulators = float[Tile::kStepsM][Tile::kStepsN][4];

// Adds one stage's products.
template <class T, class Tile, Major major_a, Major major_b>
__device__ __forceinline__ void multiply_stage(const char* stage, Accumulators<Tile>& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned a_base = shared_address(stage), b_base = a_base + Tile::kABytes;
#pragma unroll
  for (int k = 0; k < kMmaDepth; k += 16) {
    unsigned a[Tile::kStepsM][4], b[Tile::kStepsN / 2][4];
#pragma unroll
    for (int i = 0; i < Tile::kStepsM; ++i) {
      const ChunkIndex c = ldmatrix_chunk<major_a, true>(lane, Tile::warp_m(warp) + 16 * i, k);
      load_matrices<major_a>(a[i], a_base + chunk_position<major_a>(Tile::kM, c.row, c.chunk) * 16);
    }
#pragma unroll
    for (int j = 0; j < Tile::kStepsN / 2; ++j) {
      const ChunkIndex c = ldmatrix_chunk<major_b, false>(lane, Tile::warp_n(warp) + 16 * j, k);
      load_matrices<major_b>(b[j], b_base + chunk_position<major_b>(Tile::kN, c.row, c.chunk) * 16);
    }
#pragma unroll
    for (int i = 0; i < Tile::kStepsM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kStepsN; ++j) mma(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], T());
    }
  }
}

// sums += A B^T over k in [0, depth). The loads of a stage overwrite the one that every warp left before the last barrier.
template <class T, class Tile, class LoaderA, class LoaderB>
__device__ __forceinline__ void multiply_tile(const LoaderA& a, const LoaderB& b, int64_t depth, char* shared, Accumulators<Tile>& sums) {
  const int64_t blocks = divide_up(depth, kMmaDepth);
  const auto load = [&](int64_t block) {
    if (block < blocks) {
      char* stage = shared + block % kMmaStages * Tile::kStageBytes;
      a.load(block * kMmaDepth, depth, stage);
      b.load(block * kMmaDepth, depth, stage + Tile::kABytes);
    }
    commit_copies();  // empty groups too: the wait below counts them
  };
  for (int64_t block = 0; block < kMmaStages - 1; ++block) load(block);
  for (int64_t block = 0; block < blocks; ++block) {
    wait_for_copies<kMmaStages - 2>();
    __syncthreads();
    load(block + kMmaStages - 1);
    multiply_stage<T, Tile, LoaderA::kMajor, LoaderB::kMajor>(shared + block % kMmaStages * Tile::kStageBytes, sums);
  }
}

// f(row, column, first, second) for every pair of neighbouring outputs of this thread, in the tile's coordinates.
template <class Tile, class F>
__device__ __forceinline__ void for_each_pair(const Accumulators<Tile>& sums, const F& f) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < Tile::kStepsM; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kStepsN; ++j) {
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        f(Tile::warp_m(warp) + 16 * i + accumulator_row(lane, half), Tile::warp_n(warp) + 8 * j + accumulator_column(lane, half),
          sums[i][j][half], sums[i][j][half + 1]);
      }
    }
  }
}

// Where the results of a tile go.
template <class T>
struct TileOutput {
  T* out;  // the tile's first element
  int64_t stride;
  int rows, columns;        // of the tile, as far as they exist
  bool wide;                // 16 bytes at a time: rows begin at multiples of 16 bytes, and so does the bias
  const T* bias = nullptr;  // of the tile's first column
  bool accumulate = false;
};

// f(row, column) for the results of a tile that exist, V neighbours at a time: neighbouring threads, neighbouring columns. A
// thread's columns are the same in all of its rows.
template <int V, class Tile, class T, class F>
__device__ __forceinline__ void for_each_result(const TileOutput<T>& o, const F& f) {
  constexpr int kThreadsPerRow = Tile::kN / V;
  const int column = threadIdx.x % kThreadsPerRow * V;
  if (column >= o.columns) return;
  for (int row = threadIdx.x / kThreadsPerRow; row < o.rows; row += kMmaThreads / kThreadsPerRow) f(row, column);
}

// V sums of a row, from where staged_position puts them.
template <int V, class Tile>
__device__ __forceinline__ void load_sums(float (&sums)[V], const float* staged, int row, int column) {
  if constexpr (V == 1) {
    sums[0] = staged[staged_position<Tile::kN>(row, column)];
  } else {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(sums[v]), "=f"(sums[v + 1]), "=f"(sums[v + 2]), "=f"(sums[v + 3])
                   : "r"(shared_address(staged + staged_position<Tile::kN>(row, column + v)))
                   : "memory");
    }
  }
}

// result = (sum + bias) + what was there, rounded once.
template <int V, class Tile, class T>
__device__ __forceinline__ void store_results(const float* staged, const TileOutput<T>& o) {
  for_each_result<V, Tile>(o, [&](int row, int column) {
    T* target = o.out + row * o.stride + column;
    float sums[V];
    load_sums<V, Tile>(sums, staged, row, column);
    Pack<T, V> bias, old, result;
    if (o.bias) bias = load<V>(o.bias + column);
    if (o.accumulate) old = load<V>(target);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (o.bias) sums[v] += to_acc(bias.at[v]);
      if (o.accumulate) sums[v] += to_acc(old.at[v]);
      result.at[v] = from_acc<T>(sums[v]);
    }
    store(target, result);
  });
}

// The sums of all warps leave through the shared memory of the stages, a row at a time.
template <class Tile, class T>
__device__ __forceinline__ void store_tile(const Accumulators<Tile>& sums, char* shared, const TileOutput<T>& output) {
  float* staged = reinterpret_cast<float*>(shared);
  __syncthreads();  // every warp has read the last stage
  for_each_pair<Tile>(sums, [staged](int row, int column, float first, float second) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared_address(staged + staged_position<Tile::kN>(row, column))), "f"(first),
                 "f"(second)
                 : "memory");
  });
  __syncthreads();
  output.wide ? store_results<8, Tile>(staged, output) : store_results<1, Tile>(staged, output);
}

template <int V, class Tile, class T>
__device__ __forceinline__ void clear_results(const TileOutput<T>& o) {
  for_each_result<V, Tile>(o, [&](int row, int column) { store(o.out + row * o.stride + column, Pack<T, V>{}); });
}
template <class Tile, class T>
__device__ __forceinline__ void clear_tile(const TileOutput<T>& output) {
  output.wide ? clear_results<8, Tile>(output) : clear_results<1, Tile>(output);
}

}  // namespace moe::cuda
