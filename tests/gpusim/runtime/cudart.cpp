// The functions of the CUDA runtime that host code calls, over the simulated device. Everything runs at once and in order, so
// streams and events are names only.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "cuda_types.h"
#include "device.h"

using gpusim::Device;
using gpusim::LaunchRequest;
using gpusim::Memory;

namespace {

constexpr size_t kRedZone = 4096;

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;

int allocate(void** p, size_t bytes, const char* kind) {
  *p = nullptr;
  if (!bytes) return 0;
  auto* base = static_cast<uint8_t*>(std::aligned_alloc(256, (bytes + 2 * kRedZone + 255) / 256 * 256));
  if (!base) return Device::get().set_error(2);
  gpusim::poison(base, bytes + 2 * kRedZone);
  *p = base + kRedZone;
  Memory::get().add(*p, bytes, kind);
  return 0;
}
int release(void* p) {
  if (!p) return 0;
  if (!Memory::get().remove(p)) return Device::get().set_error(1);
  std::free(static_cast<uint8_t*>(p) - kRedZone);
  return 0;
}

int launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, const dim3* cluster = nullptr) {
  LaunchRequest r;
  r.function = function;
  const dim3* from[3] = {&grid, &block, cluster};
  uint32_t* to[3] = {r.grid, r.block, r.cluster};
  for (int k = 0; k < (cluster ? 3 : 2); ++k) {
    to[k][0] = from[k]->x;
    to[k][1] = from[k]->y;
    to[k][2] = from[k]->z;
  }
  r.dynamic_shared = static_cast<int64_t>(shared);
  r.arguments = arguments;
  return Device::get().launch(r);
}

}  // namespace

#define GPUSIM_API extern "C" __attribute__((visibility("default")))

// ---- what nvcc's host code calls
GPUSIM_API void** __cudaRegisterFatBinary(void* wrapper) { return reinterpret_cast<void**>(Device::get().add_module(wrapper)); }
GPUSIM_API void __cudaRegisterFatBinaryEnd(void**) {}
GPUSIM_API void __cudaUnregisterFatBinary(void**) {}
GPUSIM_API void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  Device::get().add_kernel(reinterpret_cast<gpusim::LoadedModule*>(module), host, name);
}
GPUSIM_API void __cudaRegisterVar(void** module, char* host, char*, const char* name, int, size_t, int, int) {
  Device::get().add_variable(reinterpret_cast<gpusim::LoadedModule*>(module), host, name);
}
GPUSIM_API char __cudaInitModule(void**) { return 1; }
GPUSIM_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
GPUSIM_API int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<void**>(stream) = c.stream;
  return 0;
}
GPUSIM_API int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}
GPUSIM_API int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void*) {
  return launch(kernel, grid, block, arguments, shared);
}
GPUSIM_API int cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, void*) {
  return launch(function, grid, block, arguments, shared);
}
GPUSIM_API int cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, void*) {
  return launch(function, grid, block, arguments, shared);
}
GPUSIM_API int cudaLaunchKernelExC(const LaunchConfig* config, const void* function, void** arguments) {
  const dim3* cluster = nullptr;
  for (unsigned k = 0; k < config->count; ++k)
    if (config->attributes[k].id == kAttributeClusterDimension) cluster = reinterpret_cast<const dim3*>(config->attributes[k].value);
  return launch(function, config->grid, config->block, arguments, config->shared, cluster);
}

