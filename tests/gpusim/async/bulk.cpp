// Bulk copies. PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk, cp.async.bulk.tensor, cp.reduce.async.bulk.tensor,
// cp.async.bulk.commit_group, cp.async.bulk.wait_group", and "Tensors" (tiles, swizzle, bounds). Elements outside the tensor are read as
// zero and not written; an mbarrier is told of the whole box.
#include "bulk.h"

#include <algorithm>

#include "../exec/access.h"
#include "../exec/floats.h"
#include "../exec/race.h"
#include "queue.h"
#include "tensor_map.h"

namespace gpusim {
namespace {

AsyncQueue& queue(Warp& w) { return *w.cta->cluster->async; }

// list: [0] destination or source in shared memory, [1] map or global address, [2] mbarrier, [3] multicast mask or 0, [4] size or 0, then
// coordinates. Each of the first three is followed by its displacement and its width: 3 words.
struct Operand {
  uint32_t slot, displacement, is32;
  uint64_t at(const Warp& w, int l) const {
    return (is32 ? w.reg<uint32_t>(slot)[l] : w.reg<uint64_t>(slot)[l]) +
           static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(displacement)));
  }
};
const Operand& operand(const Instr& i, int k) { return reinterpret_cast<const Operand*>(i.list)[k]; }
constexpr int kMask = 9, kSize = 10, kCoordinates = 11;
enum BulkFlags : uint8_t { kLoad = 1, kTensor = 2, kReduceAdd = 4 };

// One box: calls f(global address, offset in the swizzled box's shared memory, bytes) for pieces of up to 16 bytes; address 0 is outside.
struct Box {
  TensorMap map;
  int32_t at[5] = {};
  uint32_t bytes() const {
    uint32_t n = static_cast<uint32_t>(map.element_bytes());
    for (int d = 0; d < map.rank; ++d) n *= map.box[d];
    return n;
  }
  template <class F>
  void each_piece(uint32_t shared, const F& f) const {
    const int size = map.element_bytes();
    const uint32_t row = map.box[0] * static_cast<uint32_t>(size), rows = bytes() / row;
    for (uint32_t r = 0; r < rows; ++r) {
      bool inside = true;
      uint64_t address = map.address;
      uint32_t rest = r;
      for (int d = 1; d < map.rank; ++d) {
        const int64_t c = at[d] + static_cast<int64_t>(rest % map.box[d]);
        rest /= map.box[d];
        inside &= c >= 0 && c < map.dims[d];
        address += static_cast<uint64_t>(c) * map.strides[d - 1];
      }
      for (uint32_t k = 0; k < row; k += 16) {
        const uint32_t to = shared + r * row + k, swizzled = to ^ ((to >> 7 & (map.chunks() - 1)) << 4);
        const int64_t element = at[0] + static_cast<int64_t>(k) / size, count = 16 / size;
        const int64_t low = std::clamp<int64_t>(-element, 0, count),
                      high = inside ? std::clamp<int64_t>(map.dims[0] - element, 0, count) : 0;
        f(address + static_cast<uint64_t>(element * size), swizzled, low * size, high * size);
      }
    }
  }
};

Box read_box(Warp& w, const Instr& i, int l) {
  Box box;
  const uint64_t map = operand(i, 1).at(w, l);
  if (map % 64) fail(w, i, l, "a tensor map is not aligned to 64 bytes");
  std::memcpy(&box.map, queue(w).descriptor(*w.cta, map, [&] { return resolve(w, i, l, map, kGeneric, 16, Access::kAsyncLoad); }),
              sizeof(TensorMap));
  if (box.map.magic != TensorMap::kMagic) fail(w, i, l, "there is no tensor map at this address");
  if (box.map.rank != i.count) fail(w, i, l, "the tensor map has another rank");
  for (int d = 0; d < i.count; ++d) box.at[d] = static_cast<int32_t>(w.reg<uint32_t>(i.list[kCoordinates + d])[l]);
  return box;
}

uint8_t* global_bytes(Warp& w, const Instr& i, int l, uint64_t address, int64_t bytes, Access access) {
  const int whole = bytes == 16 && address % 16 == 0 ? 16 : static_cast<int>(address % 2 ? 1 : bytes & 2 || address % 4 ? 2 : 4);
  uint8_t* first = nullptr;
  for (int64_t at = 0; at < bytes; at += whole) {
    uint8_t* p = resolve(w, i, l, address + static_cast<uint64_t>(at), kGlobal, whole, access);
    if (!first) first = p;
  }
  return first;
}

