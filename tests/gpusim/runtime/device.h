// What the stand-in runtime knows: modules and their kernels, launches, the last error, what was counted.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "../exec/machine.h"

namespace gpusim {

struct LoadedModule {
  std::vector<std::string> sources;  // PTX of each target in the fat binary
  std::unique_ptr<Module> module;    // the one that fits the simulated device, parsed at the first use
  std::map<std::string, uint64_t> globals;
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
};

struct RegisteredKernel {
  LoadedModule* module = nullptr;
  std::string name;
  int64_t dynamic_shared_allowed = 48 * 1024;
};

struct LaunchRecord {
  std::string kernel;
  Counters counters;
};

struct LaunchRequest {
  const void* function = nullptr;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster[3] = {0, 0, 0};
  int64_t dynamic_shared = 0;
  void** arguments = nullptr;
};

// An H100-like device, small: few SMs, so that persistent kernels loop.
struct Device {
  static Device& get();
  int architecture = 90;  // GPUSIM_ARCH=80 runs the code for sm_80
  int ctas_per_sm = 2;
  int sms() const;  // GPUSIM_SMS, or 4
  int64_t shared_per_block = 227 * 1024;

  LoadedModule* add_module(const void* fat_binary);
  void add_kernel(LoadedModule* module, const void* function, const char* name);
  void add_variable(LoadedModule* module, const void* variable, const char* name);
  int launch(const LaunchRequest& request);  // a cudaError_t
  Kernel& kernel(const void* function);
  void* variable(const void* host);

  std::unordered_map<const void*, RegisteredKernel> kernels;
  std::unordered_map<const void*, std::pair<LoadedModule*, std::string>> variables;
  std::vector<std::unique_ptr<LoadedModule>> modules;
  std::vector<LaunchRecord> records;
  std::string message;  // of the first failure since it was taken
  int last_error = 0;
  int set_error(int code) { return code ? last_error = code : 0; }

 private:
  Device();
  void load(LoadedModule* module);
};

}  // namespace gpusim
