// The grouped GEMMs of sm_100a for bfloat16: CUTLASS' ptr-array kernel on tcgen05, arrays as in cutlass_launch.h. Built only when 10.0a
// is among the architectures asked for. It compiles and has never run on a device, so no line of grouped_mm_config.h chooses it:
// devices of capability 10.x run the mma.sync kernels.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cutlass_launch.h"

namespace moe::cuda {
namespace {

using Row = cutlass::layout::RowMajor;
using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
constexpr int kAlignment = 8;  // elements: 16 bytes, as TMA needs

template <class T, class LayoutB>
struct GroupedGemmSm100 {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float,
      void, Row*, kAlignment, T, Row*, kAlignment, cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm,
      cutlass::epilogue::fusion::LinearCombination<T, float>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp, T, Row*, kAlignment, T, LayoutB*, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmSm100>::CollectiveOp;
  using ProblemShape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static Status launch(const GemmArrays& arrays, void* stream) {
    typename Gemm::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    arguments.problem_shape = {arrays.experts, static_cast<typename ProblemShape::UnderlyingProblemShape*>(arrays.shapes), nullptr};
    arguments.mainloop.ptr_A = static_cast<const T**>(arrays.a);
    arguments.mainloop.dA = static_cast<typename Kernel::InternalStrideA*>(arrays.ld_a);
    arguments.mainloop.ptr_B = static_cast<const T**>(arrays.b);
    arguments.mainloop.dB = static_cast<typename Kernel::InternalStrideB*>(arrays.ld_b);
    arguments.epilogue.thread.alpha = 1.0f;
    arguments.epilogue.thread.beta = 0.0f;
    arguments.epilogue.dC = static_cast<typename Kernel::InternalStrideD*>(arrays.ld_d);
    arguments.epilogue.ptr_D = static_cast<T**>(arrays.d);
    arguments.epilogue.dD = static_cast<typename Kernel::InternalStrideD*>(arrays.ld_d);
    arguments.hw_info.sm_count = arrays.multiprocessors;
    arguments.hw_info.cluster_shape = arguments.hw_info.cluster_shape_fallback = dim3(1, 1, 1);
    Gemm gemm;
    const int64_t available = kTensorMapBytesPerSm * arrays.multiprocessors;
    if (static_cast<int64_t>(Gemm::get_workspace_size(arguments)) > available) return Status::kLaunchFailed;
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (gemm.initialize(arguments, arrays.tensor_maps, on) == cutlass::Status::kSuccess && gemm.run(on) == cutlass::Status::kSuccess) {
      return Status::kOk;
    }
    cudaGetLastError();  // taken, or the next launch, of whatever, would report it
    return Status::kLaunchFailed;
  }
};

}  // namespace

Sm90Launch sm100_grouped_mm_bf16(bool n_major) {
  using T = cutlass::bfloat16_t;
  return n_major ? GroupedGemmSm100<T, Row>::launch : GroupedGemmSm100<T, cutlass::layout::ColumnMajor>::launch;
}

}  // namespace moe::cuda