void tensor_load(Warp& w, const Instr& i, int l) {
  AsyncQueue& q = queue(w);
  const Box box = read_box(w, i, l);
  const uint32_t bytes = box.bytes();
  const SharedPlace to = shared_place(w, i, l, operand(i, 0).at(w, l), static_cast<int>(bytes));
  const SharedPlace bar = shared_place(w, i, l, operand(i, 2).at(w, l), 8);
  if (to.offset % 128) fail(w, i, l, "the destination of a TMA load is not aligned to 128 bytes");
  const uint32_t mask = i.list[kMask] ? w.reg<uint16_t>(i.list[kMask])[l] : 0;
  Access access = Access::kAsyncLoad;
  for (const auto& cta : w.cta->cluster->ctas) {
    if (mask ? !(mask >> cta->rank & 1) : cta.get() != to.cta) continue;
    Cta* target = cta.get();
    Cta* signalled = mask ? target : bar.cta;
    const auto key = AsyncQueue::key(*signalled, bar.offset);
    if (!q.barriers.count(key)) fail(w, i, l, "a TMA load signals an mbarrier before mbarrier.init");
    race::async_write(w, i, l, *target, to.offset, static_cast<int>(bytes));
    q.add(key, [&q, &w, &i, l, box, target, key, to, bytes, access] {
      box.each_piece(to.offset, [&](uint64_t address, uint32_t offset, int64_t low, int64_t high) {
        uint8_t* out = target->shared.data() + offset;
        std::memset(out, 0, 16);
        if (low < high)
          std::memcpy(out + low, global_bytes(w, i, l, address + static_cast<uint64_t>(low), high - low, access),
                      static_cast<size_t>(high - low));
      });
      q.arrive(key, 0, bytes);
    });
    access = Access::kMulticast;
  }
}

void add_to(uint8_t* to, const uint8_t* from, int64_t bytes, const TensorMap& map) {
  for (int64_t at = 0; at < bytes; at += map.element_bytes()) {
    if (map.type == 7) {
      float a, b;
      std::memcpy(&a, to + at, 4);
      std::memcpy(&b, from + at, 4);
      a += b;
      std::memcpy(to + at, &a, 4);
    } else {
      uint16_t a, b;
      std::memcpy(&a, to + at, 2);
      std::memcpy(&b, from + at, 2);
      a = map.type == 6 ? to_half(double(to_float(Half{a})) + to_float(Half{b})).bits
                        : to_bfloat(to_float(BFloat{a}) + to_float(BFloat{b})).bits;
      std::memcpy(to + at, &a, 2);
    }
  }
}

template <class Operation>
void store_later(Warp& w, int l, const Operation& operation, const SharedPlace& from, int bytes) {
  Group& group = queue(w).state(w).bulk_open[l];
  group.reads.push_back(race::begin_read(w, l, *from.cta, from.offset, bytes));
  if (queue(w).now())
    operation();
  else
    group.operations.push_back(operation);
}

void tensor_store(Warp& w, const Instr& i, int l) {
  const Box box = read_box(w, i, l);
  const SharedPlace from = shared_place(w, i, l, operand(i, 0).at(w, l), static_cast<int>(box.bytes()));
  if (from.offset % 128) fail(w, i, l, "the source of a TMA store is not aligned to 128 bytes");
  if (i.flags & kReduceAdd && box.map.type != 6 && box.map.type != 7 && box.map.type != 9)
    fail(w, i, l, "a TMA reduction of this type is not simulated");
  race::async_read(w, i, l, *from.cta, from.offset, static_cast<int>(box.bytes()));
  auto operation = [&w, &i, l, box, from] {
    box.each_piece(from.offset, [&](uint64_t address, uint32_t offset, int64_t low, int64_t high) {
      if (low >= high) return;
      uint8_t* to = global_bytes(w, i, l, address + static_cast<uint64_t>(low), high - low, Access::kAsyncStore);
      const uint8_t* source = from.cta->shared.data() + offset + low;
      if (i.flags & kReduceAdd)
        add_to(to, source, high - low, box.map);
      else
        std::memcpy(to, source, static_cast<size_t>(high - low));
    });
  };
  store_later(w, l, operation, from, static_cast<int>(box.bytes()));
}

