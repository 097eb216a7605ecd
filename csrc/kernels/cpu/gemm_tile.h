// The register tile shared by grouped_mm and grouped_mm_wgrad, and the packed blocks it reads:
//   C[i][n] (+)= sum over k of A[k][i] * B[k][n]     i < rows of the tile, n < kTileN
// A is packed by tile as [k][rows], B by panel as [k][kTileN], both as accumulators; C is row-major in accumulators. Each
// element of C is a sum over blocks of k of sums over the block, in the order of k, whatever the tile or the thread: results are
// reproducible, and the rounding error grows with the length of a block plus the number of blocks, not with their product.
#pragma once
#include "../params.h"
#include "vec.h"

namespace moe::cpu::MOE_ISA {

#if defined(__AVX512F__)
constexpr int kTileM = 12;  // 24 of 32 registers accumulate
#else
constexpr int kTileM = 6;  // 12 of 16 registers accumulate
#endif
template <class A>
constexpr int kTileN = 2 * kLanes<A>;

constexpr int64_t kBlockK = 256;  // a packed panel of B fills half of a 32 KiB first-level cache
constexpr int64_t kBlockN = 128;  // a packed block of B fits a second-level cache beside the blocks of A and C

// Neighbouring panels are kept from mapping to the same cache sets.
template <class A>
constexpr int64_t kPanelSize = kBlockK * kTileN<A> + 64 / static_cast<int64_t>(sizeof(A));
template <class A>
constexpr int64_t kPackedBlockSize = (kBlockN + kTileN<A> - 1) / kTileN<A> * kPanelSize<A>;

constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up_64(int64_t bytes) { return divide_up(bytes, 64) * 64; }

template <class T>
const T* row_of(const Rows& rows, int64_t r) {
  return static_cast<const T*>(rows.data) + (rows.row_to_slot ? rows.row_to_slot[r] / rows.top_k : r) * rows.stride;
}

// Rows [0, count) cut into tiles of nearly equal height, none above kTileM.
struct TileRows {
  int64_t count, tiles;
  explicit TileRows(int64_t rows) : count(rows), tiles(divide_up(rows, kTileM)) {}
  int64_t begin(int64_t tile) const { return tile * count / tiles; }
};

// Walks over the cache lines of a matrix block that is needed soon. A few lines at a time between arithmetic: processors drop
// prefetches that come in bursts. Addresses may lie past the end: prefetches do not fault.
struct Prefetch {
  const char* row = nullptr;
  int64_t stride = 0, width = 0, rows = 0, column = 0, per_step = 0;

  // Spreads one `share`-th of the lines that are left over the next `steps` steps.
  void spread(int64_t steps, int64_t share) { per_step = divide_up(rows * divide_up(width, 64), max_of(steps, 1) * share); }
  void step() {
    for (int64_t i = 0; i < per_step && rows > 0; ++i) {
      __builtin_prefetch(row + column, 0, 2);
      column += 64;
      if (column >= width) column = 0, row += stride, --rows;
    }
  }
};

constexpr int64_t kPrefetchDepth = 8;  // values of k per Prefetch::step

template <int M, class A, class T>
inline void add_products(int64_t depth, const A* a, const T* b, int64_t ldb, Vec<A> (&sum)[M][2]) {
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<A> b0 = load(b + k * ldb), b1 = load(b + k * ldb + kLanes<A>);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const A value = a[k * M + i];
      sum[i][0] += value * b0;
      sum[i][1] += value * b1;
    }
  }
}

// B may be packed (ldb = kTileN, already accumulators) or the weights themselves (any element type, any ldb).
template <int M, class A, class T>
inline void tile_rows(int64_t depth, const A* a, const T* b, int64_t ldb, A* c, int64_t ldc, bool accumulate, Prefetch* next) {
  Vec<A> sum[M][2] = {};
  int64_t k = 0;
  if (next && next->rows > 0) {
    Prefetch lines = *next;
    for (; k + kPrefetchDepth <= depth; k += kPrefetchDepth) {
      lines.step();
      add_products<M>(kPrefetchDepth, a + k * M, b + k * ldb, ldb, sum);
    }
    *next = lines;
  }
  add_products<M>(depth - k, a + k * M, b + k * ldb, ldb, sum);
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < 2; ++j) {
      A* target = c + i * ldc + j * kLanes<A>;
      store(target, accumulate ? load(target) + sum[i][j] : sum[i][j]);
    }
  }
}