// ---- memory
GPUSIM_API int cudaMalloc(void** p, size_t bytes) { return allocate(p, bytes, "device allocation"); }
GPUSIM_API int cudaMallocAsync(void** p, size_t bytes, void*) { return allocate(p, bytes, "device allocation"); }
GPUSIM_API int cudaMallocManaged(void** p, size_t bytes, unsigned) { return allocate(p, bytes, "managed allocation"); }
GPUSIM_API int cudaFree(void* p) { return release(p); }
GPUSIM_API int cudaFreeAsync(void* p, void*) { return release(p); }
GPUSIM_API int cudaMallocHost(void** p, size_t bytes) { return (*p = std::malloc(bytes)) ? 0 : 2; }
GPUSIM_API int cudaFreeHost(void* p) {
  std::free(p);
  return 0;
}
GPUSIM_API int cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  std::memmove(to, from, bytes);
  return 0;
}
GPUSIM_API int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) {
  std::memmove(to, from, bytes);
  return 0;
}
GPUSIM_API int cudaMemset(void* p, int value, size_t bytes) {
  std::memset(p, value, bytes);
  return 0;
}
GPUSIM_API int cudaMemsetAsync(void* p, int value, size_t bytes, void*) {
  std::memset(p, value, bytes);
  return 0;
}
GPUSIM_API int cudaGetSymbolAddress(void** p, const void* symbol) { return (*p = Device::get().variable(symbol)) ? 0 : 13; }
GPUSIM_API int cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, int) {
  std::memcpy(static_cast<uint8_t*>(Device::get().variable(symbol)) + offset, from, bytes);
  return 0;
}
GPUSIM_API int cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, int) {
  std::memcpy(to, static_cast<uint8_t*>(Device::get().variable(symbol)) + offset, bytes);
  return 0;
}
GPUSIM_API int cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = *total = size_t{8} << 30;
  return 0;
}

// ---- streams and events
GPUSIM_API int cudaStreamCreate(void** s) { return *s = reinterpret_cast<void*>(1), 0; }
GPUSIM_API int cudaStreamCreateWithFlags(void** s, unsigned) { return *s = reinterpret_cast<void*>(1), 0; }
GPUSIM_API int cudaStreamDestroy(void*) { return 0; }
GPUSIM_API int cudaStreamSynchronize(void*) { return 0; }
GPUSIM_API int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
GPUSIM_API int cudaStreamIsCapturing(void*, int* status) { return *status = 0, 0; }
GPUSIM_API int cudaDeviceSynchronize() { return 0; }
GPUSIM_API int cudaEventCreate(void** e) { return *e = std::malloc(8), 0; }
GPUSIM_API int cudaEventCreateWithFlags(void** e, unsigned) { return *e = std::malloc(8), 0; }
GPUSIM_API int cudaEventDestroy(void* e) {
  std::free(e);
  return 0;
}
GPUSIM_API int cudaEventRecord(void* e, void*) {
  const int64_t now = std::chrono::steady_clock::now().time_since_epoch().count();
  std::memcpy(e, &now, 8);
  return 0;
}
GPUSIM_API int cudaEventSynchronize(void*) { return 0; }
GPUSIM_API int cudaEventQuery(void*) { return 0; }
GPUSIM_API int cudaEventElapsedTime(float* ms, void* begin, void* end) {
  *ms = static_cast<float>(*static_cast<int64_t*>(end) - *static_cast<int64_t*>(begin)) * 1e-6f;
  return 0;
}

