// Tensor maps: our encoding of the 128 opaque bytes. PTX ISA, "Tensors: Tensor-Map",
// "Data Movement and Conversion Instructions: tensormap.replace";
// what cuTensorMapEncodeTiled of the driver accepts.
#pragma once
#include <cstdint>

namespace gpusim {

struct TensorMap {
  uint32_t magic = 0;
  uint8_t type = 0, rank = 0, swizzle = 0, fill = 0;  // CUtensorMapDataType, ..., 0 none 1 32 B 2 64 B 3 128 B, ...
  uint64_t address = 0;
  uint32_t dims[5] = {};
  uint32_t pad = 0;
  uint64_t strides[4] = {};  // bytes, of dimensions 1 to 4
  uint16_t box[5] = {}, steps[5] = {};
  uint8_t rest[36] = {};

  static constexpr uint32_t kMagic = 0x47535450;
  int element_bytes() const;
  uint32_t chunks() const { return 1u << swizzle; }  // of 16 bytes in a swizzled row
};
static_assert(sizeof(TensorMap) == 128);

int encode_tensor_map(void* map, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                      const uint32_t* steps, int interleave, int swizzle, int l2_promotion, int fill);

}  // namespace gpusim
