// A failed allocation as torch itself reports it, so that callers that catch it and try less (accelerate's find_executable_batch_size,
// `except torch.OutOfMemoryError`) know it. The C interface of torch gives an error code; its text can be asked for since torch 2.13.
#include <cxxabi.h>
#include <dlfcn.h>

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

// Python sees a torch.OutOfMemoryError where a c10::OutOfMemoryError is thrown. Its header ties a library to one version of torch, so
// its constructor and its type are looked up by name in the torch that runs; if they are not there, the RuntimeError below has the text.
void throw_torch_error(const std::string& text) {
  void* c10 = dlopen("libc10.so", RTLD_NOLOAD | RTLD_LAZY);
  if (!c10) return;
  void* type = dlsym(c10, "_ZTIN3c1016OutOfMemoryErrorE");
  void* construct = dlsym(c10, "_ZN3c1016OutOfMemoryErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE");
  dlclose(c10);  // torch itself keeps it loaded
  if (!type || !construct) return;
  constexpr size_t kRoom = 1024;  // a c10::Error is 160 bytes
  void* error = abi::__cxa_allocate_exception(kRoom);
  reinterpret_cast<void (*)(void*, SourceLocation, std::string)>(construct)(error, {"moe_ext", __FILE__, __LINE__}, text);
  abi::__cxa_throw(error, static_cast<std::type_info*>(type), [](void* e) { static_cast<std::exception*>(e)->~exception(); });
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
