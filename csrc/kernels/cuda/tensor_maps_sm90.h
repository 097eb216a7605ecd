// Tensor maps, with which TMA finds its boxes. Those of arrays and stacks are encoded on the host and travel as kernel arguments; those
// of a list of matrices, one per expert, are written to the workspace by a kernel: copies of one map with the address replaced.
#pragma once
#include <cuda.h>

#include "gathered_gemm_sm90.h"

namespace moe::cuda {

constexpr int64_t kMapBytes = sizeof(CUtensorMap);

// An array of 16-bit elements in up to three dimensions, the first contiguous; strides of the others count elements. Boxes have rows
// of 64 elements, or 32, and are swizzled over as many bytes; what of a box lies outside is read as zero and not written.
struct BoxedArray {
  const void* data = nullptr;
  int64_t size[3] = {0, 0, 1}, stride[2] = {0, 0};
  int box_rows = 0, box_columns = kRowBytes / 2, box_parts = 1;
};
Status encode(CUtensorMap& map, DType dtype, const BoxedArray& array);

// Maps of the matrices that make up an operand, `count` parts of each expert: `stack` gets one per part, for all experts; of lists it
// is then a pattern, and `list` becomes where part p of expert e has map count * e + p (null for stacks). Moves `place` in the
// workspace past what it uses, which is matrix_maps_bytes.
int64_t matrix_maps_bytes(const MatrixView* parts, int count, int64_t E);
Status make_matrix_maps(const MatrixView* parts, int count, int64_t E, DType dtype, char*& place, const Launch& launch, CUtensorMap* stack,
                        const CUtensorMap*& list);

}  // namespace moe::cuda
