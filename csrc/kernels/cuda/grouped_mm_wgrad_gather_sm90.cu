// grouped_mm_wgrad for sm_90a with rows gathered as they are loaded: cp.async from wherever a row lies, wgmma with both operands
// MN-major, results rounded once and written by 16-byte stores. A block computes a tile of one expert's matrix over all of its rows in
// their order. Rows beyond the expert are zeros in both operands, never products with zero; no rows at all: zeros are written.
#include "gathered_gemm_sm90.cuh"
#include "grouped_gemm.h"
#include "grouped_mm_wgrad_gather_sm90.h"
#include "store_rows_sm90.cuh"

namespace moe::cuda {
namespace {

template <class T>
class WgradEpilogue {
 public:
  struct Params {
    OutputTable out;
    int N;
  };
  static constexpr int kBoxBytes = 16 * kRowBytes, kSharedBytes = 2 * kBoxBytes;  // boxes of 64 columns

  __device__ WgradEpilogue(const Params& p, uint32_t shared) : p_(p), shared_(shared), lane_(threadIdx.x % 32) {}

  // Two boxes in turns: that all lanes have written one says that they have read the other.
  __device__ void store(const WarpTile& tile, float (&acc)[WgradTile::kN / 2]) {
    if (tile.rows == 0) return;
#pragma unroll
    for (int i = 0; i < WgradTile::kN / 64; ++i) {
      const uint32_t box = shared_ + i % 2 * kBoxBytes;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const ChunkIndex at = stmatrix_chunk(lane_, j);
        const int first = 32 * i + 4 * j;
        sm90::store_matrices(box + swizzled(at.row, at.chunk), pack<T>(acc[first], acc[first + 1]), pack<T>(acc[first + 2], acc[first + 3]),
                             pack<T>(acc[first + 4], acc[first + 5]), pack<T>(acc[first + 6], acc[first + 7]));
      }
      __syncwarp();
      write(tile, 64 * i, [&](int row, int chunk) { return sm90::load_shared_16(box + swizzled(row, chunk)); });
    }
  }

  __device__ void clear(const WarpTile& tile) const {
    for (int column = 0; column < WgradTile::kN; column += 64) write(tile, column, [](int, int) { return uint4{}; });
  }

  __device__ void finish() const {}

 private:
  // 64 columns of the tile's 16 rows: eight lanes write 128 consecutive bytes.
  template <class Value>
  __device__ __forceinline__ void write(const WarpTile& tile, int first, const Value& value) const {
    const int chunk = lane_ % 8, column = tile.column_tile * WgradTile::kN + first + chunk * kChunkElements;
    if (column >= p_.N) return;
    T* out = expert_data<T>(p_.out, tile.expert) + tile.begin * p_.out.stride + column;
#pragma unroll
    for (int row = lane_ / 8; row < 16; row += 4) {
      if (row < tile.rows) __stcs(reinterpret_cast<uint4*>(out + row * p_.out.stride), value(row, chunk));
    }
  }

  const Params& p_;
  uint32_t shared_;
  int lane_;
};

template <class T>
struct WgradParams {
  Rows a, b;
  const int32_t *expert_offsets, *order;  // order: experts by falling number of rows
  int E, M, N, S;
  WgradPlan plan;
  typename WgradEpilogue<T>::Params epilogue;
};

// Rows begin .. begin + rows of the result, which are columns of a; k runs over the `depth` rows of a and b from `first`.
struct WgradBlock {
  int expert, begin, rows, column_tile, first, depth;
};

template <class T>
class WgradWalk {
 public:
  using Block = WgradBlock;
  __device__ explicit WgradWalk(const WgradParams<T>& p) : p_(p) {}

  __device__ bool next(WgradBlock& tile) {
    const int number = tile_of_turn(turn_++, blockIdx.x, gridDim.x), per_expert = p_.plan.per_expert();
    if (number >= p_.E * per_expert) return false;
    const int e = p_.order[number / per_expert];
    const TilePosition at = tile_position(number % per_expert, p_.plan.row_tiles, p_.plan.column_tiles);
    const int begin = static_cast<int>(at.row_tile) * WgradTile::kM;
    const ExpertRows rows = expert_rows(p_.expert_offsets, e, p_.S);
    tile = {e, begin, rows_from(p_.M, begin, WgradTile::kM), static_cast<int>(at.column_tile), rows.begin, rows.count};
    return true;
  }
  __device__ int depth(const WgradBlock& tile) const { return tile.depth; }

 private:
  const WgradParams<T>& p_;
  int turn_ = 0;
};

// One operand, as a producer thread copies it.
template <class T>
class RowCopier {
 public:
  __device__ explicit RowCopier(const Rows& rows) : rows_(rows), row_bytes_(static_cast<uint32_t>(rows.stride * sizeof(T))) {}

  // The tile's columns from `column`, as far as the `width` of the operand; its rows are `depth` from `first`.
  __device__ void begin(const WgradBlock& tile, int column, int width) {
    column += static_cast<int>(threadIdx.x) % 8 * kChunkElements;
    from_ = reinterpret_cast<const char*>(static_cast<const T*>(rows_.data) + column);
    chunks_ = columns_inside(column, width);
    look_up(tile, 0);
  }

