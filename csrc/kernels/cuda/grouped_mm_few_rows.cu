// grouped_mm, and the up projection with its activation, for few rows per expert: out[r, :] = x[r, :] @ weight[e]^T. The time is
// that of reading the weights, so each byte is read once per tile of 16 rows, 16 bytes at a time, straight into registers
// (few_rows_tile.h), and a ring of slices keeps loads in flight from one tile of outputs to the next. A block's eight warps
// share the outputs and divide k; their sums are added in a fixed order, which no other row of the batch has a part in.
#include "../activation.h"
#include "few_rows_tile.h"
#include "grouped_gemm.h"
#include "mma_tile.cuh"
#include "operands.cuh"
#include "row_tiles.h"

namespace moe::cuda {
namespace {

constexpr int kLaneRows = 2;  // of x, per lane

// RowTile in 32 bits: registers are scarce here.
struct TileRows {
  int expert, begin, count;
};

// 16 bytes, or zeros where there are none; predicated, since a branch for every load would take the lanes apart.
#define MOE_LOAD_CHUNK(cache)                                                                              \
  asm volatile(                                                                                            \
      "{ .reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; " \
      "@p ld.global.nc" cache ".v4.b32 {%0, %1, %2, %3}, [%4]; }"                                          \
      : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3])                                             \
      : "l"(from), "r"(static_cast<int>(present)))

// What is needed once leaves L1 to what is needed again.
template <bool kOnce>
__device__ __forceinline__ void load_chunk(unsigned (&to)[4], const void* from, bool present) {
  if constexpr (kOnce) {
    MOE_LOAD_CHUNK(".L1::no_allocate");
  } else {
    MOE_LOAD_CHUNK("");
  }
}
#undef MOE_LOAD_CHUNK

// A lane's loads of one slice after another: of kPointers places that may not exist, kRowsEach rows of k from each.
template <class T, int kPointers, int kRowsEach, bool kOnce>
struct LaneLoads {
  const T* at[kPointers];
  unsigned present = 0;  // bit i: at[i] exists
  int64_t stride = 1;    // from k to k + 1

  __device__ int64_t stride_k() const { return kRowsEach == 1 ? 1 : stride; }

  // Of the slice `ahead` k further on. A slice exists for a whole lane or not at all, since k comes in eights.
  __device__ void load(unsigned (&to)[kPointers * kRowsEach][4], int ahead, bool exists) const {
#pragma unroll
    for (int i = 0; i < kPointers * kRowsEach; ++i) {
      load_chunk<kOnce>(to[i], at[i / kRowsEach] + (ahead + i % kRowsEach) * stride_k(), exists && present >> i / kRowsEach & 1);
    }
  }

  __device__ void advance(int k) {
#pragma unroll
    for (int i = 0; i < kPointers; ++i) at[i] += k * stride_k();
  }
};

// Output `output` of a tile: where its weights begin, whether it exists, and how far it is to that of the next tile.
template <class T>
struct OutputWeights {
  const T* begin;
  bool exists;
  int64_t next;
};

template <class T, Major major>
__device__ OutputWeights<T> weights_of(const GroupedMmParams& p, int expert, int tile, int output) {
  constexpr int kOutputs = FewRowsTile<major>::kOutputs;
  const int64_t n = static_cast<int64_t>(tile) * kOutputs + output, stride = p.weight.stride_n;
  return {expert_data<T>(p.weight, expert) + n * stride, n < p.N, kOutputs * stride};
}

// Gate and up as neighbouring columns of one matrix.
template <Major major>
__device__ bool in_turns(const GroupedUpParams& p) {
  return major == Major::kMN && p.gate_proj.stride_n == 2;
}

template <class T, Major major>
__device__ OutputWeights<T> weights_of(const GroupedUpParams& p, int expert, int tile, int output) {
  constexpr int kOutputs = FewRowsTile<major>::kOutputs, kHalf = FewRowsTile<major>::kHalf;
  const T* gate = expert_data<T>(p.gate_proj, expert);
  if (in_turns<major>(p)) {
    const int64_t n = static_cast<int64_t>(tile) * kOutputs + output;
    return {gate + n, n < 2 * p.I, kOutputs};
  }
  const int64_t n = static_cast<int64_t>(tile) * kHalf + output % kHalf, stride = p.gate_proj.stride_n;
  return {(output < kHalf ? gate : expert_data<T>(p.up_proj, expert)) + n * stride, n < p.I, kHalf * stride};
}