// ---- the device
GPUSIM_API int cudaGetDevice(int* device) { return *device = 0, 0; }
GPUSIM_API int cudaSetDevice(int device) { return device ? 101 : 0; }
GPUSIM_API int cudaGetDeviceCount(int* count) { return *count = 1, 0; }
GPUSIM_API int cudaDriverGetVersion(int* version) { return *version = 13000, 0; }
GPUSIM_API int cudaRuntimeGetVersion(int* version) { return *version = 13000, 0; }
GPUSIM_API int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const Device& d = Device::get();
  *value = attribute_value(attribute, d.architecture, d.sms(), static_cast<int>(d.shared_per_block));
  return *value < 0 ? 1 : 0;
}
GPUSIM_API int cudaGetLastError() {
  const int e = Device::get().last_error;
  Device::get().last_error = 0;
  return e;
}
GPUSIM_API int cudaPeekAtLastError() { return Device::get().last_error; }
GPUSIM_API const char* cudaGetErrorString(int error) {
  static std::string text;
  text = error ? "simulated CUDA error " + std::to_string(error) + ": " + Device::get().message : "no error";
  return text.c_str();
}
GPUSIM_API const char* cudaGetErrorName(int error) { return error ? "cudaErrorSimulated" : "cudaSuccess"; }
GPUSIM_API int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  Device& d = Device::get();
  if (!d.kernels.count(function)) return d.set_error(98);
  if (attribute == kFunctionMaxDynamicShared) {
    if (value > d.shared_per_block) return d.set_error(1);
    d.kernels[function].dynamic_shared_allowed = value;
  }
  return 0;
}
GPUSIM_API int cudaFuncGetAttributes(FunctionAttributes* a, const void* function) {
  std::memset(a, 0, sizeof(*a));
  try {
    const gpusim::Kernel& k = Device::get().kernel(function);
    a->shared = static_cast<size_t>(k.static_shared);
    a->local = static_cast<size_t>(k.local_bytes);
    a->max_threads = k.max_threads ? k.max_threads : 1024;
    a->ptx_version = a->binary_version = Device::get().architecture;
    a->max_dynamic_shared = static_cast<int>(Device::get().kernels[function].dynamic_shared_allowed);
    return 0;
  } catch (const gpusim::Failure& failure) {
    Device::get().message = failure.message;
    return Device::get().set_error(98);
  }
}
GPUSIM_API int cudaFuncSetCacheConfig(const void*, int) { return 0; }
GPUSIM_API int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t shared) {
  const Device& d = Device::get();
  *blocks = static_cast<int64_t>(shared) > d.shared_per_block ? 0 : d.ctas_per_sm;
  return 0;
}
GPUSIM_API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* f, int threads, size_t shared, unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, f, threads, shared);
}
GPUSIM_API int cudaOccupancyMaxActiveClusters(int* clusters, const void*, const LaunchConfig* config) {
  int size = 1;
  for (unsigned k = 0; k < config->count; ++k)
    if (config->attributes[k].id == kAttributeClusterDimension) {
      const auto* c = reinterpret_cast<const dim3*>(config->attributes[k].value);
      size = static_cast<int>(c->x * c->y * c->z);
    }
  *clusters = Device::get().sms() / size;
  return 0;
}

// ---- for tests
GPUSIM_API void gpusim_register(void* begin, size_t bytes) { Memory::get().add(begin, bytes, "tensor"); }
GPUSIM_API int gpusim_unregister(void* begin) { return Memory::get().remove(begin); }
// The message of the first failure since the last call, or "".
GPUSIM_API const char* gpusim_take_error() {
  static std::string text;
  text = std::exchange(Device::get().message, "");
  Device::get().last_error = 0;
  return text.c_str();
}
GPUSIM_API const char* gpusim_take_launches() {
  static std::string text;
  text = "[";
  for (const auto& [kernel, c] : std::exchange(Device::get().records, {})) {
    char line[640];
    std::snprintf(line, sizeof(line),
                  "\"instructions\": %lu, \"global_loaded\": %lu, \"global_stored\": %lu, \"unique_loaded\": %lu, \"unique_stored\": %lu, "
                  "\"tensor_macs\": %lu, \"shared_accesses\": %lu, \"bank_conflicts\": %lu, \"barrier_waits\": %lu}",
                  c.instructions, c.global_loaded, c.global_stored, c.unique_loaded, c.unique_stored, c.tensor_macs, c.shared_accesses,
                  c.bank_conflicts, c.barrier_waits);
    text += std::string(text.size() > 1 ? ",\n" : "") + "{\"kernel\": \"" + kernel + "\", " + line;
  }
  text += "]";
  return text.c_str();
}
// The kernels of everything that is loaded, one name per line.
GPUSIM_API const char* gpusim_kernels() {
  static std::string text;
  text.clear();
  for (const auto& [function, k] : Device::get().kernels) text += k.name + "\n";
  return text.c_str();
}
// GPUSIM_* may be changed between launches; the architecture is read here.
GPUSIM_API void gpusim_set_architecture(int architecture) {
  Device& d = Device::get();
  if (d.architecture == architecture) return;
  d.architecture = architecture;
  d.shared_per_block = architecture >= 90 ? 227 * 1024 : 163 * 1024;
  for (auto& m : d.modules) {
    m->module.reset();
    m->kernels.clear();
  }
}
GPUSIM_API void gpusim_forget_kernels() {  // decoded again at the next launch: for mutations
  for (auto& m : Device::get().modules) m->kernels.clear();
}