template <class A, class T>
void tile(int64_t rows, int64_t depth, const A* a, const T* b, int64_t ldb, A* c, int64_t ldc, bool accumulate, Prefetch* next = nullptr) {
  switch (rows) {
    case 1:
      return tile_rows<1>(depth, a, b, ldb, c, ldc, accumulate, next);
    case 2:
      return tile_rows<2>(depth, a, b, ldb, c, ldc, accumulate, next);
    case 3:
      return tile_rows<3>(depth, a, b, ldb, c, ldc, accumulate, next);
    case 4:
      return tile_rows<4>(depth, a, b, ldb, c, ldc, accumulate, next);
    case 5:
      return tile_rows<5>(depth, a, b, ldb, c, ldc, accumulate, next);
    case 6:
      return tile_rows<6>(depth, a, b, ldb, c, ldc, accumulate, next);
#if defined(__AVX512F__)
    case 7:
      return tile_rows<7>(depth, a, b, ldb, c, ldc, accumulate, next);
    case 8:
      return tile_rows<8>(depth, a, b, ldb, c, ldc, accumulate, next);
    case 9:
      return tile_rows<9>(depth, a, b, ldb, c, ldc, accumulate, next);
    case 10:
      return tile_rows<10>(depth, a, b, ldb, c, ldc, accumulate, next);
    case 11:
      return tile_rows<11>(depth, a, b, ldb, c, ldc, accumulate, next);
    case 12:
      return tile_rows<12>(depth, a, b, ldb, c, ldc, accumulate, next);
#endif
  }
}

// One row of a block of B, `columns` contiguous elements, to where it stands in each panel; missing columns become zero.
template <class T>
void pack_row(const T* source, int64_t columns, acc_t<T>* target) {
  using A = acc_t<T>;
  constexpr int kN = kTileN<A>;
  int64_t n = 0;
  for (; n + kN <= columns; n += kN, target += kPanelSize<A>) {
    store(target, load(source + n));
    store(target + kLanes<A>, load(source + n + kLanes<A>));
  }
  if (n == columns) return;
  for (int i = 0; i < kN; ++i) target[i] = n + i < columns ? to_acc(source[n + i]) : A(0);
}

// A transposer reads G rows of K-contiguous weights, 4 or 8 values of k at once, and writes G lanes per k.
#if defined(__AVX__)
constexpr int kTransposeRows = 8;
#else
constexpr int kTransposeRows = 4;
#endif
typedef float TransposeLanes __attribute__((vector_size(kTransposeRows * 4)));
typedef uint32_t TransposeBits __attribute__((vector_size(kTransposeRows * 4)));

