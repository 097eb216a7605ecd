// From tensors to the fields of params.h. Whatever these structs point into is kept alive by the caller's tensors or by `keep`.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace moe::ops {

using torch::headeronly::ScalarType;

inline ScalarType scalar_type(DType t) {
  switch (t) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    default:
      return ScalarType::Half;
  }
}

// Ends with torch's own error for so many elements that could not be allocated where `like` is.
[[noreturn]] void fail_allocation(const Tensor& like, double elements);

// f(), which allocates so many elements.
template <class F>
Tensor allocating(const Tensor& like, double elements, const F& f) {
  try {
    return f();
  } catch (const std::exception&) {  // says only that a call failed
    fail_allocation(like, elements);
  }
}

inline double numel(std::initializer_list<int64_t> sizes) {
  double n = 1;
  for (int64_t size : sizes) n *= static_cast<double>(size);
  return n;
}

// The only functions of this folder that allocate.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.begin(), sizes.size());
  return allocating(like, numel(sizes), [&] { return torch::stable::new_empty(like, shape, type); });
}
inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.begin(), sizes.size());
  return allocating(like, numel(sizes), [&] { return torch::stable::new_zeros(like, shape, type); });
}
inline Tensor as_contiguous(const Tensor& t) {
  return allocating(t, static_cast<double>(t.numel()), [&] { return torch::stable::contiguous(t); });
}
inline Tensor as_dtype(const Tensor& t, ScalarType type) {
  return allocating(t, static_cast<double>(t.numel()), [&] { return torch::stable::to(t, type); });
}

// [rows, n] with contiguous columns: as it is when that holds, else a copy. A one-row tensor may carry any row stride.
inline Tensor row_major(const Tensor& t) { return t.size(1) == 1 || t.stride(1) == 1 ? t : as_contiguous(t); }
inline int64_t row_stride(const Tensor& t) { return t.size(0) <= 1 ? t.size(1) : t.stride(0); }

inline Rows rows(const Tensor& t) { return {t.data_ptr(), row_stride(t), nullptr, 1}; }
inline Rows gathered(const Tensor& t, const Tensor& row_to_slot, int64_t top_k) {
  return {t.data_ptr(), row_stride(t), static_cast<const int32_t*>(row_to_slot.data_ptr()), static_cast<int32_t>(top_k)};
}
inline const int32_t* int32_ptr(const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); }
inline const void* data_or_null(const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; }

// Routing weights as kernels read them: contiguous, in the accumulator's dtype.
inline Tensor slot_weights(const Tensor& top_k_weights, DType dtype) {
  const ScalarType wanted = scalar_type(accumulator(dtype));
  Tensor w = top_k_weights.scalar_type() == wanted ? top_k_weights : as_dtype(top_k_weights, wanted);
  return w.is_contiguous() ? w : as_contiguous(w);
}

// E weight matrices of N outputs x K inputs, stacked or listed; strides as found, copied only when neither is 1.
struct Weights {
  TensorList keep;
  std::vector<const void*> pointers;
  WeightTable table;
  int64_t E = 0, N = 0, K = 0;

  Weights(const Tensor& stacked, bool transposed) {
    const bool readable = stacked.stride(1) == 1 || stacked.stride(2) == 1 || stacked.size(1) == 1 || stacked.size(2) == 1;
    const Tensor w = readable ? stacked : as_contiguous(stacked);
    keep.push_back(w);
    table.base = w.data_ptr();
    table.stride_e = w.stride(0);
    set_strides(w, 1, transposed);
    E = w.size(0);
  }

  // All matrices share one pair of strides; if they do not, every one is made contiguous.
  Weights(const TensorList& list, bool transposed) {
    bool uniform = true;
    for (const Tensor& w : list)
      uniform &= w.stride(0) == list[0].stride(0) && w.stride(1) == list[0].stride(1) && (w.stride(0) == 1 || w.stride(1) == 1);
    for (const Tensor& w : list) keep.push_back(uniform ? w : as_contiguous(w));
    for (const Tensor& w : keep) pointers.push_back(w.data_ptr());
    table.list = pointers.data();
    set_strides(keep[0], 0, transposed);
    E = static_cast<int64_t>(list.size());
  }

  Weights(Weights&&) = default;
  Weights(const Weights&) = delete;

  // The same matrices read as K outputs x N inputs, for the gradient of the input.
  WeightTable swapped() const {
    WeightTable t = table;
    std::swap(t.stride_n, t.stride_k);
    return t;
  }

 private:
  void set_strides(const Tensor& w, int64_t first, bool transposed) {
    const int64_t n = first + (transposed ? 1 : 0), k = first + (transposed ? 0 : 1);
    N = w.size(n);
    K = w.size(k);
    table.stride_n = w.stride(n);
    table.stride_k = w.stride(k);
    // A dimension of size 1 may carry any stride: give it one that makes the matrix contiguous in one direction.
    if (K == 1) table.stride_k = table.stride_n == 1 ? N : 1;
    if (N == 1) table.stride_n = table.stride_k == 1 ? K : 1;
  }
};

// E bias vectors, stacked [E, N], listed, or absent.
struct Biases {
  TensorList keep;
  std::vector<const void*> pointers;
  BiasTable table;

  Biases() = default;
  explicit Biases(const OptionalTensor& stacked) {
    if (!stacked) return;
    keep.push_back(row_major(*stacked));
    table.base = keep[0].data_ptr();
    table.stride_e = row_stride(keep[0]);
  }
  explicit Biases(const OptionalTensorList& list) {
    if (!list) return;
    for (const Tensor& b : *list) keep.push_back(b.is_contiguous() ? b : as_contiguous(b));
    for (const Tensor& b : keep) pointers.push_back(b.data_ptr());
    table.list = pointers.data();
  }
  Biases(Biases&&) = default;
  Biases(const Biases&) = delete;
};

// E output matrices [M, N] for gradients: one stacked tensor, or one tensor per expert.
struct Outputs {
  TensorList tensors;
  std::vector<void*> pointers;
  OutputTable table;

  Outputs(const Tensor& like, int64_t E, int64_t M, int64_t N, bool listed) {
    table.stride = N;
    if (listed) {
      for (int64_t e = 0; e < E; ++e) tensors.push_back(empty(like, {M, N}, like.scalar_type()));
      for (const Tensor& t : tensors) pointers.push_back(t.data_ptr());
      table.list = pointers.data();
    } else {
      tensors.push_back(empty(like, {E, M, N}, like.scalar_type()));
      table.base = tensors[0].data_ptr();
      table.stride_e = M * N;
    }
  }
};

}  // namespace moe::ops
