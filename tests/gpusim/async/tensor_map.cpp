#include "tensor_map.h"

#include "../exec/access.h"
#include "../exec/decoder.h"

namespace gpusim {

int TensorMap::element_bytes() const {
  static constexpr int sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // CU_TENSOR_MAP_DATA_TYPE_UINT8 ...
  return type < sizeof(sizes) / sizeof(sizes[0]) ? sizes[type] : 0;
}

// A CUresult: 1 is CUDA_ERROR_INVALID_VALUE. The conditions are those of the driver's documentation.
int encode_tensor_map(void* place, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
                      const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int, int fill) {
  TensorMap m;
  m.magic = TensorMap::kMagic;
  m.type = static_cast<uint8_t>(type);
  m.rank = static_cast<uint8_t>(rank);
  m.swizzle = static_cast<uint8_t>(swizzle);
  m.fill = static_cast<uint8_t>(fill);
  m.address = reinterpret_cast<uint64_t>(address);
  const int size = m.element_bytes();
  if (!size || rank < 1 || rank > 5 || interleave || swizzle < 0 || swizzle > 3 || m.address % 16 || reinterpret_cast<uint64_t>(place) % 64)
    return 1;
  for (uint32_t d = 0; d < rank; ++d) {
    if (!dims[d] || dims[d] > uint64_t{1} << 32 || !box[d] || box[d] > 256 || steps[d] != 1) return 1;
    if (d && (strides[d - 1] % 16 || strides[d - 1] >= uint64_t{1} << 40)) return 1;
    m.dims[d] = static_cast<uint32_t>(dims[d]);
    m.box[d] = static_cast<uint16_t>(box[d]);
    m.steps[d] = static_cast<uint16_t>(steps[d]);
    if (d) m.strides[d - 1] = strides[d - 1];
  }
  const uint32_t inner = box[0] * static_cast<uint32_t>(size);
  if (inner % 16 || (swizzle && inner > 16u << swizzle)) return 1;
  std::memcpy(place, &m, sizeof(m));
  return 0;
}

namespace {

enum Field : uint8_t { kAddress, kDim, kStride };

// a: address of the map; b: the new value; imm: displacement; count: ordinal; width: of the value.
Flow replace(Warp& w, const Instr& i, Mask m) {
  for_lanes(m, [&](int l) {
    // Which of the 128 bytes a field has is not documented: all are written.
    const uint64_t address = w.address(i, i.a, l);
    uint8_t* place = resolve(w, i, l, address, Space(i.space), 16, Access::kStore);
    for (int at = 16; at < 128; at += 16) resolve(w, i, l, address + static_cast<uint64_t>(at), Space(i.space), 16, Access::kStore);
    TensorMap map;
    std::memcpy(&map, place, sizeof(map));
    if (map.magic != TensorMap::kMagic) fail(w, i, l, "tensormap.replace on something that is no tensor map");
    const uint64_t v = get(w, i.b, i.width, l);
    const int k = i.count;
    switch (i.flags) {
      case kAddress:
        map.address = v;
        break;
      case kDim:
        map.dims[k] = static_cast<uint32_t>(v);
        break;
      case kStride:
        map.strides[k] = v;
        break;
    }
    std::memcpy(place, &map, sizeof(map));
  });
  ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}

// tensormap.cp_fenceproxy: 128 bytes from shared to global memory, by a whole warp.
Flow copy_map(Warp& w, const Instr& i, Mask m) {
  if (m != w.live) {
    w.now->why = "the other lanes of its warp at an .aligned instruction";
    return Flow::kWait;
  }
  for (int at = 0; at < 8; ++at) {  // a lane's 16 bytes each: what other lanes wrote must be ordered before
    const int l = m >> at & 1 ? at : lowest(m);
    const uint64_t from = i.list[1] ? w.reg<uint32_t>(i.list[0])[l] : w.reg<uint64_t>(i.list[0])[l],
                   offset = 16 * static_cast<uint64_t>(at);
    const uint8_t* source = resolve(w, i, l, from + offset, i.list[1] ? kShared : kGeneric, 16, Access::kLoad);
    std::memcpy(resolve(w, i, l, w.address(i, i.a, l) + offset, kGlobal, 16, Access::kAsyncStore), source, 16);
  }
  ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}

void decode_tensormap(Decoder& d, const Statement& s, Instr& i) {
  static const std::map<std::string, Field> fields = {{"global_address", kAddress}, {"global_dim", kDim}, {"global_stride", kStride}};
  d.address(s.operands[0], i);
  if (s.words[1] == "cp_fenceproxy") {
    Instr source;
    d.address(s.operands[1], source);
    if (source.imm) return;
    i.list = d.list({source.a, source.address32});
    i.whole = true;
    i.exec = copy_map;
    return;
  }
  if (s.words[1] != "replace" || !fields.count(s.words[3])) return;
  i.flags = fields.at(s.words[3]);
  i.space = s.has("shared::cta") ? kShared : s.has("global") ? kGlobal : kGeneric;
  const Type t = d.type_of(s);
  i.width = t.size;
  i.count = s.operands.size() > 2 ? static_cast<uint8_t>(parse_integer(s.operands[1])) : 0;
  i.b = d.source(s.operands.back(), t);
  i.exec = replace;
}

const Opcodes opcodes{{"tensormap", decode_tensormap}};

}  // namespace
}  // namespace gpusim

// cudaGetDriverEntryPoint of the one driver function kernels' host code asks for.
extern "C" __attribute__((visibility("default"))) int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                                                       unsigned long long, int* status) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&gpusim::encode_tensor_map) : nullptr;
  if (status) *status = known ? 0 : 1;
  return known ? 0 : 1;
}
extern "C" __attribute__((visibility("default"))) int cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                                                              int* status) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, status);
}
