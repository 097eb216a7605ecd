// grouped_mm: out[r, :] = x[r, :] @ weight[e]^T + bias[e] for the rows r of each expert e; rounded once, after the bias (and
// after adding what out held, when asked to accumulate). The weights are read where they are, once per segment of at most
// kSegmentRows rows of one expert. By rows per segment:
//   dot     few rows, K-contiguous weights: registers accumulate along k, four weight rows at a time stream past all rows of x
//   direct  few rows, N-contiguous weights: a few weight rows at a time are added into accumulators of a whole block of outputs
//   packed  the rest: blocks of weights are widened (and transposed) into the second-level cache, then multiplied tile by tile
// Which one runs depends on the shapes and the routing alone, never on the number of threads.
#include "gemm_tile.h"
#include "kernels.h"

namespace moe::cpu::MOE_ISA {
namespace {

constexpr int64_t kSegmentRows = 96;

// Largest number of rows for which dot and direct beat packed: found by timing 1 to 32 rows on a processor with AVX2.
template <class T>
constexpr int64_t kDotRows = 8;
template <class T>
constexpr int64_t kDirectRows = sizeof(T) == 2 ? 10 : 16;
template <class T>
constexpr int64_t kDotDepth = 2048 / static_cast<int64_t>(sizeof(T));
constexpr int64_t kDirectDepth = 16;
constexpr int64_t kDirectBlockN = 2048;

struct Segment {
  int64_t expert, begin, rows;
};

// What one thread needs beside the parameters. Sizes in bytes, multiples of 64.
struct ThreadMemory {
  int64_t a = 0, b = 0, c = 0;
  int64_t total() const { return a + b + c; }
};

int64_t max_segments(const GroupedMmParams& p) { return min_of(p.E, p.S) + p.S / kSegmentRows; }

ThreadMemory thread_memory(const GroupedMmParams& p) {
  const int64_t bytes = p.dtype == DType::kFloat64 ? 8 : 4, rows = min_of(kSegmentRows, p.S);
  const int64_t panel_block = p.dtype == DType::kFloat64 ? kPackedBlockSize<double> : kPackedBlockSize<float>;
  ThreadMemory m;
  m.a = round_up_64(rows * p.K * bytes);
  m.b = round_up_64(panel_block * bytes);
  m.c = round_up_64(max_of(rows * kBlockN, min_of(rows, kDirectRows<float>) * kDirectBlockN) * bytes);
  return m;
}

int64_t workspace(const GroupedMmParams& p, int num_threads) {
  return round_up_64(max_segments(p) * static_cast<int64_t>(sizeof(Segment))) + thread_memory(p).total() * num_threads;
}

// The experts that have rows, cut into segments of nearly equal height.
int64_t make_segments(const GroupedMmParams& p, Segment* segments) {
  int64_t count = 0;
  for (int64_t e = 0; e < p.E; ++e) {
    const int64_t begin = p.expert_offsets[e], rows = p.expert_offsets[e + 1] - begin, parts = divide_up(rows, kSegmentRows);
    for (int64_t i = 0; i < parts; ++i) {
      segments[count++] = {e, begin + rows * i / parts, rows * (i + 1) / parts - rows * i / parts};
    }
  }
  return count;
}

// One segment and the output columns [n0, n1) of it.
template <class T>
struct Work {
  using A = acc_t<T>;
  const GroupedMmParams& p;
  Segment segment;
  int64_t n0, n1;
  A *a, *b, *c;

  const T* weight() const { return static_cast<const T*>(at(p.weight, segment.expert, sizeof(T))); }

  // Accumulators of rows [0, segment.rows) and columns [n, n + columns), row stride ldc -> out, with the bias.
  void write(int64_t n, int64_t columns, A* sums, int64_t ldc) const {
    const T* bias = p.bias ? static_cast<const T*>(at(p.bias, segment.expert, sizeof(T))) + n : nullptr;
    for (int64_t i = 0; i < segment.rows; ++i, sums += ldc) {
      T* out = static_cast<T*>(p.out) + (segment.begin + i) * p.out_stride + n;
      for (int64_t j = 0; bias && j < columns; ++j) sums[j] += to_acc(bias[j]);
      for (int64_t j = 0; p.accumulate && j < columns; ++j) sums[j] += to_acc(out[j]);
      for (int64_t j = 0; j < columns; ++j) out[j] = from_acc<T>(sums[j]);
    }
  }

