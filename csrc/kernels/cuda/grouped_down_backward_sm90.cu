// grouped_down_backward for sm_90a, on the gathered grouped GEMM. With acc = grad[r] @ down_proj[e], h the activation of the row's gate
// and up, and w its routing weight, the epilogue writes what is wanted of
//   grad_pre = w acc dh (rounded once),  scaled = w h,  partials[r, tile] = <acc, h> over the tile's columns
// and a second kernel adds the partials of each row in order: grad_slot_weights. Slots without a row are left as the caller cleared them.
#include "../activation.h"
#include "gathered_gemm_sm90.cuh"
#include "grouped_down_backward_sm90.h"
#include "grouped_gemm.h"
#include "mma_tile.cuh"
#include "pointer_table.h"
#include "store_rows_sm90.cuh"
#include "tensor_maps_sm90.h"

namespace moe::cuda {
namespace {

using Tile = DownBackwardTile;

// In shared memory a warp has kPreBoxes boxes of pre-activations and one of 64 columns of `scaled`. While step n is computed, the box of
// n + 1 is being filled by cp.async and TMA may still read that of n - 1, which then is filled for n + 2. The boxes of a tile's first
// two steps are filled while its products are under way.
template <class T>
class DownBackwardEpilogue {
 public:
  struct Params {
    CUtensorMap grad_pre_map;
    RowsOut scaled;
    const T* pre_act;
    T* grad_pre;  // null: not wanted
    const int32_t* row_to_slot;
    const float* slot_weights;
    float* partials;  // [S, column_tiles], or null
    int I, column_tiles;
    ActivationKind kind;
    bool interleaved;
    float alpha, limit;  // the limit is infinite when there is none
  };
  static constexpr int kSharedBytes = (kPreBoxes + 1) * kPreBoxBytes;

  __device__ DownBackwardEpilogue(const Params& p, uint32_t shared) : p_(p), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ void begin(const WarpTile& tile) {
    rows_[tile.block] = tile.rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane_ / 4 + 8 * h;
      weights_[tile.block][h] = p_.slot_weights && row < tile.rows ? p_.slot_weights[p_.row_to_slot[tile.begin + row]] : 1.0f;
    }
    if (tile.block > 0) return;
    // These two boxes were given back in the last step of the tile before.
    const int output = tile.column_tile * Tile::kN;
    load(box_, tile.begin, tile.rows, output);
    load(following(box_), tile.begin, tile.rows, output + kStepOutputs);
  }

  __device__ void store(const WarpTile& tile, float (&acc)[Tile::kN / 2]) {
    if (tile.rows == 0) return;
    // What follows from these is computed anew, or it would be kept in registers beside the accumulators.
    asm volatile("" : "+r"(lane_), "+r"(shared_));
    __builtin_assume(lane_ >= 0 && lane_ < 32);
    float dot[2] = {};
    step<0>(tile, acc, dot);
    step<1>(tile, acc, dot);
    step<2>(tile, acc, dot);
    step<3>(tile, acc, dot);
    if (!p_.partials) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      for (int delta = 1; delta < 4; delta *= 2) dot[h] += __shfl_xor_sync(0xffffffffu, dot[h], delta);
      const int row = lane_ / 4 + 8 * h;
      if (lane_ % 4 == 0 && row < tile.rows) p_.partials[int64_t{tile.begin + row} * p_.column_tiles + tile.column_tile] = dot[h];
    }
  }

  __device__ void clear(const WarpTile& tile) const {
#pragma unroll 1
    for (int first = 0; p_.grad_pre && first < Tile::kN; first += kStepOutputs) {
      for_each_chunk(tile, tile.column_tile * Tile::kN + first, [&](uint4* place, uint32_t) { *place = uint4{}; });
    }
#pragma unroll 1
    for (int first = 0; p_.scaled && first < Tile::kN; first += 2 * kStepOutputs) {
      for_each_scaled(tile, tile.column_tile * Tile::kN + first, [&](uint4* place, uint32_t) { *place = uint4{}; });
    }
  }

  __device__ void finish() const {
    if (lane_ == 0) sm90::wait_for_stores();
  }

 private:
  static constexpr int kGroup = 4;  // pairs that are computed together: 16 outputs

  __device__ static int following(int box) { return box == kPreBoxes - 1 ? 0 : box + 1; }
  __device__ uint32_t pre_box(int box) const { return shared_ + box * kPreBoxBytes; }
  __device__ uint32_t scaled_box() const { return pre_box(kPreBoxes); }

  // After this, boxes that were handed to TMA, or read by the warp, may be written again.
  __device__ void reuse_boxes() const {
    if (lane_ == 0) sm90::wait_for_reads<0>();
    __syncwarp();
  }