// Without a map: contiguous bytes, 16-byte aligned.
void linear(Warp& w, const Instr& i, int l) {
  AsyncQueue& q = queue(w);
  const uint32_t bytes = w.reg<uint32_t>(i.list[kSize])[l];
  const uint64_t global = operand(i, 1).at(w, l);
  const SharedPlace shared = shared_place(w, i, l, operand(i, 0).at(w, l), static_cast<int>(bytes));
  if (bytes % 16 || global % 16 || shared.offset % 16) fail(w, i, l, "a bulk copy is not aligned to 16 bytes");
  if (!(i.flags & kLoad)) {
    race::async_read(w, i, l, *shared.cta, shared.offset, static_cast<int>(bytes));
    auto operation = [&w, &i, l, global, shared, bytes] {
      for (uint32_t at = 0; at < bytes; at += 16)
        std::memcpy(global_bytes(w, i, l, global + at, 16, Access::kAsyncStore), shared.cta->shared.data() + shared.offset + at, 16);
    };
    return store_later(w, l, operation, shared, static_cast<int>(bytes));
  }
  const SharedPlace bar = shared_place(w, i, l, operand(i, 2).at(w, l), 8);
  const auto key = AsyncQueue::key(*bar.cta, bar.offset);
  if (!q.barriers.count(key)) fail(w, i, l, "a bulk copy signals an mbarrier before mbarrier.init");
  race::async_write(w, i, l, *shared.cta, shared.offset, static_cast<int>(bytes));
  q.add(key, [&q, &w, &i, l, key, global, shared, bytes] {
    for (uint32_t at = 0; at < bytes; at += 16)
      std::memcpy(shared.cta->shared.data() + shared.offset + at, global_bytes(w, i, l, global + at, 16, Access::kAsyncLoad), 16);
    q.arrive(key, 0, bytes);
  });
}

Flow bulk(Warp& w, const Instr& i, Mask m) {
  for_lanes(m, [&](int l) {
    if (!(i.flags & kTensor))
      linear(w, i, l);
    else if (i.flags & kLoad)
      tensor_load(w, i, l);
    else
      tensor_store(w, i, l);
  });
  ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}

Flow commit(Warp& w, const Instr&, Mask m) {
  AsyncState& state = queue(w).state(w);
  for_lanes(m, [&](int l) {
    state.bulk[l].push_back(std::move(state.bulk_open[l]));
    state.bulk_open[l] = {};
  });
  return Flow::kNext;
}
Flow wait_group(Warp& w, const Instr& i, Mask m) {
  AsyncState& state = queue(w).state(w);
  for_lanes(m, [&](int l) {
    while (static_cast<int64_t>(state.bulk[l].size()) > i.imm) {
      for (auto& operation : state.bulk[l].front().operations) operation();
      for (const SharedRead& read : state.bulk[l].front().reads) race::end_read(w, l, read);
      state.bulk[l].pop_front();
    }
  });
  ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}
Flow nothing(Warp&, const Instr&, Mask) { return Flow::kNext; }

}  // namespace

void decode_bulk(Decoder& d, const Statement& s, Instr& i) {
  if (s.has("prefetch")) {
    i.exec = nothing;
    return;
  }
  i.whole = true;
  if (s.has("commit_group")) {
    i.exec = commit;
    return;
  }
  if (s.has("wait_group")) {
    i.imm = parse_integer(s.operands[0]);
    i.exec = wait_group;
    return;
  }
  if (s.has("im2col") || s.has("im2col_no_offs") || (s.has("reduce") || s.words[1] == "reduce" ? !s.has("add") || !s.has("tensor") : false))
    return;
  const bool load = s.has("mbarrier::complete_tx::bytes"), tensor = s.has("tensor");
  if (!s.has("global")) return;
  i.flags = static_cast<uint8_t>((load ? kLoad : 0) | (tensor ? kTensor : 0) | (s.words[1] == "reduce" ? kReduceAdd : 0));
  std::vector<uint32_t> list(kCoordinates, 0);
  const auto place = [&](int k, const std::string& text) {
    Instr at;
    d.address(text, at);
    list[3 * k] = at.a;
    list[3 * k + 1] = static_cast<uint32_t>(at.imm);
    list[3 * k + 2] = at.address32;
  };
  const std::string &first = s.operands[0], &second = s.operands[1];
  std::string global = load ? second : first;
  if (tensor) {  // "[map, {c0, c1}]"
    const auto parts = split_operands(std::string_view(global).substr(1, global.size() - 2));
    const auto coordinates = Decoder::elements(parts[1]);
    for (const std::string& c : coordinates) list.push_back(d.source(c, kU32));
    i.count = static_cast<uint8_t>(coordinates.size());
    global = "[" + parts[0] + "]";
  }
  place(0, load ? first : second);
  place(1, global);
  size_t next = 2;
  if (!tensor) list[kSize] = d.source(s.operands[next++], kU32);
  if (load) place(2, s.operands[next++]);
  if (s.has("multicast::cluster")) list[kMask] = d.source(s.operands[next++], kU16);
  i.list = d.list(list);
  i.exec = bulk;
}

}  // namespace gpusim
