// Results of 16 rows of a warp, from accumulators to memory: stmatrix into the warp's part of shared memory, then TMA, or, where an
// expert ends within the 16 rows, 16-byte stores of those that are its own. Boxes are 64 columns wide; two may be under way.
#pragma once
#include "gathered_gemm_sm90.cuh"
#include "tensor_maps_sm90.h"

namespace moe::cuda {

// Rows of `parts` times `columns` elements; box coordinates are a column, a row and a part.
struct RowsOut {
  CUtensorMap map;
  void* data = nullptr;  // null: not wanted
  int64_t columns = 0, stride = 0;
  __device__ explicit operator bool() const { return data; }
};

inline Status make_rows_out(RowsOut& out, DType dtype, void* data, int64_t S, int64_t columns, int parts) {
  out.data = data;
  out.columns = columns;
  out.stride = parts * columns;
  return encode(out.map, dtype, {data, {columns, S, parts}, {out.stride, columns}, 16});
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
}
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(v));
  }
}

template <class T>
class RowStore {
 public:
  static constexpr int kBoxBytes = 16 * kRowBytes, kSharedBytes = 2 * kBoxBytes;

  __device__ explicit RowStore(uint32_t shared) : shared_(shared), lane_(threadIdx.x % 32) {}

  // 64 columns from `column` of part `part`: pairs[first + 2j + h] are a lane's two neighbouring columns of chunk j, row half h.
  template <int kCount>
  __device__ void put(const RowsOut& out, const WarpTile& tile, int part, int column, const uint32_t (&pairs)[kCount], int first) {
    if (column >= out.columns) return;
    const uint32_t box = shared_ + next_ * kBoxBytes;
    next_ ^= 1;
    if (lane_ == 0) sm90::wait_for_reads<1>();  // the box before the last was this one
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const ChunkIndex at = stmatrix_chunk(lane_, j);
      const int i = first + 2 * j;
      sm90::store_matrices(box + swizzled(at.row, at.chunk), pairs[i], pairs[i + 1], pairs[i + 2], pairs[i + 3]);
    }
    if (tile.rows == 16) {
      sm90::fence_async();
      __syncwarp();
      if (lane_ == 0) sm90::store_box(&out.map, box, column, tile.begin, part);
    } else {
      __syncwarp();
#pragma unroll 1  // seldom run
      for (int i = lane_; i < tile.rows * 8; i += 32) {
        const int row = i / 8, chunk = i % 8;
        if (column + chunk * kChunkElements < out.columns)
          *place(out, tile.begin + row, part, column + chunk * kChunkElements) = sm90::load_shared_16(box + swizzled(row, chunk));
      }
    }
    if (lane_ == 0) sm90::commit_stores();  // an empty group too: wait_for_reads counts them
  }

  __device__ void clear(const RowsOut& out, const WarpTile& tile, int part, int column, int columns) const {
    const int chunks = columns / kChunkElements;
#pragma unroll 1
    for (int i = lane_; i < tile.rows * chunks; i += 32) {
      const int c = column + i % chunks * kChunkElements;
      if (c < out.columns) *place(out, tile.begin + i / chunks, part, c) = uint4{};
    }
  }

  __device__ void finish() const {
    if (lane_ == 0) sm90::wait_for_stores();
  }

 private:
  __device__ static uint4* place(const RowsOut& out, int64_t row, int part, int column) {
    return reinterpret_cast<uint4*>(static_cast<T*>(out.data) + row * out.stride + part * out.columns + column);
  }

  uint32_t shared_;
  int lane_, next_ = 0;
};

}  // namespace moe::cuda