  // Outputs [output, output + 32) of 16 rows; zeros for what does not exist: their results count in the sums of `partials`.
  __device__ void load(int box, int begin, int rows, int output) const {
    if (output < p_.I && rows > 0) {
      const uint32_t to = pre_box(box);
      p_.interleaved ? load_chunks<true>(to, begin, rows, output) : load_chunks<false>(to, begin, rows, output);
    }
    commit_copies();  // an empty group too: wait_for_copies counts them
  }

  template <bool kInterleaved>
  __device__ void load_chunks(uint32_t to, int begin, int rows, int output) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const ChunkIndex at = pre_copy(kInterleaved, lane_, i);
      const int column = pre_column(kInterleaved, output, at.chunk, p_.I);
      const bool exists = at.row < rows && column >= 0;
      const T* source = p_.pre_act + int64_t{begin + at.row} * (2 * p_.I) + column;
      copy_async(to + pre_place(kInterleaved, at.row, at.chunk), exists ? source : p_.pre_act, exists ? 16 : 0);
    }
  }

  template <int kStep>
  __device__ void step(const WarpTile& tile, float (&acc)[Tile::kN / 2], float (&dot)[2]) {
    const int output = tile.column_tile * Tile::kN + kStep * kStepOutputs;
    uint32_t scaled[2 * kGroup];
    wait_for_copies<1>();
    __syncwarp();
    if (output < p_.I) {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        uint32_t gate[kGroup], up[kGroup];
        read(gate, up, g);
        visit_activation(p_.kind, [&](auto k) {
          differentiate<decltype(k)::kind>(gate, up, scaled, g * kGroup, acc, 16 * kStep + 8 * g, weights_[tile.block], dot);
        });
        if (p_.grad_pre) write(gate, up, g);
      }
    }
    reuse_boxes();
    const int ahead = tile.block * kSteps + kStep + 2;
    const int to = following(following(box_)), output_ahead = tile.column_tile * Tile::kN + ahead % kSteps * kStepOutputs;
    if (ahead < kSteps * Tile::kProducts) {
      const int blocks = ahead / kSteps - tile.block;
      load(to, tile.begin + 64 * blocks, rows_[ahead / kSteps], output_ahead);
    } else {
      commit_copies();
    }
    put<kStep>(tile, output, scaled);
    box_ = following(box_);
  }

  __device__ uint32_t pair_place(int i, int group) const {
    const PairPlace at = interleaved_pair(lane_, i);
    return pre_box(box_) + pre_place(true, at.row, 4 * group + at.chunk) + at.byte;
  }
  __device__ uint32_t matrix_place(int group) const {
    const ChunkIndex at = stmatrix_chunk(lane_, 2 * group);
    return pre_box(box_) + pre_place(false, at.row, at.chunk);
  }

  __device__ void read(uint32_t (&gate)[kGroup], uint32_t (&up)[kGroup], int group) const {
    if (p_.interleaved) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const uint2 v = sm90::load_shared_8(pair_place(i, group));
        gate[i] = __byte_perm(v.x, v.y, 0x5410);
        up[i] = __byte_perm(v.x, v.y, 0x7632);
      }
    } else {
      load_matrices<Major::kK>(gate, matrix_place(group));
      load_matrices<Major::kK>(up, matrix_place(group) + kPreBoxBytes / 2);
    }
  }
  __device__ void write(const uint32_t (&gate)[kGroup], const uint32_t (&up)[kGroup], int group) const {
    if (p_.interleaved) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        sm90::store_shared_8(pair_place(i, group), {__byte_perm(gate[i], up[i], 0x5410), __byte_perm(gate[i], up[i], 0x7632)});
      }
    } else {
      sm90::store_matrices(matrix_place(group), gate[0], gate[1], gate[2], gate[3]);
      sm90::store_matrices(matrix_place(group) + kPreBoxBytes / 2, up[0], up[1], up[2], up[3]);
    }
  }

  // gate and up become their gradients.
  template <ActivationKind kind>
  __device__ void differentiate(uint32_t (&gate)[kGroup], uint32_t (&up)[kGroup], uint32_t (&scaled)[2 * kGroup], int first,
                                const float (&acc)[Tile::kN / 2], int first_acc, const float (&weight)[2], float (&dot)[2]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float w = weight[i % 2], low = acc[first_acc + 2 * i], high = acc[first_acc + 2 * i + 1];
      const float2 g = unpack<T>(gate[i]), u = unpack<T>(up[i]);
      const GatedGradient<float> x = gated_gradient<kind>(g.x, u.x, p_.alpha, p_.limit);
      const GatedGradient<float> y = gated_gradient<kind>(g.y, u.y, p_.alpha, p_.limit);
      gate[i] = pack<T>(w * low * x.d_gate, w * high * y.d_gate);
      up[i] = pack<T>(w * low * x.d_up, w * high * y.d_up);
      scaled[first + i] = pack<T>(w * x.value, w * y.value);
      dot[i % 2] += low * x.value;
      dot[i % 2] += high * y.value;
    }
  }

  // The step's results to memory; `scaled` after every second step.
  template <int kStep>
  __device__ void put(const WarpTile& tile, int output, const uint32_t (&scaled)[2 * kGroup]) const {
    constexpr int kSide = kStep % 2;
    const int scaled_column = output - kSide * kStepOutputs;
    if (p_.scaled && output < p_.I) {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const ChunkIndex at = stmatrix_chunk(lane_, 4 * kSide + 2 * g);
        const int i = g * kGroup;
        sm90::store_matrices(scaled_box() + swizzled(at.row, at.chunk), scaled[i], scaled[i + 1], scaled[i + 2], scaled[i + 3]);
      }
    }
    const bool put_pre = p_.grad_pre && output < p_.I, put_scaled = p_.scaled && kSide == 1 && scaled_column < p_.I;
    if (tile.rows == 16) {
      sm90::fence_async();
      __syncwarp();
      if (lane_ == 0 && put_pre) sm90::store_box(&p_.grad_pre_map, pre_box(box_), p_.interleaved ? 2 * output : output, tile.begin, 0);
      if (lane_ == 0 && put_scaled) sm90::store_box(&p_.scaled.map, scaled_box(), scaled_column, tile.begin, 0);
    } else {
      const auto copy = [](uint4* place, uint32_t shared) { *place = sm90::load_shared_16(shared); };
      __syncwarp();
      if (put_pre) for_each_chunk(tile, output, copy);
      if (put_scaled) for_each_scaled(tile, scaled_column, copy);
    }
    if (lane_ == 0) sm90::commit_stores();
  }

  // f(place in grad_pre, or scaled; place in shared memory) for the chunks of the tile's rows that exist.
  template <class F>
  __device__ void for_each_chunk(const WarpTile& tile, int output, const F& f) const {
    const int chunk = lane_ % 8, column = pre_column(p_.interleaved, output, chunk, p_.I);
#pragma unroll 1
    for (int row = lane_ / 8; row < tile.rows && column >= 0; row += 4) {
      f(reinterpret_cast<uint4*>(p_.grad_pre + int64_t{tile.begin + row} * (2 * p_.I) + column),
        pre_box(box_) + pre_place(p_.interleaved, row, chunk));
    }
  }
  template <class F>
  __device__ void for_each_scaled(const WarpTile& tile, int column, const F& f) const {
    const int chunk = lane_ % 8, mine = column + chunk * kChunkElements;
#pragma unroll 1
    for (int row = lane_ / 8; row < tile.rows && mine < p_.I; row += 4) {
      f(reinterpret_cast<uint4*>(static_cast<T*>(p_.scaled.data) + int64_t{tile.begin + row} * p_.I + mine),
        scaled_box() + swizzled(row, chunk));
    }
  }

  const Params& p_;
  uint32_t shared_;
  int lane_, box_ = 0;  // of the next step
  int rows_[Tile::kProducts];
  float weights_[Tile::kProducts][2];  // of rows lane / 4 and lane / 4 + 8 of each block
};

