// See tensor_maps_sm90.h. libcuda is not linked: the one function of it that is needed is asked for at run time.
#include "element.cuh"
#include "pointer_table.h"
#include "sm90_instructions.cuh"
#include "tensor_maps_sm90.h"

namespace moe::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return accepted(error) == Status::kOk && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

// A warp per map.
__global__ void __launch_bounds__(32)
    list_kernel(const __grid_constant__ CUtensorMap pattern, const void* const* list, CUtensorMap* maps, int step) {
  __shared__ __align__(128) CUtensorMap map;
  reinterpret_cast<uint32_t*>(&map)[threadIdx.x] = reinterpret_cast<const uint32_t*>(&pattern)[threadIdx.x];
  __syncwarp();
  if (threadIdx.x == 0) sm90::replace_address(sm90::shared_address(&map), list[blockIdx.x]);
  __syncwarp();
  sm90::publish_map(maps + static_cast<int64_t>(step) * blockIdx.x, sm90::shared_address(&map));
}

BoxedArray array_of(const MatrixView& v, int64_t E) {
  BoxedArray a{v.list ? v.list[0] : v.base, {v.inner, v.outer, v.list ? 1 : E}, {v.stride, v.stride_e}};
  a.box_rows = v.major == Major::kK ? 128 : kDepth;
  return a;
}

}  // namespace

Status encode(CUtensorMap& map, DType dtype, const BoxedArray& a) {
  const auto type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint64_t sizes[3], strides[2];
  for (int i = 0; i < 3; ++i) sizes[i] = static_cast<cuuint64_t>(a.size[i]);
  for (int i = 0; i < 2; ++i) strides[i] = static_cast<cuuint64_t>(a.stride[i]) * 2;
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(a.box_columns), static_cast<cuuint32_t>(a.box_rows),
                             static_cast<cuuint32_t>(a.box_parts)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const auto swizzle = a.box_columns * 2 == kRowBytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const Encode function = find_encode();
  if (!function) return Status::kLaunchFailed;
  const CUresult result = function(&map, type, 3, const_cast<void*>(a.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? Status::kOk : Status::kLaunchFailed;
}

int64_t matrix_maps_bytes(const MatrixView* parts, int count, int64_t E) {
  if (!parts[0].list) return 0;
  return count * (pointer_table_bytes(parts[0].list, E) + E * kMapBytes) + kMapBytes;  // the last: maps begin at a multiple of their size
}

Status make_matrix_maps(const MatrixView* parts, int count, int64_t E, DType dtype, char*& place, const Launch& launch, CUtensorMap* stack,
                        const CUtensorMap*& list) {
  for (int p = 0; p < count; ++p) {
    if (const Status s = encode(stack[p], dtype, array_of(parts[p], E)); s != Status::kOk) return s;
  }
  list = nullptr;
  if (!parts[0].list) return Status::kOk;
  char* const tables = place;
  const int64_t table_bytes = pointer_table_bytes(parts[0].list, E);
  char* const after_tables = tables + count * table_bytes;
  auto* const maps =
      reinterpret_cast<CUtensorMap*>(after_tables + (kMapBytes - reinterpret_cast<uintptr_t>(after_tables) % kMapBytes) % kMapBytes);
  place += matrix_maps_bytes(parts, count, E);
  for (int p = 0; p < count; ++p) {
    char* const table = tables + p * table_bytes;
    if (const Status s = upload_pointers(parts[p].list, E, table, launch); s != Status::kOk) return s;
    list_kernel<<<static_cast<unsigned>(E), 32, 0, static_cast<cudaStream_t>(launch.stream)>>>(
        stack[p], reinterpret_cast<const void* const*>(table), maps + p, count);
  }
  list = maps;
  return launched();
}

}  // namespace moe::cuda
