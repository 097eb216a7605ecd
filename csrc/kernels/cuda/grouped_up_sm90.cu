// grouped_up for sm_90a: out = act(x gate^T) * (x up^T) in one kernel, on the gathered grouped GEMM. The epilogue rounds the
// pre-activation to dtype, as grouped_mm does, writes it when it is wanted, applies the activation and writes the output.
#include "../activation.h"
#include "gathered_gemm_sm90.cuh"
#include "grouped_gemm.h"
#include "grouped_up_sm90.h"
#include "pointer_table.h"
#include "store_rows_sm90.cuh"
#include "tensor_maps_sm90.h"

namespace moe::cuda {
namespace {

template <class T, Pairing pairing>
class UpEpilogue {
 public:
  struct Params {
    RowsOut out, pre_act;  // one of them may be absent
    int I;
    ActivationKind kind;
    float alpha, limit;  // the limit is infinite when there is none
    BiasTable gate_bias, up_bias;
  };
  static constexpr int kSharedBytes = RowStore<T>::kSharedBytes;

  __device__ UpEpilogue(const Params& p, uint32_t shared) : p_(p), store_(shared), lane_(threadIdx.x % 32) {}

  // 64 outputs at a time: gate, up and results of more would not fit in registers beside the accumulators.
  __device__ void store(const WarpTile& tile, float (&acc)[kUpColumns / 2]) {
    if (tile.rows == 0) return;
    store_half<0>(tile, acc);
    store_half<1>(tile, acc);
  }

  __device__ void clear(const WarpTile& tile) {
    if (p_.out) store_.clear(p_.out, tile, 0, tile.column_tile * kUpOutputs, kUpOutputs);
    if (!p_.pre_act) return;
    if constexpr (pairing == Pairing::kHalves) {
      for (int part = 0; part < 2; ++part) store_.clear(p_.pre_act, tile, part, tile.column_tile * kUpOutputs, kUpOutputs);
    } else {
      store_.clear(p_.pre_act, tile, 0, tile.column_tile * kUpColumns, kUpColumns);
    }
  }

  __device__ void finish() { store_.finish(); }

 private:
  static constexpr int kGroup = 4;  // pairs that are activated together

  template <int half>
  __device__ void store_half(const WarpTile& tile, float (&acc)[kUpColumns / 2]) {
    uint32_t pairs[kHalfPairs];
    const int output = tile.column_tile * kUpOutputs + half * 64;
    if (p_.gate_bias) add_bias<half>(tile, acc);
#pragma unroll
    for (int i = 0; i < kHalfPairs; ++i) {
      const int at = 2 * accumulator_pair<pairing>(half, i);
      pairs[i] = pack<T>(acc[at], acc[at + 1]);
    }
    if (p_.pre_act) {
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        constexpr bool halves = pairing == Pairing::kHalves;
        store_.put(p_.pre_act, tile, halves ? box : 0, halves ? output : 2 * output + box * 64, pairs, box * 16);
      }
    }
    if (!p_.out) return;
    // In groups, lest the compiler unpack everything ahead of the choice.
#pragma unroll
    for (int i = 0; i < kHalfPairs / 2; i += kGroup) {
      visit_activation(p_.kind, [&](auto k) { activate_pairs<decltype(k)::kind>(pairs, i); });
    }
    store_.put(p_.out, tile, 0, output, pairs, 0);
  }

  template <int half>
  __device__ void add_bias(const WarpTile& tile, float (&acc)[kUpColumns / 2]) const {
    const T *gate = expert_data<T>(p_.gate_bias, tile.expert), *up = expert_data<T>(p_.up_bias, tile.expert);
    const auto at = [&](const T* bias, const BiasTable& table, int output) {
      return output < p_.I ? to_acc(bias[output * static_cast<int>(table.stride_n)]) : 0.0f;
    };
#pragma unroll
    for (int i = 0; i < kHalfPairs; i += 2) {  // two rows, the same columns
      const int output = tile.column_tile * kUpOutputs + half * 64 + output_of_pair<pairing>(lane_, i);
      float first, second;
      if constexpr (pairing == Pairing::kAdjacent) {
        first = at(gate, p_.gate_bias, output), second = at(up, p_.up_bias, output);
      } else if (i < kHalfPairs / 2) {
        first = at(gate, p_.gate_bias, output), second = at(gate, p_.gate_bias, output + 1);
      } else {
        first = at(up, p_.up_bias, output), second = at(up, p_.up_bias, output + 1);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = 2 * accumulator_pair<pairing>(half, i + h);
        acc[k] += first, acc[k + 1] += second;
      }
    }
  }

  template <ActivationKind kind>
  __device__ float activated(float gate, float up) const {
    return gated_value<kind>(gate, up, p_.alpha, p_.limit);
  }

