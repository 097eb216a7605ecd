#include "checks.h"

#include <cstring>

#include "device.h"

namespace moe::ops {
namespace {

using torch::headeronly::ScalarType;

const char* scalar_name(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// The tables of the CPU library are those of the CPU; a test may put the simulated GPU's in their place.
bool kernels_run_on_host() { return !std::strcmp(kernel_table().device, "cpu"); }

std::string list(std::initializer_list<int64_t> sizes) {
  std::ostringstream s;
  s << "[";
  const char* comma = "";
  for (int64_t n : sizes) {
    s << comma;
    if (n < 0) {
      s << "*";
    } else {
      s << n;
    }
    comma = ", ";
  }
  s << "]";
  return s.str();
}

}  // namespace

std::string shape(const Tensor& t) {
  std::ostringstream s;
  s << "[";
  for (int64_t d = 0; d < t.dim(); ++d) s << (d ? ", " : "") << t.size(d);
  s << "]";
  return s.str();
}

std::string dtype_name(const Tensor& t) { return scalar_name(t.scalar_type()); }

DType float_dtype(const char* op, const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(op, what, " is ", dtype_name(t), "; float64, float32, bfloat16 and float16 are supported");
  }
}

void check_shape(const char* op, const Tensor& t, const char* what, std::initializer_list<int64_t> expected) {
  bool ok = t.dim() == static_cast<int64_t>(expected.size());
  int64_t d = 0;
  for (int64_t n : expected) {
    if (ok && n >= 0) ok = t.size(d) == n;
    ++d;
  }
  check(ok, op, what, " has shape ", shape(t), ", expected ", list(expected));
}

void check_device(const char* op, const Tensor& t, const char* what, const Tensor& like, const char* like_what) {
  check(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), op, what, " and ", like_what,
        " are on different devices");
}

void check_like(const char* op, const Tensor& t, const char* what, const Tensor& like, const char* like_what) {
  check(t.scalar_type() == like.scalar_type(), op, what, " is ", dtype_name(t), " but ", like_what, " is ", dtype_name(like),
        "; cast one of them, or run under torch.autocast");
  check_device(op, t, what, like, like_what);
}

void check_int32(const char* op, const Tensor& t, const char* what, int64_t size, const Tensor& like) {
  check(t.scalar_type() == ScalarType::Int, op, what, " is ", dtype_name(t), ", expected int32 as sort_by_expert returns it");
  check_shape(op, t, what, {size});
  check(t.is_contiguous(), op, what, " must be contiguous");
  check(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), op, what, " is on another device");
}

void check_offsets(const char* op, const Tensor& expert_offsets, int64_t S) {
  if (!kernels_run_on_host()) return;
  const int32_t* offsets = static_cast<const int32_t*>(expert_offsets.data_ptr());
  const int64_t E = expert_offsets.size(0) - 1;
  check(offsets[0] == 0, op, "expert_offsets[0] is ", offsets[0], ", expected 0");
  for (int64_t e = 0; e < E; ++e) {
    check(offsets[e] <= offsets[e + 1], op, "expert_offsets[", e + 1, "] is ", offsets[e + 1], " after ", offsets[e],
          ": offsets must not fall");
  }
  check(offsets[E] <= S, op, "expert_offsets[", E, "] is ", offsets[E], " but there are S=", S, " rows");
}

void check_map(const char* op, const Tensor& map, const char* what, int64_t size, const Tensor* expert_offsets) {
  if (!kernels_run_on_host()) return;
  const int32_t* entries = static_cast<const int32_t*>(map.data_ptr());
  const int64_t count = map.size(0);
  const int64_t used = expert_offsets ? static_cast<const int32_t*>(expert_offsets->data_ptr())[expert_offsets->size(0) - 1] : 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t least = i < used ? 0 : -1;
    check(entries[i] >= least && entries[i] < size, op, what, "[", i, "] is ", entries[i], ", expected ", least, " to ", size - 1);
  }
}

void check_slots(const char* op, int64_t slots) {
  check(slots < (int64_t{1} << 31) - 1, op, "T*K = ", slots, " slots exceed the int32 range of rows; split the batch");
}

Activation parse_activation(const char* op, const std::string& activation, bool gated, bool interleaved, const OptionalDouble& alpha,
                            const OptionalDouble& limit) {
  Activation a;
  a.gated = gated;
  a.interleaved = interleaved;
  if (activation == "silu") {
    a.kind = ActivationKind::kSilu;
  } else if (activation == "gelu") {
    a.kind = ActivationKind::kGelu;
  } else if (activation == "gelu_tanh") {
    a.kind = ActivationKind::kGeluTanh;
  } else if (activation == "relu") {
    a.kind = ActivationKind::kRelu;
  } else if (activation == "relu2") {
    a.kind = ActivationKind::kRelu2;
  } else if (activation == "swigluoai") {
    a.kind = ActivationKind::kSwigluOai;
    check(gated, op, "activation='swigluoai' multiplies by (up + 1): it needs gated=True");
    check(alpha.has_value(), op, "activation='swigluoai' needs alpha (gpt-oss uses 1.702)");
  } else {
    fail(op, "activation='", activation, "' is not known; choose one of silu, gelu, gelu_tanh, relu, relu2, swigluoai");
  }
  if (alpha.has_value()) {
    check(a.kind == ActivationKind::kSwigluOai, op, "alpha=", *alpha, " has no meaning for activation='", activation,
          "'; only 'swigluoai' has it");
    a.alpha = *alpha;
  }
  if (limit.has_value()) {
    check(gated && *limit > 0, op, "limit=", *limit, " needs gated=True and a positive value");
    a.has_limit = true;
    a.limit = *limit;
  }
  check(gated || !interleaved, op, "interleaved=True means gate and up alternate: it needs gated=True");
  return a;
}

void fail_missing(const char* op) {
  fail(op, "this build has no ", kernel_table().device, " kernel for it (", kernel_table().variant,
       "). `moe-ext doctor` lists what there is; move the tensors to the CPU.");
}

void fail_status(const char* op, Status status, const char* detail) {
  const KernelTable& table = kernel_table();
  switch (status) {
    case Status::kUnsupportedDtype:
      fail(op, "no ", table.device, " kernel for ", detail, " (built: ", table.variant, "; ", table.dtypes,
           "). Cast, or use another device.");
    case Status::kUnsupportedLayout:
      fail(op, "the ", table.device, " kernel (", table.variant, ") cannot read this layout: ", detail, ". Make the tensors contiguous.");
    default:
      fail(op, "the ", table.device, " kernel (", table.variant, ") could not be launched (", detail, ").");
  }
}

}  // namespace moe::ops