__device__ int64_t depth_of(const GroupedMmParams& p) { return p.K; }
__device__ int64_t depth_of(const GroupedUpParams& p) { return p.H; }
__device__ int64_t stride_k_of(const GroupedMmParams& p) { return p.weight.stride_k; }
__device__ int64_t stride_k_of(const GroupedUpParams& p) { return p.gate_proj.stride_k; }

template <class T>
using RowLoads = LaneLoads<T, kLaneRows, 1, false>;

// The first k of this lane.
__device__ int lane_k() { return static_cast<int>(threadIdx.x) / 32 * kSliceDepth + static_cast<int>(threadIdx.x) % 4 * 8; }

template <class T, Major major, class Params>
struct WeightStream {
  using Tile = FewRowsTile<major>;
  static constexpr int kPointers = Tile::kIsKMajor ? Tile::kLoads : 1;
  LaneLoads<T, kPointers, Tile::kLoads / kPointers, true> loads;

  __device__ WeightStream(const Params& p, int expert, int tile) {
    loads.stride = stride_k_of(p);
#pragma unroll
    for (int i = 0; i < kPointers; ++i) {
      const OutputWeights<T> w = weights_of<T, major>(p, expert, tile, Tile::load_output(threadIdx.x % 32, i));
      loads.at[i] = w.begin + lane_k() * loads.stride_k();
      loads.present |= (w.exists ? 1u : 0u) << i;
    }
  }

  // From k `done` of the tile before on to the first of `tile`.
  __device__ void next_tile(const Params& p, int expert, int tile, int done) {
    loads.present = 0;
#pragma unroll
    for (int i = 0; i < kPointers; ++i) {
      const OutputWeights<T> w = weights_of<T, major>(p, expert, tile, Tile::load_output(threadIdx.x % 32, i));
      loads.at[i] += w.next - done * loads.stride_k();
      loads.present |= (w.exists ? 1u : 0u) << i;
    }
  }
};

template <class T>
__device__ RowLoads<T> row_loads(const Rows& x, const TileRows& rows) {
  RowLoads<T> loads;
#pragma unroll
  for (int g = 0; g < kLaneRows; ++g) {
    const int row = 8 * g + static_cast<int>(threadIdx.x) % 32 / 4;
    const bool present = row < rows.count;
    loads.at[g] = row_of<T>(x, rows.begin + (present ? row : 0)) + lane_k();
    loads.present |= (present ? 1u : 0u) << g;
  }
  return loads;
}

// A lane's part of one slice.
template <class T, Major major>
struct Slice {
  using Tile = FewRowsTile<major>;
  unsigned weights[Tile::kLoads][4], x[kLaneRows][4];

  __device__ void multiply(float (&sums)[Tile::kProducts][4]) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      unsigned a[4], b[2];
      few_rows_operand(x, step, a);
#pragma unroll
      for (int i = 0; i < Tile::kProducts; ++i) {
        Tile::weights(weights, i, step, b);
        mma(sums[i], a, b[0], b[1], T());
      }
    }
  }
};

// The warps' sums, in shared memory.
template <Major major>
struct Sums {
  using Tile = FewRowsTile<major>;
  float* shared;

  __device__ void store(const float (&sums)[Tile::kProducts][4]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < Tile::kProducts; ++i) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        float* to = shared + warp * Tile::kWarpFloats + Tile::sum_position(accumulator_row(lane, j), i, accumulator_column(lane, j));
        *reinterpret_cast<float2*>(to) = {sums[i][j], sums[i][j + 1]};
      }
    }
  }

  __device__ float operator()(int row, int output) const {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kSliceWarps; ++w) sum += shared[w * Tile::kWarpFloats + Tile::sum_position(row, output)];
    return sum;
  }
};