// A warp per row.
template <class T>
__global__ void __launch_bounds__(kThreads) slot_weights_kernel(GatedActivationBackwardParams p, const float* partials, int column_tiles) {
  const int64_t r = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (r >= p.expert_offsets[p.E]) return;
  float sum = 0;
  for (int c = lane; c < column_tiles; c += 32) sum += partials[r * column_tiles + c];
  if (p.down_bias) {
    int64_t expert = 0;
    for (int64_t end = p.E; end - expert > 1;) {
      const int64_t middle = (expert + end) / 2;
      (p.expert_offsets[middle] <= r ? expert : end) = middle;
    }
    const auto* grad = reinterpret_cast<const uint4*>(row_of<T>(p.grad_out, r));
    const auto* bias = reinterpret_cast<const uint4*>(expert_data<T>(p.down_bias, expert));
    for (int64_t i = lane; i < p.H / kChunkElements; i += 32) {
      const uint4 g = grad[i], b = bias[i];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 x = unpack<T>((&g.x)[k]), y = unpack<T>((&b.x)[k]);
        sum += x.x * y.x;
        sum += x.y * y.y;
      }
    }
  }
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
  if (lane == 0) static_cast<float*>(p.grad_slot_weights)[p.row_to_slot[r]] = sum;
}

MatrixView view_of(const GroupedDownBackwardParams& p) { return matrix_view(p.down_proj, p.through.E, p.through.I, p.through.H); }
int64_t tiles_of(const GatedActivationBackwardParams& a) { return divide_up(a.I, Tile::kN); }
int64_t partials_bytes(const GatedActivationBackwardParams& a) {
  return a.grad_slot_weights ? round_up(a.S * tiles_of(a) * int64_t{sizeof(float)}, 64) : 0;
}

