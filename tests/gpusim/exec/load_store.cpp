// Loads, stores and atomics. PTX ISA, "Data Movement and Conversion Instructions: ld, st",
// "Parallel Synchronization and Communication Instructions: atom, red"; memory is sequentially
// consistent here, so orders and scopes only matter to the race check.
#include <algorithm>
#include <cmath>

#include "access.h"
#include "decoder.h"
#include "floats.h"
#include "race.h"

namespace gpusim {
namespace {

// Bytes of a .param variable of a call, kept in registers of 8 bytes; no access crosses 8 bytes.
uint8_t* frame_bytes(Warp& w, uint32_t slot, int64_t at, int lane) {
  return w.registers + slot + (at / 8) * 8 * kLanes + lane * 8 + at % 8;
}

enum AccessFlags : uint8_t { kSigned8 = 1, kSync = 2, kRelease = 4 };  // extend by the sign; volatile, relaxed, acquire or release; release

// width: bytes of an element in memory; list[k]: its register, of list[count + k] bytes.
Flow load(Warp& w, const Instr& i, Mask m) {
  const int bytes = i.width * i.count;
  uint64_t addresses[kLanes];
  for_lanes(m, [&](int l) {
    const uint8_t* data = i.space == kFrame ? nullptr
                                            : resolve(w, i, l, addresses[l] = w.address(i, i.a, l), Space(i.space), bytes,
                                                      i.flags & kSync ? Access::kSyncLoad : Access::kLoad);
    for (int k = 0; k < i.count; ++k) {
      uint64_t value = 0;
      std::memcpy(&value, data ? data + k * i.width : frame_bytes(w, i.a, i.imm + k * i.width, l), i.width);
      if (i.flags & kSigned8) value = static_cast<uint64_t>(static_cast<int64_t>(value << (64 - 8 * i.width)) >> (64 - 8 * i.width));
      if (i.list[k]) put(w, i.list[k], static_cast<int>(i.list[i.count + k]), l, value);
    }
  });
  if (i.space == kShared) count_banks(*w.cta->cluster->launch, addresses, m, bytes);
  return Flow::kNext;
}

Flow store(Warp& w, const Instr& i, Mask m) {
  if (i.flags & kRelease) race::fence(w);
  const int bytes = i.width * i.count;
  uint64_t addresses[kLanes];
  for_lanes(m, [&](int l) {
    uint8_t* data = i.space == kFrame ? nullptr
                                      : resolve(w, i, l, addresses[l] = w.address(i, i.a, l), Space(i.space), bytes,
                                                i.flags & kSync ? Access::kSyncStore : Access::kStore);
    for (int k = 0; k < i.count; ++k) {
      const uint64_t value = get(w, i.list[k], static_cast<int>(i.list[i.count + k]), l);
      std::memcpy(data ? data + k * i.width : frame_bytes(w, i.a, i.imm + k * i.width, l), &value, i.width);
    }
  });
  ++w.cta->cluster->launch->progress;
  if (i.space == kShared) count_banks(*w.cta->cluster->launch, addresses, m, bytes);
  return Flow::kNext;
}

void elements(Decoder& d, const std::string& operand, Type t, Instr& i, bool loading) {
  std::vector<uint32_t> registers, widths;
  for (const std::string& name : Decoder::elements(operand)) {
    if (name == "_") {
      registers.push_back(0);
      widths.push_back(4);
      continue;
    }
    const Slot s = d.slot(name, t);
    registers.push_back(loading ? d.destination(name) : s.offset);
    widths.push_back(s.width);
  }
  i.count = static_cast<uint8_t>(registers.size());
  registers.insert(registers.end(), widths.begin(), widths.end());
  i.list = d.list(registers);
}

template <bool kLoading>
void decode_access(Decoder& d, const Statement& s, Instr& i) {
  const Type t = d.type_of(s);
  if (t.size > 8 || s.has("async")) return;
  i.width = static_cast<uint8_t>(t.bytes());
  i.space = space_of(s);
  const bool sync = s.has("volatile") || s.has("relaxed") || s.has("acquire") || s.has("release");
  i.flags = static_cast<uint8_t>((t.kind == Kind::kSigned ? kSigned8 : 0) | (sync ? kSync : 0) | (s.has("release") ? kRelease : 0));
  d.address(s.operands[kLoading ? 1 : 0], i);
  elements(d, s.operands[kLoading ? 0 : 1], t, i, kLoading);
  i.exec = kLoading ? load : store;
}

// ---- atomics: old = memory; memory = op(old, b[, c])
enum AtomicOp : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas };

template <class T>
T apply(AtomicOp op, T old, T b, T c) {
  if constexpr (std::is_integral_v<T>) {
    switch (op) {
      case kAnd:
        return old & b;
      case kOr:
        return old | b;
      case kXor:
        return old ^ b;
      case kAdd:
        return static_cast<T>(uint64_t(old) + uint64_t(b));
      default:
        break;
    }
  }
  switch (op) {
    case kAdd:
      return from_wide<T>(wide(old) + wide(b));
    case kMin:
      return wide(b) < wide(old) ? b : old;
    case kMax:
      return wide(b) > wide(old) ? b : old;
    case kCas:
      return !std::memcmp(&old, &b, sizeof(T)) ? c : old;
    default:
      return b;
  }
}

// d: whether it releases; count: elements of a vector. The registers of b, c and the result in list, 3 per element.
template <class T>
Flow atomic(Warp& w, const Instr& i, Mask m) {
  if (i.d) race::fence(w);
  for_lanes(m, [&](int l) {
    uint8_t* data = resolve(w, i, l, w.address(i, i.a, l), Space(i.space), i.width * i.count, Access::kAtomic);
    for (int k = 0; k < i.count; ++k) {
      T old, b, c;
      std::memcpy(&old, data + k * i.width, sizeof(T));
      const uint64_t raw_b = get(w, i.list[3 * k], std::max<int>(i.width, 2), l),
                     raw_c = get(w, i.list[3 * k + 1], std::max<int>(i.width, 2), l);
      std::memcpy(&b, &raw_b, sizeof(T));
      std::memcpy(&c, &raw_c, sizeof(T));
      const T fresh = apply(AtomicOp(i.flags), old, b, c);
      std::memcpy(data + k * i.width, &fresh, sizeof(T));
      uint64_t result = 0;
      std::memcpy(&result, &old, sizeof(T));
      if (i.list[3 * k + 2]) put(w, i.list[3 * k + 2], std::max<int>(i.width, 2), l, result);
    }
  });
  ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}
void decode_atomic(Decoder& d, const Statement& s, Instr& i) {
  static const std::map<std::string, AtomicOp> ops = {
      {"add", kAdd}, {"min", kMin}, {"max", kMax}, {"and", kAnd}, {"or", kOr}, {"xor", kXor}, {"exch", kExch}, {"cas", kCas},
  };
  const bool returns = s.words[0] == "atom";
  if (s.has("async")) return;
  Type t = d.type_of(s);
  const auto op = std::find_if(s.words.begin() + 1, s.words.end(), [&](const std::string& word) { return ops.count(word) > 0; });
  if (op == s.words.end() || t.size > 8) return;
  i.flags = ops.at(*op);
  i.space = space_of(s);
  i.d = s.has("release") || s.has("acq_rel");
  i.width = static_cast<uint8_t>(t.bytes());
  const size_t at = returns ? 1 : 0;
  d.address(s.operands[at], i);
  const auto b = Decoder::elements(s.operands[at + 1]);
  const auto results = returns ? Decoder::elements(s.operands[0]) : std::vector<std::string>(b.size(), "");
  std::vector<uint32_t> registers;
  for (size_t k = 0; k < b.size(); ++k) {
    const uint32_t value = d.source(b[k], t);
    registers.push_back(value);
    registers.push_back(i.flags == kCas ? d.source(s.operands[at + 2], t) : value);
    registers.push_back(returns && results[k] != "_" ? d.destination(results[k]) : 0);
  }
  i.count = static_cast<uint8_t>(b.size());
  i.list = d.list(registers);
  if (t.packed == 2) return;
  if (is_float(t))
    i.exec = for_float(t, []<class T>() -> Exec { return atomic<T>; });
  else
    i.exec = for_integer(t, []<class T>() -> Exec { return atomic<T>; });
}

Flow nothing(Warp&, const Instr&, Mask) { return Flow::kNext; }
void decode_nothing(Decoder&, const Statement&, Instr& i) { i.exec = nothing; }

// "Parallel Synchronization and Communication Instructions: membar, fence": of the scope of a CTA or wider. Proxy fences are in async/.
Flow memory_fence(Warp& w, const Instr&, Mask) {
  race::fence(w);
  return Flow::kNext;
}
void decode_membar(Decoder&, const Statement& s, Instr& i) { i.exec = s.has("cta") ? nothing : memory_fence; }

const Opcodes opcodes{{"ld", decode_access<true>}, {"st", decode_access<false>}, {"atom", decode_atomic},
                      {"red", decode_atomic},      {"prefetch", decode_nothing}, {"membar", decode_membar}};

}  // namespace
}  // namespace gpusim