inline TransposeLanes low_pairs(TransposeLanes a, TransposeLanes b) {
#if defined(__AVX__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
inline TransposeLanes high_pairs(TransposeLanes a, TransposeLanes b) {
#if defined(__AVX__)
  return __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}
inline TransposeLanes low_halves(TransposeLanes a, TransposeLanes b) {
#if defined(__AVX__)
  return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
#else
  return __builtin_shufflevector(a, b, 0, 1, 4, 5);
#endif
}
inline TransposeLanes high_halves(TransposeLanes a, TransposeLanes b) {
#if defined(__AVX__)
  return __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
#else
  return __builtin_shufflevector(a, b, 2, 3, 6, 7);
#endif
}

// 16 bytes of row j, and behind them 16 bytes of row j + 4.
inline TransposeLanes two_rows(Float4 low, [[maybe_unused]] Float4 high) {
#if defined(__AVX__)
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return low;
#endif
}

// v[j] holds four values of rows j (and j + 4); afterwards v[k] holds value k of every row.
inline void transpose(TransposeLanes (&v)[4]) {
  const TransposeLanes a = low_pairs(v[0], v[1]), b = high_pairs(v[0], v[1]);
  const TransposeLanes c = low_pairs(v[2], v[3]), d = high_pairs(v[2], v[3]);
  v[0] = low_halves(a, c), v[1] = high_halves(a, c), v[2] = low_halves(b, d), v[3] = high_halves(b, d);
}

// kTransposeRows rows of `depth` contiguous elements -> [k][kTileN], at `target`.
template <class T>
void transpose_rows(const T* const (&rows)[8], int64_t depth, acc_t<T>* target, Prefetch* next) {
  using A = acc_t<T>;
  constexpr int kN = kTileN<A>, kRows = kTransposeRows;
  Prefetch lines = *next;
  int64_t k = 0;
  if constexpr (std::is_same_v<T, bfloat16>) {
    // Pairs (k, k+1) travel as 32-bit values and are widened after the transposition.
    for (; k + 8 <= depth; k += 8) {
      lines.step();
      TransposeLanes v[4];
      for (int j = 0; j < 4; ++j) v[j] = two_rows(load_raw<Float4>(rows[j] + k), load_raw<Float4>(rows[kRows == 8 ? j + 4 : j] + k));
      transpose(v);
      for (int j = 0; j < 4; ++j) {
        const TransposeBits pair = reinterpret_cast<TransposeBits>(v[j]);
        store(target + (k + 2 * j) * kN, pair << 16);
        store(target + (k + 2 * j + 1) * kN, pair & 0xffff0000u);
      }
    }
  } else if constexpr (std::is_same_v<A, float>) {
    for (; k + 4 <= depth; k += 4) {
      if (k % 8 == 0) lines.step();
      TransposeLanes v[4];
      for (int j = 0; j < 4; ++j) v[j] = two_rows(load_lanes<4>(rows[j] + k), load_lanes<4>(rows[kRows == 8 ? j + 4 : j] + k));
      transpose(v);
      for (int j = 0; j < 4; ++j) store(target + (k + j) * kN, v[j]);
    }
  }
  for (; k < depth; ++k) {
    for (int i = 0; i < kRows; ++i) target[k * kN + i] = to_acc(rows[i][k]);
  }
  *next = lines;
}

// B block of `depth` x `columns`, depth contiguous, column n at b + n*ld -> panels. Missing columns repeat the last one.
template <class T>
void pack_transposed(const T* b, int64_t ld, int64_t depth, int64_t columns, acc_t<T>* packed, Prefetch* next) {
  using A = acc_t<T>;
  constexpr int kN = kTileN<A>, kRows = kTransposeRows;
  static_assert(kN % kRows == 0);
  for (int64_t n = 0; n < columns; n += kRows) {
    const T* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = b + min_of(n + i, columns - 1) * ld;
    transpose_rows(rows, depth, packed + n / kN * kPanelSize<A> + n % kN, next);
  }
}

// A block of B where it is stored: element (k, n) at data + (transposed ? n*ld + k : k*ld + n).
template <class T>
struct Block {
  const T* data = nullptr;
  int64_t ld = 0, depth = 0, columns = 0;
  bool transposed = false;

  Prefetch prefetch() const {
    const int64_t bytes = sizeof(T);
    return {reinterpret_cast<const char*>(data), ld * bytes, (transposed ? depth : columns) * bytes, transposed ? columns : depth};
  }
  int64_t transpose_steps() const { return divide_up(columns, kTransposeRows) * (depth / kPrefetchDepth); }
  void pack(acc_t<T>* packed, Prefetch* next) const {
    if (transposed) return pack_transposed(data, ld, depth, columns, packed, next);
    for (int64_t k = 0; k < depth; ++k) pack_row(data + k * ld, columns, packed + k * kTileN<acc_t<T>>);
  }
};

// Tiles of A, each [k][rows of the tile] over `depth` values of k, entered at k = begin; and where the products go.
template <class A>
struct PackedA {
  const A* data;
  int64_t depth, begin;
};
template <class A>
struct Sums {
  A* data;
  int64_t ld;
  bool accumulate;
};

// C (+)= A B for every tile of A and every panel of a packed block of B, while the lines of `next` come in.
template <class A>
void multiply_packed(const TileRows& tiles, const PackedA<A>& a, int64_t depth, int64_t panels, const A* packed, const Sums<A>& c,
                     Prefetch next = {}) {
  next.spread(panels * tiles.tiles * (depth / kPrefetchDepth), 1);
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
      tile(rows, depth, a.data + begin * a.depth + a.begin * rows, packed + panel * kPanelSize<A>, kTileN<A>,
           c.data + begin * c.ld + panel * kTileN<A>, c.ld, c.accumulate, &next);
    }
  }
}

}  // namespace moe::cpu::MOE_ISA