// In halves a box is 32 columns of gate and of up, interleaved the 64 of both.
Status make_grad_pre_map(CUtensorMap& map, const GatedActivationBackwardParams& a) {
  const int64_t width = 2 * a.I;
  if (a.activation.interleaved) return encode(map, a.dtype, {a.grad_pre, {width, a.S, 1}, {width, width}, 16, 2 * kStepOutputs, 1});
  return encode(map, a.dtype, {a.grad_pre, {a.I, a.S, 2}, {width, a.I}, 16, kStepOutputs, 2});
}

template <class T, Major major>
Status launch_product(const GroupedDownBackwardParams& p, float* partials, char* place, const Launch& launch) {
  const GatedActivationBackwardParams& a = p.through;
  GatheredGemmParams<Tile, DownBackwardEpilogue<T>> g = {};
  const auto failed = [](Status s) { return s != Status::kOk; };
  const MatrixView view = view_of(p);
  if (const Status s = make_matrix_maps(&view, 1, a.E, a.dtype, place, launch, g.b.stack, g.b.list); failed(s)) return s;
  g.b.tile_columns = Tile::kN;
  g.a = p.grad;
  g.expert_offsets = a.expert_offsets;
  g.S = a.S;
  g.E = a.E;
  g.K = static_cast<int>(a.H);
  auto& e = g.epilogue;
  if (a.grad_pre) {
    if (const Status s = make_grad_pre_map(e.grad_pre_map, a); failed(s)) return s;
  }
  if (a.scaled) {
    if (const Status s = make_rows_out(e.scaled, a.dtype, a.scaled, a.S, a.I, 1); failed(s)) return s;
  }
  e.pre_act = static_cast<const T*>(a.pre_act);
  e.grad_pre = static_cast<T*>(a.grad_pre);
  e.row_to_slot = a.row_to_slot;
  e.slot_weights = static_cast<const float*>(a.slot_weights);
  e.partials = partials;
  e.I = static_cast<int>(a.I);
  e.column_tiles = static_cast<int>(tiles_of(a));
  e.kind = a.activation.kind;
  e.interleaved = a.activation.interleaved;
  e.alpha = static_cast<float>(a.activation.alpha);
  e.limit = a.activation.has_limit ? static_cast<float>(a.activation.limit) : INFINITY;
  return launch_gathered_gemm<T, Tile, major>(g, a.I, launch);
}

template <class T>
Status launch_type(const GroupedDownBackwardParams& p, const Launch& launch) {
  GatedActivationBackwardParams a = p.through;
  char* place = static_cast<char*>(launch.workspace);
  if (!a.grad_slot_weights) a.down_bias = {};
  if (const Status s = move_to_device(a.down_bias, a.E, place, launch); s != Status::kOk) return s;
  float* const partials = a.grad_slot_weights ? reinterpret_cast<float*>(place) : nullptr;
  place += partials_bytes(a);
  const Status status = view_of(p).major == Major::kK ? launch_product<T, Major::kK>(p, partials, place, launch)
                                                      : launch_product<T, Major::kMN>(p, partials, place, launch);
  if (status != Status::kOk || !partials) return status;
  slot_weights_kernel<T><<<static_cast<unsigned>(divide_up(a.S, kWarps)), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(
      a, partials, static_cast<int>(tiles_of(a)));
  return launched();
}

int64_t workspace(const GroupedDownBackwardParams& p, int) {
  const MatrixView view = view_of(p);
  const GatedActivationBackwardParams& a = p.through;
  return pointer_table_bytes(a.grad_slot_weights ? a.down_bias.list : nullptr, a.E) + partials_bytes(a) + matrix_maps_bytes(&view, 1, a.E);
}

Status launch(const GroupedDownBackwardParams& p, const Launch& launch) {
  return p.through.dtype == DType::kBFloat16 ? launch_type<__nv_bfloat16>(p, launch) : launch_type<__half>(p, launch);
}

}  // namespace

const Kernel<GroupedDownBackwardParams> sm90_down_backward = {nullptr, workspace, launch};

}  // namespace moe::cuda
