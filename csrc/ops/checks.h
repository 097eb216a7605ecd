// Checks that end with the values in them. They run before anything is allocated or launched.
#pragma once
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "../kernels/params.h"
#include "ops.h"

namespace moe::ops {

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << (std::strcmp(op, "grouped_forward") ? "moe_ext::" : "moe::") << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail(op, parts...);
}

std::string shape(const Tensor& t);                                    // "[5, 8]"
std::string dtype_name(const Tensor& t);                               // "bfloat16", "int64", ...
DType float_dtype(const char* op, const Tensor& t, const char* what);  // or an error that names what is accepted
void check_shape(const char* op, const Tensor& t, const char* what, std::initializer_list<int64_t> expected);   // -1 = any size
void check_like(const char* op, const Tensor& t, const char* what, const Tensor& like, const char* like_what);  // dtype and device
void check_device(const char* op, const Tensor& t, const char* what, const Tensor& like, const char* like_what);
void check_int32(const char* op, const Tensor& t, const char* what, int64_t size, const Tensor& like);  // contiguous int32 [size]

// What kernels on the CPU index memory with, entry by entry; after check_int32. Nothing is read where kernels run on a device: the host
// would have to wait for it, and kernels there keep inside the tensors by themselves.
// expert_offsets [E+1]: from 0, never falling, at most S.
void check_offsets(const char* op, const Tensor& expert_offsets, int64_t S);
// A map to rows or slots of [0, size), or -1 where there is none. Rows of experts must have one, where their offsets are given.
void check_map(const char* op, const Tensor& map, const char* what, int64_t size, const Tensor* expert_offsets = nullptr);

// How many slots one call may have: rows and slots are int32.
void check_slots(const char* op, int64_t slots);

// The Activation of a set of schema arguments, or an error for a combination without a formula.
Activation parse_activation(const char* op, const std::string& activation, bool gated, bool interleaved, const OptionalDouble& alpha,
                            const OptionalDouble& limit);

// This library's kernel table has no entry for `op`.
[[noreturn]] void fail_missing(const char* op);

// One message for everything but kOk: which kernel, what it was asked, what exists, what to do.
[[noreturn]] void fail_status(const char* op, Status status, const char* detail);

}  // namespace moe::ops
