// A failed allocation as torch itself reports it, so that callers that catch it and try less (accelerate's find_executable_batch_size,
// `except torch.OutOfMemoryError`) know it. The C interface of torch gives an error code; its text can be asked for since torch 2.13.
#include <cxxabi.h>

#include <cstring>
#include <exception>

#include "tensor_access.h"

extern "C" const char* torch_exception_get_what_without_backtrace() __attribute__((weak));

namespace moe::ops {
namespace {
struct SourceLocation {  // c10::SourceLocation
  const char *function, *file;
  uint32_t line;
};
}  // namespace
}  // namespace moe::ops

// c10::OutOfMemoryError, by its names in the binary.
extern "C" char moe_type_of_out_of_memory[] __asm__("_ZTIN3c1016OutOfMemoryErrorE") __attribute__((weak));
extern "C" void moe_construct_out_of_memory(void*, moe::ops::SourceLocation, std::string) __asm__(
    "_ZN3c1016OutOfMemoryErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE") __attribute__((weak));

namespace moe::ops {
namespace {

// Python sees a torch.OutOfMemoryError where a c10::OutOfMemoryError is thrown. Its header ties a library to one version of torch, so
// its constructor and its type are named here, and are null where the torch that runs has none: the RuntimeError below has the text.
void throw_torch_error(const std::string& text) {
  if (!moe_type_of_out_of_memory || !moe_construct_out_of_memory) return;
  constexpr size_t kRoom = 1024;  // a c10::Error is 160 bytes
  void* error = abi::__cxa_allocate_exception(kRoom);
  moe_construct_out_of_memory(error, {"moe_ext", __FILE__, __LINE__}, text);
  abi::__cxa_throw(error, reinterpret_cast<std::type_info*>(moe_type_of_out_of_memory),
                   [](void* e) { static_cast<std::exception*>(e)->~exception(); });
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

void fail_allocation(const Tensor& like, double elements) {
  std::string text;
  if (torch_exception_get_what_without_backtrace) {
    if (const char* what = torch_exception_get_what_without_backtrace()) text = what;
  } else if (elements < 1e18) {
    std::ostringstream s;
    s << (like.is_cpu() ? "DefaultCPUAllocator: can't allocate memory: moe_ext" : "CUDA out of memory. moe_ext") << " tried to allocate "
      << static_cast<int64_t>(elements) << " elements";
    text = s.str();
  }
  if (contains(text, "out of memory") || contains(text, "allocate memory") || contains(text, "not enough memory")) throw_torch_error(text);
  fail("allocate", text.empty() ? "a tensor of this size cannot be" : text);
}

}  // namespace moe::ops
