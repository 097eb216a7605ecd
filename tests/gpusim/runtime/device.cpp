#include "device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "../exec/decoder.h"

namespace gpusim {
namespace {

enum Error { kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kInvalidFunction = 98, kNoBinary = 209, kLaunchFailure = 719 };

template <class T>
T read(const uint8_t* at) {
  T v;
  std::memcpy(&v, at, sizeof(T));
  return v;
}

// The container nvcc puts into .nv_fatbin: a header, then entries {kind, header size, payload size, ...}; kind 1 is PTX.
std::vector<std::string> ptx_of(const void* wrapper) {
  const auto* data = read<const uint8_t*>(static_cast<const uint8_t*>(wrapper) + 8);
  std::vector<std::string> found;
  if (read<uint32_t>(data) != 0xba55ed50) return found;
  const uint8_t *at = data + read<uint16_t>(data + 6), *end = at + read<uint64_t>(data + 8);
  while (at < end) {
    const auto kind = read<uint16_t>(at);
    const auto header = read<uint32_t>(at + 4);
    const auto size = read<uint64_t>(at + 8);
    const std::string text(reinterpret_cast<const char*>(at + header), size);
    if (kind == 1 && text.find(".version") != std::string::npos) found.push_back(text.substr(0, text.find('\0')));
    at += header + size;
  }
  return found;
}

int number(const char* name, int otherwise) {
  const char* setting = std::getenv(name);
  return setting && *setting ? std::atoi(setting) : otherwise;
}

}  // namespace

Device::Device() {
  architecture = number("GPUSIM_ARCH", 90);
  shared_per_block = architecture >= 90 ? 227 * 1024 : 163 * 1024;
}

int Device::sms() const { return number("GPUSIM_SMS", 4); }

Device& Device::get() {
  static Device* device = new Device;
  return *device;
}

LoadedModule* Device::add_module(const void* fat_binary) {
  modules.push_back(std::make_unique<LoadedModule>());
  modules.back()->sources = ptx_of(fat_binary);
  return modules.back().get();
}

void Device::add_kernel(LoadedModule* module, const void* function, const char* name) {
  RegisteredKernel k;
  k.module = module;
  k.name = name;
  kernels[function] = k;
}
void Device::add_variable(LoadedModule* module, const void* variable, const char* name) { variables[variable] = {module, name}; }

// The highest target not above the device's; sm_90a code runs on 90 only.
void Device::load(LoadedModule* m) {
  if (m->module) return;
  for (const std::string& source : m->sources) {
    const size_t target = source.find(".target sm_");
    const int sm = std::atoi(source.c_str() + target + 11);
    const bool accelerated = source[source.find_first_not_of("0123456789", target + 11)] == 'a';
    if (sm > architecture || (accelerated && sm != architecture)) continue;
    if (m->module && m->module->target >= sm && !accelerated) continue;
    m->module = parse_module(source);
  }
  if (!m->module)
    throw Failure{"no PTX for sm_" + std::to_string(architecture) + " in this library: compile with --no-compress and a compute_ target"};
  for (const auto& [name, v] : m->module->variables) {
    if (v.space == "shared" || v.external) continue;
    auto* data = static_cast<uint8_t*>(std::aligned_alloc(256, static_cast<size_t>((v.bytes + 511) / 256 * 256)));
    std::fill(data, data + v.bytes, 0);
    std::copy(v.data.begin(), v.data.end(), data);
    Memory::get().add(data, static_cast<size_t>(v.bytes), v.space == "const" ? "constant variable" : "device variable", v.space != "const");
    m->globals[name] = reinterpret_cast<uint64_t>(data);
  }
  for (const auto& [name, v] : m->module->variables)
    for (const auto& [offset, symbol] : v.addresses)
      if (m->globals.count(symbol)) std::memcpy(reinterpret_cast<uint8_t*>(m->globals[name]) + offset, &m->globals[symbol], 8);
}

Kernel& Device::kernel(const void* function) {
  const auto found = kernels.find(function);
  if (found == kernels.end()) throw Failure{"a kernel that was never registered is launched"};
  LoadedModule* m = found->second.module;
  load(m);
  auto& k = m->kernels[found->second.name];
  if (!k) k = Decoder::decode(*m->module, found->second.name, m->globals);
  return *k;
}

void* Device::variable(const void* host) {
  const auto found = variables.find(host);
  if (found == variables.end()) return nullptr;
  load(found->second.first);
  return reinterpret_cast<void*>(found->second.first->globals[found->second.second]);
}

int Device::launch(const LaunchRequest& r) {
  try {
    Kernel& k = kernel(r.function);
    Launch l;
    l.kernel = &k;
    std::copy(r.grid, r.grid + 3, l.grid);
    std::copy(r.block, r.block + 3, l.block);
    for (int d = 0; d < 3; ++d) l.cluster[d] = r.cluster[d] ? r.cluster[d] : k.cluster[d] ? static_cast<uint32_t>(k.cluster[d]) : 1;
    l.dynamic_shared = r.dynamic_shared;
    l.threads = static_cast<int>(r.block[0] * r.block[1] * r.block[2]);
    l.warps = (l.threads + kLanes - 1) / kLanes;
    l.sms = sms();
    l.ctas_per_sm = ctas_per_sm;
    const auto refuse = [&](const std::string& why) {
      if (message.empty()) message = k.name + ": " + why;
      return set_error(kInvalidConfiguration);
    };
    if (l.threads < 1 || l.threads > 1024) return refuse(std::to_string(l.threads) + " threads per block; 1 to 1024 are possible");
    if (k.max_threads && l.threads > k.max_threads)
      return refuse(std::to_string(l.threads) + " threads per block; __launch_bounds__ says " + std::to_string(k.max_threads));
    if (uint64_t{r.grid[0]} * r.grid[1] * r.grid[2] == 0 || r.grid[0] > 0x7fffffffu || r.grid[1] > 65535 || r.grid[2] > 65535)
      return refuse("the grid is empty or too large");
    for (int d = 0; d < 3; ++d)
      if (l.grid[d] % l.cluster[d]) return refuse("the grid is no multiple of the cluster");
    if (l.cluster[0] * l.cluster[1] * l.cluster[2] > 8) return refuse("a cluster of more than 8 CTAs is not portable");
    const int64_t shared = k.static_shared + l.dynamic_shared;
    if (shared > shared_per_block || l.dynamic_shared > kernels[r.function].dynamic_shared_allowed || k.static_shared > 48 * 1024)
      return refuse(std::to_string(shared) + " bytes of shared memory; more than 48 KiB need cudaFuncSetAttribute, and the device has " +
                    std::to_string(shared_per_block));
    auto* parameters = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(k.parameter_bytes + 127) / 64 * 64));
    for (size_t p = 0; p < k.parameters.size(); ++p)
      std::memcpy(parameters + k.parameters[p].first, r.arguments[p], static_cast<size_t>(k.parameters[p].second));
    Memory::get().add(parameters, static_cast<size_t>(k.parameter_bytes), "kernel's parameters", false);
    l.parameters = parameters;
    l.strict = number("GPUSIM_STRICT", 0);
    if (const char* seed = std::getenv("GPUSIM_SCHED"); seed && *seed) {
      l.random_schedule = true;
      l.random.seed(static_cast<unsigned>(std::strtoul(seed, nullptr, 10)));
    }
    Memory::get().start_counting();
    try {
      l.run();
    } catch (...) {
      Memory::get().remove(parameters);
      std::free(parameters);
      throw;
    }
    Memory::get().remove(parameters);
    std::free(parameters);
    Memory::get().count_unique(&l.counters.unique_loaded, &l.counters.unique_stored);
    records.push_back({k.name, l.counters});
    return kSuccess;
  } catch (const Failure& failure) {
    if (message.empty()) message = failure.message;
    std::fprintf(stderr, "gpusim: %s\n", failure.message.c_str());
    return set_error(kLaunchFailure);
  }
}

}  // namespace gpusim