// What becomes of a tile's sums; without them (rows of dropped slots) results are zero.
template <class T, Major major>
__device__ void write_results(const GroupedMmParams& p, const TileRows& rows, int64_t tile, const Sums<major>* sums) {
  constexpr int kOutputs = FewRowsTile<major>::kOutputs;
  const T* bias = sums && p.bias ? expert_data<T>(p.bias, rows.expert) : nullptr;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows.count * kOutputs; i += kThreads) {
    const int row = i / kOutputs, output = i % kOutputs;
    const int64_t n = tile * kOutputs + output;
    if (n >= p.N) continue;
    T* out = static_cast<T*>(p.out) + static_cast<int64_t>(rows.begin + row) * p.out_stride + n;
    float value = sums ? (*sums)(row, output) : 0.0f;
    if (bias) value += to_acc(bias[n * p.bias.stride_n]);
    if (sums && p.accumulate) value += to_acc(*out);
    *out = from_acc<T>(value);
  }
}

__device__ float gated(const Activation& a, float gate, float up) {
  const float alpha = static_cast<float>(a.alpha), limit = a.has_limit ? static_cast<float>(a.limit) : INFINITY;
  switch (a.kind) {
    case ActivationKind::kSilu:
      return gated_value<ActivationKind::kSilu>(gate, up, alpha, limit);
    case ActivationKind::kGelu:
      return gated_value<ActivationKind::kGelu>(gate, up, alpha, limit);
    case ActivationKind::kGeluTanh:
      return gated_value<ActivationKind::kGeluTanh>(gate, up, alpha, limit);
    case ActivationKind::kRelu:
      return gated_value<ActivationKind::kRelu>(gate, up, alpha, limit);
    case ActivationKind::kRelu2:
      return gated_value<ActivationKind::kRelu2>(gate, up, alpha, limit);
    default:
      return gated_value<ActivationKind::kSwigluOai>(gate, up, alpha, limit);
  }
}

template <class T, Major major>
__device__ void write_results(const GroupedUpParams& p, const TileRows& rows, int64_t tile, const Sums<major>* sums) {
  constexpr int kHalf = FewRowsTile<major>::kHalf;
  const bool turns = in_turns<major>(p);
  const T* gate_bias = sums && p.gate_bias ? expert_data<T>(p.gate_bias, rows.expert) : nullptr;
  const T* up_bias = sums && p.up_bias ? expert_data<T>(p.up_bias, rows.expert) : nullptr;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows.count * kHalf; i += kThreads) {
    const int row = i / kHalf, output = i % kHalf;
    const int64_t n = tile * kHalf + output, r = rows.begin + row;
    if (n >= p.I) continue;
    float gate = sums ? (*sums)(row, turns ? 2 * output : output) : 0.0f;
    float up = sums ? (*sums)(row, turns ? 2 * output + 1 : output + kHalf) : 0.0f;
    if (gate_bias) gate += to_acc(gate_bias[n * p.gate_bias.stride_n]);
    if (up_bias) up += to_acc(up_bias[n * p.up_bias.stride_n]);
    const T rounded_gate = from_acc<T>(gate), rounded_up = from_acc<T>(up);
    if (p.pre_act) {
      T* pre_act = static_cast<T*>(p.pre_act) + r * 2 * p.I;
      pre_act[p.activation.interleaved ? 2 * n : n] = rounded_gate;
      pre_act[p.activation.interleaved ? 2 * n + 1 : p.I + n] = rounded_up;
    }
    if (!p.out) continue;
    static_cast<T*>(p.out)[r * p.I + n] = sums ? from_acc<T>(gated(p.activation, to_acc(rounded_gate), to_acc(rounded_up))) : T(0.0f);
  }
}

struct Blocks {
  int row_tiles, output_tiles, tiles_per_block;
  MOE_HD int columns() const { return (output_tiles + tiles_per_block - 1) / tiles_per_block; }
  // Whether the block of this tile of outputs goes on to the next.
  MOE_HD bool has_next(int tile) const { return ((tile + 1) & (tiles_per_block - 1)) && tile + 1 < output_tiles; }
};