  // The source row of one row of the step at k: asked for a step ahead, so that no copy waits for it.
  __device__ void look_up(const WgradBlock& tile, int k) {
    const int row = k + looked_up_row(threadIdx.x);
    source_ = row >= tile.depth ? 0 : rows_.row_to_slot ? rows_.row_to_slot[tile.first + row] : tile.first + row;
  }

  // kChunks chunks of the step's rows, of which `rows` of this thread's exist.
  template <int kChunks>
  __device__ void copy(uint32_t to, int rows) const {
    const uint32_t source = rows_.row_to_slot ? source_ / static_cast<uint32_t>(rows_.top_k) : source_;
#pragma unroll
    for (int i = 0; i < WgradTile::kCopiedRows; ++i) {
      const char* from = from_ + uint64_t{__shfl_sync(0xffffffffu, source, lane_of_row(threadIdx.x % 32, i))} * row_bytes_;
      const int chunks = i < rows ? chunks_ : 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        sm90::copy_16(to + i * 16 * kRowBytes + c * WgradTile::kChunkBytes, from + kRowBytes * c, c < chunks ? 16 : 0);
      }
    }
  }

 private:
  const Rows& rows_;
  uint32_t row_bytes_, source_;
  int chunks_;
  const char* from_;
};

template <class T, class Places>
__device__ __forceinline__ void produce_wgrad(const WgradParams<T>& p, const Places& places) {
  const int thread = threadIdx.x;
  const ChunkIndex chunk = gathered_chunk(thread, 0);
  const uint32_t to = swizzled(chunk.row, chunk.chunk);
  RowCopier<T> a(p.a), b(p.b);
  RingPosition<WgradTile::kStages> at;
  WgradWalk<T> walk(p);
  for (WgradBlock tile; walk.next(tile);) {
    a.begin(tile, tile.begin, p.M);
    b.begin(tile, tile.column_tile * WgradTile::kN, p.N);
    for (int k = 0; k < tile.depth; k += kDepth) {
      const int rows = gathered_rows(thread, tile.depth - k);
      sm90::wait(places.empty(at.stage), at.parity ^ 1);
      a.template copy<WgradTile::kM / 64>(places.a(at.stage) + to, rows);
      b.template copy<WgradTile::kN / 64>(places.b(at.stage) + to, rows);
      sm90::arrive_after_copies(places.full(at.stage));
      a.look_up(tile, k + kDepth);
      b.look_up(tile, k + kDepth);
      at.advance();
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kGatheredThreads, 1) wgrad_gather_kernel(const __grid_constant__ WgradParams<T> p) {
  extern __shared__ __align__(1024) char shared[];
  const SharedPlaces<WgradTile, WgradEpilogue<T>> places{sm90::shared_address(shared)};
  init_barriers<WgradTile>(places);
  const int warpgroup = uniform(static_cast<int>(threadIdx.x) / kWarpgroup);
  if (warpgroup == 0) {
    sm90::give_registers<kProducerRegisters>();
    produce_wgrad(p, places);
  } else {
    sm90::take_registers<kConsumerRegisters>();
    consume<T, WgradTile, Major::kMN, Major::kMN, WgradEpilogue<T>, WgradWalk<T>>(p, places, warpgroup - 1);
  }
}

__global__ void __launch_bounds__(kWarpgroup) order_kernel(const int32_t* expert_offsets, int E, int32_t* order) {
  const int e = static_cast<int>(blockIdx.x) * kWarpgroup + static_cast<int>(threadIdx.x);
  if (e < E) order[place_by_rows(expert_offsets, E, e)] = e;
}

template <class T>
Status launch_type(const GroupedMmWgradParams& p, const int32_t* order, int64_t tiles, const Launch& launch) {
  const int E = static_cast<int>(p.E), M = static_cast<int>(p.M), N = static_cast<int>(p.N), S = static_cast<int>(p.S);
  const WgradParams<T> k = {p.a, p.b, p.expert_offsets, order, E, M, N, S, wgrad_plan(M, N), {p.out, N}};
  return launch_blocks<WgradTile, WgradEpilogue<T>>(wgrad_gather_kernel<T>, k, tiles, launch);
}

int64_t workspace(const GroupedMmWgradParams& p, int) { return p.E * 4; }

Status launch(const GroupedMmWgradParams& p, const Launch& launch) {
  const int64_t tiles = divide_up(p.M, WgradTile::kM) * divide_up(p.N, WgradTile::kN) * p.E;
  if (tiles > INT32_MAX / 2 || greatest(p.a.stride, p.b.stride) > INT32_MAX) return Status::kUnsupportedLayout;
  int32_t* order = static_cast<int32_t*>(launch.workspace);
  order_kernel<<<static_cast<unsigned>(divide_up(p.E, kWarpgroup)), kWarpgroup, 0, static_cast<cudaStream_t>(launch.stream)>>>(
      p.expert_offsets, static_cast<int>(p.E), order);
  if (launched() != Status::kOk) return Status::kLaunchFailed;
  return p.dtype == DType::kBFloat16 ? launch_type<__nv_bfloat16>(p, order, tiles, launch) : launch_type<__half>(p, order, tiles, launch);
}

}  // namespace

const Kernel<GroupedMmWgradParams> sm90_wgrad_gather = {nullptr, workspace, launch};

}  // namespace moe::cuda
