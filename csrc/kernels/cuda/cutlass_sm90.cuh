// One CUTLASS ptr-array grouped GEMM for sm_90a: TMA loads, wgmma, results rounded once from float32. Problem shapes live on the
// device only, so the grid is that of the whole device and nothing waits for the host.
#pragma once
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cutlass_launch.h"

namespace moe::cuda {

struct Cooperative {  // two warp groups share a tile, two blocks share the tile of B
  using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};
struct Pingpong {  // two warp groups, a tile each, in turns
  using Tile = cute::Shape<cute::_64, cute::_128, cute::_64>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
};

template <class T, class Schedule, class LayoutA, class LayoutB>
struct GroupedGemm {
  using Row = cutlass::layout::RowMajor;
  static constexpr int kAlignment = 8;  // elements: 16 bytes, as TMA needs
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Schedule::Tile, typename Schedule::Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row*, kAlignment, T, Row*, kAlignment,
      typename Schedule::Epilogue, cutlass::epilogue::fusion::LinearCombination<T, float>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, LayoutA*, kAlignment, T, LayoutB*, kAlignment, float, typename Schedule::Tile,
      typename Schedule::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;
  using ProblemShape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // The arrays are filled as 32- and 64-bit integers: gemm_problems.h.
  static_assert(sizeof(typename ProblemShape::UnderlyingProblemShape) == 12);
  static_assert(sizeof(typename Kernel::InternalStrideA) == 8 && sizeof(typename Kernel::InternalStrideB) == 8 &&
                sizeof(typename Kernel::InternalStrideD) == 8);

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

// grouped_mm of one element type.
template <class T>
Sm90Launch pick_grouped_mm(bool cooperative, bool n_major) {
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  if (cooperative) {
    return n_major ? GroupedGemm<T, Cooperative, Row, Row>::launch : GroupedGemm<T, Cooperative, Row, Column>::launch;
  }
  return n_major ? GroupedGemm<T, Pingpong, Row, Row>::launch : GroupedGemm<T, Pingpong, Row, Column>::launch;
}

}  // namespace moe::cuda
