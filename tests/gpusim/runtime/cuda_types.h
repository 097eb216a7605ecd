// The few types and numbers of the CUDA 13 headers that the stand-in needs, so that it builds without a toolkit.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x, y, z;
};

// cudaLaunchAttribute and cudaLaunchConfig_t
struct LaunchAttribute {
  int id;
  char pad[4];
  char value[64];
};
struct LaunchConfig {
  dim3 grid, block;
  size_t shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};
constexpr int kAttributeClusterDimension = 4;  // cudaLaunchAttributeClusterDimension
constexpr int kFunctionMaxDynamicShared = 8;   // cudaFuncAttributeMaxDynamicSharedMemorySize

// cudaFuncAttributes
struct FunctionAttributes {
  size_t shared, constant, local;
  int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic_shared, carveout, cluster_must_be_set;
  int cluster_width, cluster_height, cluster_depth, scheduling, non_portable, reserved[16];
};

// cudaDeviceAttr -> value; -1 for one this device does not know.
inline int attribute_value(int attribute, int architecture, int sms, int shared_per_block) {
  switch (attribute) {
    case 1:
      return 1024;  // cudaDevAttrMaxThreadsPerBlock
    case 2:
    case 3:
      return 1024;  // MaxBlockDimX, Y
    case 4:
      return 64;  // MaxBlockDimZ
    case 5:
      return 0x7fffffff;  // MaxGridDimX
    case 6:
    case 7:
      return 65535;  // MaxGridDimY, Z
    case 8:
      return 48 * 1024;  // MaxSharedMemoryPerBlock
    case 9:
      return 64 * 1024;  // TotalConstantMemory
    case 10:
      return 32;  // WarpSize
    case 12:
      return 65536;  // MaxRegistersPerBlock
    case 13:
      return 1'755'000;  // ClockRate
    case 16:
      return sms;  // MultiProcessorCount
    case 38:
      return 50 << 20;  // L2CacheSize
    case 39:
      return 2048;  // MaxThreadsPerMultiProcessor
    case 75:
      return architecture / 10;  // ComputeCapabilityMajor
    case 76:
      return architecture % 10;  // ComputeCapabilityMinor
    case 81:
      return shared_per_block + 1024;  // MaxSharedMemoryPerMultiprocessor
    case 82:
      return 65536;  // MaxRegistersPerMultiprocessor
    case 95:
      return 1;  // CooperativeLaunch
    case 97:
      return shared_per_block;  // MaxSharedMemoryPerBlockOptin
    case 106:
      return 32;  // MaxBlocksPerMultiprocessor
    case 111:
      return 1024;  // ReservedSharedMemoryPerBlock
    case 115:
      return 1;  // MemoryPoolsSupported
    case 120:
      return architecture >= 90;  // ClusterLaunch
    default:
      return -1;
  }
}