  // x rows of the segment as tiles [k][rows of the tile].
  void pack_x(const TileRows& tiles) const {
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
      A* target = a + begin * p.K;
      for (int64_t i = 0; i < rows; ++i) {
        const T* x = row_of<T>(p.x, segment.begin + begin + i);
        for (int64_t k = 0; k < p.K; ++k) target[k * rows + i] = to_acc(x[k]);
      }
    }
  }
};

// M rows of x (accumulators, K contiguous) against 4 weight rows, k in [begin, end): sums[i * kBlockN + j], begun at k = 0.
// Meanwhile the weights `ahead` elements further come in.
template <class T>
struct DotTile {
  int64_t begin, end;
  const acc_t<T>* const* x;
  const T* const (&w)[4];
  const int64_t (&ahead)[4];
  acc_t<T>* sums;
};

template <int M, class T>
void dot_tile(const DotTile<T>& tile) {
  using A = acc_t<T>;
  constexpr int kL = kLanes<A>, kChains = M == 1 ? 2 : 1, kStep = kL * kChains;
  constexpr int64_t kLine = max_of(64 / static_cast<int64_t>(sizeof(T)), kStep);
  const auto& w = tile.w;
  const A* x[M];
  for (int i = 0; i < M; ++i) x[i] = tile.x[i];
  Vec<A> sum[kChains][M][4] = {};
  int64_t k = tile.begin;
  const auto step = [&] {
    for (int chain = 0; chain < kChains; ++chain, k += kL) {
      Vec<A> xv[M];
      for (int i = 0; i < M; ++i) xv[i] = load(x[i] + k);
      for (int j = 0; j < 4; ++j) {
        const Vec<A> wv = load(w[j] + k);
        for (int i = 0; i < M; ++i) sum[chain][i][j] += xv[i] * wv;
      }
    }
  };
  while (k + kLine <= tile.end) {
    for (int j = 0; j < 4; ++j) {
      if (tile.ahead[j]) __builtin_prefetch(w[j] + k + tile.ahead[j], 0, 2);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < kLine; i += kStep) step();
  }
  while (k + kStep <= tile.end) step();
  while (k < tile.end) {
    const int64_t count = min_of(tile.end - k, kL);
    for (int j = 0; j < 4; ++j) {
      const Vec<A> wv = load_partial(w[j] + k, count);
      for (int i = 0; i < M; ++i) sum[0][i][j] += load_partial(x[i] + k, count) * wv;
    }
    k += count;
  }
  for (int i = 0; i < M; ++i) {
    if constexpr (kChains == 2) {
      for (int j = 0; j < 4; ++j) sum[0][i][j] += sum[1][i][j];
    }
    A lanes[4];
    sum_lanes(sum[0][i], lanes);
    A* sums = tile.sums + i * kBlockN;
    for (int j = 0; j < 4; ++j) sums[j] = tile.begin > 0 ? sums[j] + lanes[j] : lanes[j];
  }
}

template <class T>
void run_dot(const Work<T>& work) {
  using A = acc_t<T>;
  const GroupedMmParams& p = work.p;
  const int64_t rows = work.segment.rows, tiles = divide_up(rows, 3), stride = p.weight.stride_n;
  const A* x[kDotRows<T>];
  for (int64_t i = 0; i < rows; ++i) {
    const T* source = row_of<T>(p.x, work.segment.begin + i);
    if constexpr (std::is_same_v<T, A>) {
      x[i] = source;
    } else {
      A* target = work.a + i * p.K;
      for (int64_t k = 0; k < p.K; ++k) target[k] = to_acc(source[k]);
      x[i] = target;
    }
  }
  // Four weight rows stay in the first-level cache while all rows of x pass.
  const int64_t piece = tiles == 1 ? max_of(p.K, 1) : kDotDepth<T>;
  // The next groups of weight rows come in while this one is used, at least 2 KiB ahead.
  const int64_t groups_ahead = divide_up(2048, 4 * max_of(p.K, 1) * static_cast<int64_t>(sizeof(T)));
  for (int64_t block = work.n0; block < work.n1; block += kBlockN) {
    const int64_t end = min_of(block + kBlockN, work.n1);
    for (int64_t n = block; n < end; n += 4) {
      const T* w[4];
      for (int j = 0; j < 4; ++j) w[j] = work.weight() + min_of(n + j, p.N - 1) * stride;
      for (int64_t k = 0; k < p.K || k == 0; k += piece) {
        for (int64_t t = 0; t < tiles; ++t) {
          int64_t ahead[4];
          for (int j = 0; j < 4; ++j) ahead[j] = j % tiles == t % 4 && n + 4 * groups_ahead + j < p.N ? 4 * groups_ahead * stride : 0;
          const int64_t begin = t * rows / tiles, count = (t + 1) * rows / tiles - begin;
          const DotTile<T> tile{k, min_of(k + piece, p.K), x + begin, w, ahead, work.c + begin * kBlockN + n - block};
          if (count == 1) dot_tile<1>(tile);
          if (count == 2) dot_tile<2>(tile);
          if (count == 3) dot_tile<3>(tile);
        }
      }
    }
    work.write(block, end - block, work.c, kBlockN);
  }
}

template <class T>
void run_direct(const Work<T>& work) {
  using A = acc_t<T>;
  constexpr int kN = kTileN<A>;
  const GroupedMmParams& p = work.p;
  const TileRows tiles(work.segment.rows);
  const int64_t stride = p.weight.stride_k;
  work.pack_x(tiles);
  for (int64_t block = work.n0; block < work.n1; block += kDirectBlockN) {
    const int64_t columns = min_of(kDirectBlockN, work.n1 - block);
    for (int64_t k = 0; k < p.K || k == 0; k += kDirectDepth) {
      const int64_t depth = min_of(kDirectDepth, p.K - k);
      const T* w = work.weight() + k * stride + block;
      for (int64_t n = 0; n < columns; n += kN) {
        const bool whole = n + kN <= columns;
        for (int64_t d = 0; !whole && d < depth; ++d) pack_row(w + n + d * stride, columns - n, work.b + d * kN);
        for (int64_t d = kDirectDepth; d < 2 * kDirectDepth; ++d) __builtin_prefetch(w + n + d * stride, 0, 2);
        for (int64_t t = 0; t < tiles.tiles; ++t) {
          const int64_t begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
          const A* x = work.a + begin * p.K + k * rows;
          A* sums = work.c + begin * kDirectBlockN + n;
          if (whole) {
            tile(rows, depth, x, w + n, stride, sums, kDirectBlockN, k > 0);
          } else {
            tile<A, A>(rows, depth, x, work.b, kN, sums, kDirectBlockN, k > 0);
          }
        }
      }
    }
    work.write(block, columns, work.c, kDirectBlockN);
  }
}

template <class T>
void run_packed(const Work<T>& work) {
  using A = acc_t<T>;
  const GroupedMmParams& p = work.p;
  const TileRows tiles(work.segment.rows);
  const bool transposed = p.weight.stride_k == 1;
  const auto block_at = [&](int64_t n, int64_t k) {
    if (n >= work.n1) return Block<T>{};
    return Block<T>{work.weight() + n * p.weight.stride_n + k * p.weight.stride_k, transposed ? p.weight.stride_n : p.weight.stride_k,
                    min_of(kBlockK, p.K - k), min_of(kBlockN, work.n1 - n), transposed};
  };
  work.pack_x(tiles);
  for (int64_t n = work.n0; n < work.n1; n += kBlockN) {
    for (int64_t k = 0; k < p.K || k == 0; k += kBlockK) {
      const bool more = k + kBlockK < p.K;
      const Block<T> block = block_at(n, k);
      Prefetch next = block_at(more ? n : n + kBlockN, more ? k + kBlockK : 0).prefetch();
      if (transposed) next.spread(block.transpose_steps(), 1 + tiles.count / 4);  // transposing takes as long as multiplying 4 rows
      block.pack(work.b, &next);
      multiply_packed(tiles, PackedA<A>{work.a, p.K, k}, block.depth, divide_up(block.columns, kTileN<A>), work.b,
                      Sums<A>{work.c, kBlockN, k > 0}, next);
    }
    work.write(n, min_of(kBlockN, work.n1 - n), work.c, kBlockN);
  }
}

template <class T>
Status run(const GroupedMmParams& p, const Launch& launch) {
  using A = acc_t<T>;
  Segment* segments = static_cast<Segment*>(launch.workspace);
  const int64_t count = make_segments(p, segments);
  const ThreadMemory memory = thread_memory(p);
  char* threads = static_cast<char*>(launch.workspace) + round_up_64(max_segments(p) * static_cast<int64_t>(sizeof(Segment)));
  // Enough tasks to balance the threads; a segment is cut by columns only when there are few.
  const int64_t wanted = launch.num_threads == 1 ? 1 : divide_up(8 * launch.num_threads, max_of(count, 1));
  const int64_t columns = divide_up(divide_up(p.N, min_of(wanted, divide_up(p.N, 32))), 32) * 32, parts = divide_up(p.N, columns);
  for_each_task(launch, count * parts, [&](int64_t task, int thread) {
    const int64_t n0 = task % parts * columns;
    char* mine = threads + thread * memory.total();
    const Work<T> work{p,
                       segments[task / parts],
                       n0,
                       min_of(n0 + columns, p.N),
                       reinterpret_cast<A*>(mine),
                       reinterpret_cast<A*>(mine + memory.a),
                       reinterpret_cast<A*>(mine + memory.a + memory.b)};
    const int64_t rows = work.segment.rows;
    if (p.weight.stride_k == 1 && rows <= kDotRows<T>) return run_dot(work);
    if (p.weight.stride_n == 1 && rows <= kDirectRows<T>) return run_direct(work);
    run_packed(work);
  });
  for (int64_t r = p.E > 0 ? p.expert_offsets[p.E] : 0; r < p.S; ++r) {
    std::memset(static_cast<T*>(p.out) + r * p.out_stride, 0, p.N * sizeof(T));
  }
  return Status::kOk;
}

Status supports(const GroupedMmParams& p) {
  return p.weight.stride_n == 1 || p.weight.stride_k == 1 ? Status::kOk : Status::kUnsupportedLayout;
}

Status launch(const GroupedMmParams& p, const Launch& launch) {
  if (p.S == 0 || p.N == 0) return Status::kOk;
  return visit_dtype(p.dtype, [&](auto type) { return run<typename decltype(type)::type>(p, launch); });
}

}  // namespace

extern const Kernel<GroupedMmParams> grouped_mm{supports, workspace, launch};

}  // namespace moe::cpu::MOE_ISA
