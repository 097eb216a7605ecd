// The sm_90a kernels of grouped_mm_wgrad: k runs over the rows of an expert, and both operands are read as they lie, with k as
// the slow dimension.
#include "cutlass_sm90.cuh"

namespace moe::cuda {

Sm90Launch sm90_wgrad(DType dtype) {
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  return dtype == DType::kBFloat16 ? GroupedGemm<cutlass::bfloat16_t, Cooperative, Column, Row>::launch
                                   : GroupedGemm<cutlass::half_t, Cooperative, Column, Row>::launch;
}

}  // namespace moe::cuda