template <class T, Major major, class Params>
__global__ void __launch_bounds__(kThreads, 2) few_rows_kernel(Params p, Blocks blocks) {
  using Tile = FewRowsTile<major>;
  constexpr int kSlices = Tile::kIsKMajor ? 3 : 1, kRound = kSliceWarps * kSliceDepth;  // of the ring; k of one slice of every warp
  __shared__ __align__(8) float shared[kSliceWarps * Tile::kWarpFloats];
  const TilePosition position = tile_position(blockIdx.x, blocks.row_tiles, blocks.columns());
  const RowTile found = RowTiles(p.expert_offsets, p.S, p.E, kFewRows).find(position.row_tile);
  TileRows rows{static_cast<int>(found.group), static_cast<int>(found.begin), found.rows};
  if (rows.count == 0) return;
  int tile = static_cast<int>(position.column_tile) * blocks.tiles_per_block;
  if (rows.expert == p.E) {
    do {
      write_results<T, major>(p, rows, tile, nullptr);
    } while (blocks.has_next(tile++));
    return;
  }

  const int depth = static_cast<int>(depth_of(p)), first_k = lane_k();
  WeightStream<T, major, Params> weights(p, rows.expert, tile);
  Slice<T, major> ring[kSlices];
#pragma unroll
  for (int i = 0; i < kSlices; ++i) weights.loads.load(ring[i].weights, i * kRound, first_k + i * kRound < depth);
  RowLoads<T> x = row_loads<T>(p.x, rows);  // found while the first weights are on their way
#pragma unroll
  for (int i = 0; i < kSlices; ++i) x.load(ring[i].x, i * kRound, first_k + i * kRound < depth);

  do {
    float sums[Tile::kProducts][4] = {};
    for (int k = 0; k < depth;) {
      k += kSlices * kRound;
      int next_k = first_k + k;
      if (k < depth) {
        weights.loads.advance(kSlices * kRound);
        x.advance(kSlices * kRound);
      } else {  // on to the next tile
        weights.next_tile(p, rows.expert, tile + 1, k - kSlices * kRound);
        x.advance(kSlices * kRound - k);
        next_k = blocks.has_next(tile) ? first_k : depth;
      }
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        ring[i].multiply(sums);
        weights.loads.load(ring[i].weights, i * kRound, next_k + i * kRound < depth);
        x.load(ring[i].x, i * kRound, next_k + i * kRound < depth);
      }
    }
    const Sums<major> total{shared};
    total.store(sums);
    __syncthreads();
    asm volatile("" : "+r"(rows.expert));  // else addresses of biases would be kept in registers across the loop
    write_results<T, major>(p, rows, tile, &total);
    __syncthreads();
  } while (blocks.has_next(tile++));
}

template <class T, Major major, class Params>
Status launch_blocks(const Params& p, int64_t output_tiles, const Launch& launch) {
  const int64_t row_tiles = RowTiles(nullptr, p.S, p.E, kFewRows).count();
  if (row_tiles * output_tiles > INT32_MAX) return Status::kUnsupportedLayout;
  const Blocks blocks{static_cast<int>(row_tiles), static_cast<int>(output_tiles),
                      tiles_per_block(row_tiles, output_tiles, multiprocessors())};
  const int count = blocks.row_tiles * blocks.columns();
  few_rows_kernel<T, major><<<static_cast<unsigned>(count), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(p, blocks);
  return launched();
}

template <Major major, class Params>
Status launch_dtype(const Params& p, int64_t output_tiles, const Launch& launch) {
  return p.dtype == DType::kBFloat16 ? launch_blocks<__nv_bfloat16, major>(p, output_tiles, launch)
                                     : launch_blocks<__half, major>(p, output_tiles, launch);
}

Status launch_mm(const GroupedMmParams& p, const Launch& launch) {
  return p.weight.stride_k == 1 ? launch_dtype<Major::kK>(p, divide_up(p.N, FewRowsTile<Major::kK>::kOutputs), launch)
                                : launch_dtype<Major::kMN>(p, divide_up(p.N, FewRowsTile<Major::kMN>::kOutputs), launch);
}

Status launch_up(const GroupedUpParams& p, const Launch& launch) {
  return p.gate_proj.stride_k == 1 ? launch_dtype<Major::kK>(p, divide_up(p.I, FewRowsTile<Major::kK>::kHalf), launch)
                                   : launch_dtype<Major::kMN>(p, divide_up(p.I, FewRowsTile<Major::kMN>::kHalf), launch);
}

}  // namespace

const Kernel<GroupedMmParams> few_rows_grouped_mm = {nullptr, nullptr, launch_mm};
const Kernel<GroupedUpParams> few_rows_grouped_up = {nullptr, nullptr, launch_up};

}  // namespace moe::cuda
