// From the DType in a parameter struct to a C++ element type: visit_dtype<Types>(dtype, f) calls f(Type<T>{}), so that
//   visit_dtype<Types>(p.dtype, [&](auto type) { using T = typename decltype(type)::type; return run<T>(p); })
// runs the right instantiation. Types names one device's element types: Float64, Float32, BFloat16, Float16.
#pragma once
#include "types.h"

namespace moe {

template <class T>
struct Type {
  using type = T;
};

template <class Types, class F>
Status visit_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(Type<typename Types::Float64>{});
    case DType::kFloat32:
      return f(Type<typename Types::Float32>{});
    case DType::kBFloat16:
      return f(Type<typename Types::BFloat16>{});
    case DType::kFloat16:
      return f(Type<typename Types::Float16>{});
  }
  return Status::kUnsupportedDtype;
}

}  // namespace moe