  // Of the first half of the pairs, which become those of the output.
  template <ActivationKind kind>
  __device__ void activate_pairs(uint32_t (&pairs)[kHalfPairs], int first) const {
#pragma unroll
    for (int i = first; i < first + kGroup; ++i) {
      if constexpr (pairing == Pairing::kHalves) {
        const float2 gate = unpack<T>(pairs[i]), up = unpack<T>(pairs[i + kHalfPairs / 2]);
        pairs[i] = pack<T>(activated<kind>(gate.x, up.x), activated<kind>(gate.y, up.y));
      } else {
        const int j = i / 2 * 4 + i % 2;  // of the pairs with outputs 8 (i / 2) + q and, 2 further, 4 more
        const float2 low = unpack<T>(pairs[j]), high = unpack<T>(pairs[j + 2]);
        const uint32_t mine = pack<T>(activated<kind>(low.x, low.y), activated<kind>(high.x, high.y));
        const uint32_t left = __shfl_sync(0xffffffffu, mine, exchange_source(lane_, 0));
        const uint32_t right = __shfl_sync(0xffffffffu, mine, exchange_source(lane_, 1));
        pairs[i] = __byte_perm(left, right, exchange_high(lane_) ? 0x7632 : 0x5410);
      }
    }
  }

  const Params& p_;
  RowStore<T> store_;
  int lane_;
};

template <class T, class Tile, Major major, Pairing pairing>
Status launch_tile(const GroupedUpParams& p, const UpOperands& operands, char* place, const Launch& launch) {
  using Epilogue = UpEpilogue<T, pairing>;
  GatheredGemmParams<Tile, Epilogue> g = {};
  const auto failed = [](Status s) { return s != Status::kOk; };
  if (const Status s = make_matrix_maps(operands.part, 2, p.E, p.dtype, place, launch, g.b.stack, g.b.list); failed(s)) return s;
  g.b.tile_columns = operands.tile_columns;
  g.b.part_columns = operands.part_columns;
  g.a = p.x;
  g.expert_offsets = p.expert_offsets;
  g.S = p.S;
  g.E = p.E;
  g.K = static_cast<int>(p.H);
  auto& e = g.epilogue;
  if (p.out) {
    if (const Status s = make_rows_out(e.out, p.dtype, p.out, p.S, p.I, 1); failed(s)) return s;
  }
  const bool halves = pairing == Pairing::kHalves;
  if (p.pre_act) {
    if (const Status s = make_rows_out(e.pre_act, p.dtype, p.pre_act, p.S, halves ? p.I : 2 * p.I, halves ? 2 : 1); failed(s)) return s;
  }
  e.I = static_cast<int>(p.I);
  e.kind = p.activation.kind;
  e.alpha = static_cast<float>(p.activation.alpha);
  e.limit = p.activation.has_limit ? static_cast<float>(p.activation.limit) : INFINITY;
  e.gate_bias = p.gate_bias;
  e.up_bias = p.up_bias;
  if (const Status s = move_to_device(e.gate_bias, p.E, place, launch); failed(s)) return s;
  if (const Status s = move_to_device(e.up_bias, p.E, place, launch); failed(s)) return s;
  return launch_gathered_gemm<T, Tile, major>(g, 2 * p.I, launch);
}

template <class T, class Tile>
Status launch_layout(const GroupedUpParams& p, const Launch& launch) {
  const UpOperands o = up_operands(p);
  char* place = static_cast<char*>(launch.workspace);
  const bool k_major = o.part[0].major == Major::kK;
  if (o.pairing == Pairing::kHalves) {
    return k_major ? launch_tile<T, Tile, Major::kK, Pairing::kHalves>(p, o, place, launch)
                   : launch_tile<T, Tile, Major::kMN, Pairing::kHalves>(p, o, place, launch);
  }
  return k_major ? launch_tile<T, Tile, Major::kK, Pairing::kAdjacent>(p, o, place, launch)
                 : launch_tile<T, Tile, Major::kMN, Pairing::kAdjacent>(p, o, place, launch);
}

Status supports(const GroupedUpParams& p) {
  const int64_t element = element_size(p.dtype);
  if (element != 2) return Status::kUnsupportedDtype;
  const bool sizes = p.S > 0 && p.H > 0 && p.H % 8 == 0 && p.H < INT32_MAX / 2 && p.I % 8 == 0 && p.I < INT32_MAX / 4;
  const bool aligned = is_aligned(p.x, element) && is_aligned(p.out) && is_aligned(p.pre_act);
  const bool ok = compute_capability() == 90 && p.activation.gated && !p.gate_bias == !p.up_bias && sizes && aligned;
  return ok && up_operands(p).readable ? Status::kOk : Status::kUnsupportedLayout;
}

int64_t workspace(const GroupedUpParams& p, int) {
  const UpOperands o = up_operands(p);
  return matrix_maps_bytes(o.part, 2, p.E) + pointer_table_bytes(p.gate_bias.list, p.E) + pointer_table_bytes(p.up_bias.list, p.E);
}

template <class Tile>
Status launch(const GroupedUpParams& p, const Launch& launch) {
  return p.dtype == DType::kBFloat16 ? launch_layout<__nv_bfloat16, Tile>(p, launch) : launch_layout<__half, Tile>(p, launch);
}

}  // namespace

const Kernel<GroupedUpParams> sm90_up_cooperative = {supports, workspace, launch<UpCooperative>};
const Kernel<GroupedUpParams> sm90_up_pingpong = {supports, workspace, launch<UpPingpong>};

}  // namespace moe::cuda
