// Products of a warpgroup. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions: wgmma.mma_async, wgmma.fence,
// wgmma.commit_group, wgmma.wait_group".
// A warp computes its 16 rows. Late: at wait_group, from the descriptors and A registers of the time it was issued.
#include "../async/queue.h"
#include "../exec/access.h"
#include "../exec/race.h"
#include "fragments.h"

namespace gpusim {
namespace {

AsyncQueue& queue(Warp& w) { return *w.cta->cluster->async; }

bool whole_warp(Warp& w, const Instr& i, Mask m) {
  if (m != kAll) {
    if (w.live != kAll) fail(w, i, lowest(m), "a warpgroup instruction in a warp with exited lanes");
    w.now->why = "the other lanes of its warp at an .aligned instruction";
    return false;
  }
  return true;
}

// PTX ISA, "Matrix Descriptor Format" and "Shared Memory Matrix Layout": a matrix in shared memory. W: 16-byte chunks per swizzled row, 1
// without swizzle.
struct Descriptor {
  uint32_t start, leading, stride, W;
  explicit Descriptor(uint64_t d) : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {
    static constexpr uint32_t chunks[4] = {1, 8, 4, 2};
    W = chunks[d >> 62];
  }
  // Offset of the chunk that holds elements (row, k .. ) of a K-major matrix, or (row .., k) of an MN-major one; `row` is m or n.
  uint32_t chunk(int row, int k, int per_chunk, bool mn_major) const {
    uint32_t at;
    const auto r = static_cast<uint32_t>(row), kk = static_cast<uint32_t>(k), n = static_cast<uint32_t>(per_chunk);
    if (!mn_major) {
      at = W > 1 ? (r % 8) * 16 * W + (r / 8) * stride + kk / n * 16 : (r % 8) * 16 + (r / 8) * stride + kk / n * leading;
    } else {
      const uint32_t c = r / n;
      at = W > 1 ? (c % W) * 16 + (c / W) * leading + (kk % 8) * 16 * W + (kk / 8) * stride
                 : c * stride + (kk % 8) * 16 + (kk / 8) * leading;
    }
    at += start;
    return at ^ ((at >> 7 & (W - 1)) << 4);
  }
};

struct Product {
  Warp* w;
  const Instr* i;
  uint64_t a = 0, b = 0;
  bool keep = true;  // add to the old accumulators
  uint32_t a_registers[4][kLanes];
};

// list: number of accumulators, A registers (0: descriptor), registers of D, A; width: k; count: n / 8; flags below.
enum ProductFlags : uint8_t { kElement = 3, kTransposeA = 4, kTransposeB = 8, kNegateA = 16, kNegateB = 32, kARegisters = 64 };

float load_element(Element e, const uint8_t* chunk, int index) {
  if (e == Element::kTf32) {
    uint32_t bits;
    std::memcpy(&bits, chunk + 4 * index, 4);
    return tf32(bits);
  }
  uint16_t bits;
  std::memcpy(&bits, chunk + 2 * index, 2);
  return element(e, bits);
}

const uint8_t* chunk_bytes(const Product& p, uint32_t offset, bool check) {
  Cta& cta = *p.w->cta;
  if (offset < kSharedBase || offset + 16 > cta.shared.size()) fail(*p.w, *p.i, 0, "a wgmma descriptor points outside shared memory");
  if (check) race::async_read(*p.w, *p.i, 0, cta, offset, 16);
  return cta.shared.data() + offset;
}

// Rows [first, first + rows) of an operand, as rows x k floats (K-major) in `out`, with `pitch` floats from k to k + 1.
void gather(const Product& p, uint64_t descriptor, int first, int rows, int k_size, Element e, bool mn_major, float* out, int pitch,
            bool check) {
  const Descriptor d(descriptor);
  const int per_chunk = e == Element::kTf32 ? 4 : 8;
  for (int k = 0; k < k_size; k += mn_major ? 1 : per_chunk)
    for (int r = 0; r < rows; r += mn_major ? per_chunk : 1) {
      const uint8_t* chunk = chunk_bytes(p, d.chunk(first + r, k, per_chunk, mn_major), check);
      for (int j = 0; j < per_chunk && out; ++j) out[mn_major ? k * pitch + r + j : (k + j) * pitch + r] = load_element(e, chunk, j);
    }
}

void multiply(const Product& p) {
  const Instr& i = *p.i;
  Warp& w = *p.w;
  const auto e = static_cast<Element>(i.flags & kElement);
  const int n = 8 * i.count, k_size = i.width, row = 16 * (w.index % 4);
  static thread_local float A[16][16], B[16][256], C[16][256];
  if (i.flags & kARegisters) {
    for (int l = 0; l < kLanes; ++l)
      for (int j = 0; j < 4; ++j)
        for (int half = 0; half < (e == Element::kTf32 ? 1 : 2); ++half) {
          const uint32_t bits = p.a_registers[j][l];
          const int r = l / 4 + 8 * (j & 1);
          if (e == Element::kTf32)
            A[l % 4 + 4 * (j >> 1)][r] = tf32(bits);
          else
            A[2 * (l % 4) + 8 * (j >> 1) + half][r] = element(e, static_cast<uint16_t>(bits >> (16 * half)));
        }
  } else {
    gather(p, p.a, row, 16, k_size, e, i.flags & kTransposeA, &A[0][0], 16, false);
  }
  gather(p, p.b, 0, n, k_size, e, i.flags & kTransposeB, &B[0][0], 256, false);
  const float sign = ((i.flags & kNegateA) != 0) != ((i.flags & kNegateB) != 0) ? -1.0f : 1.0f;
  const auto each = [&](const auto& f) {
    for (int j = 0; j < n / 2; ++j)
      for (int l = 0; l < kLanes; ++l) f(w.reg<float>(i.list[2 + j])[l], C[l / 4 + 8 * (j >> 1 & 1)][8 * (j / 4) + 2 * (l % 4) + (j & 1)]);
  };
  if (p.keep)
    each([](float& reg, float& c) { c = reg; });
  else
    std::memset(C, 0, sizeof(C));
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < k_size; ++k) {
      const float a = sign * A[k][r];
      for (int c = 0; c < n; ++c) C[r][c] = std::fma(a, B[k][c], C[r][c]);
    }
  each([](float& reg, float& c) { reg = c; });
}

Flow mma_async(Warp& w, const Instr& i, Mask m) {
  if (!whole_warp(w, i, m)) return Flow::kWait;
  Product p;
  p.w = &w;
  p.i = &i;
  if (i.flags & kARegisters) {
    for (int j = 0; j < 4; ++j)
      std::memcpy(p.a_registers[j], w.reg<uint32_t>(i.list[2 + i.list[0] + static_cast<uint32_t>(j)]), sizeof(p.a_registers[j]));
  } else {
    p.a = w.reg<uint64_t>(i.a)[0];
  }
  p.b = w.reg<uint64_t>(i.b)[0];
  p.keep = w.pred(i.c) & 1;
  if (race::enabled()) {
    const auto e = static_cast<Element>(i.flags & kElement);
    if (!(i.flags & kARegisters)) gather(p, p.a, 16 * (w.index % 4), 16, i.width, e, i.flags & kTransposeA, nullptr, 0, true);
    gather(p, p.b, 0, 8 * i.count, i.width, e, i.flags & kTransposeB, nullptr, 0, true);
  }
  w.cta->cluster->launch->counters.tensor_macs += 16ull * 8 * i.count * i.width;
  AsyncState& state = queue(w).state(w);
  // In order: early only when nothing before it waits.
  if (state.products_open.operations.empty() && state.products_done == state.products_committed && queue(w).now())
    multiply(p);
  else
    state.products_open.operations.push_back([p] { multiply(p); });
  return Flow::kNext;
}

Flow commit(Warp& w, const Instr& i, Mask m) {
  if (!whole_warp(w, i, m)) return Flow::kWait;
  AsyncState& state = queue(w).state(w);
  state.products.push_back(std::move(state.products_open));
  state.products_open = {};
  ++state.products_committed;
  ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}

// The hardware's groups are those of the warpgroup: they end for all four warps at once.
Flow wait_group(Warp& w, const Instr& i, Mask m) {
  if (!whole_warp(w, i, m)) return Flow::kWait;
  const uint64_t committed = queue(w).state(w).products_committed, may_stay = static_cast<uint64_t>(i.imm);
  const uint64_t target = committed > may_stay ? committed - may_stay : 0;
  const int first = w.index / 4 * 4;
  for (int k = first; k < first + 4 && k < static_cast<int>(w.cta->warps.size()); ++k)
    if (queue(w).state(w.cta->warps[static_cast<size_t>(k)]).products_committed < target) {
      w.now->why = "the other warps of its warpgroup to commit";
      return Flow::kWait;
    }
  for (int k = first; k < first + 4 && k < static_cast<int>(w.cta->warps.size()); ++k) {
    AsyncState& state = queue(w).state(w.cta->warps[static_cast<size_t>(k)]);
    for (; state.products_done < target; ++state.products_done) {
      for (auto& operation : state.products.front().operations) operation();
      state.products.pop_front();
    }
  }
  ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}
Flow fence(Warp& w, const Instr& i, Mask m) { return whole_warp(w, i, m) ? Flow::kNext : Flow::kWait; }

void decode_wgmma(Decoder& d, const Statement& s, Instr& i) {
  i.whole = true;
  if (s.words[1] == "fence") {
    i.exec = fence;
  } else if (s.words[1] == "commit_group") {
    i.exec = commit;
  } else if (s.words[1] == "wait_group") {
    i.imm = parse_integer(s.operands[0]);
    i.exec = wait_group;
  } else if (s.words[1] == "mma_async" && d.type_of(s, 2) == Type{Kind::kFloat, 4}) {
    const Type t = d.type_of(s);
    const Element e = t.kind == Kind::kHalf ? Element::kHalf : t.kind == Kind::kBFloat ? Element::kBFloat : Element::kTf32;
    if (t.kind != Kind::kHalf && t.kind != Kind::kBFloat && t.kind != Kind::kTf32) return;
    int n = 0, k = 0;
    for (const std::string& word : s.words)
      if (std::sscanf(word.c_str(), "m64n%dk%d", &n, &k) == 2) break;
    i.flags = static_cast<uint8_t>(e);
    i.count = static_cast<uint8_t>(n / 8);
    i.width = static_cast<uint8_t>(k);
    const auto accumulators = Decoder::elements(s.operands[0]);
    std::vector<uint32_t> registers{static_cast<uint32_t>(accumulators.size()), 0};
    if (static_cast<int>(accumulators.size()) != n / 2) return;
    for (const std::string& name : accumulators) registers.push_back(d.destination(name));
    if (s.operands[1][0] == '{') {
      i.flags |= kARegisters;
      for (const std::string& name : Decoder::elements(s.operands[1])) registers.push_back(d.source(name, kU32));
    } else {
      i.a = d.source(s.operands[1], kU64);
    }
    i.b = d.source(s.operands[2], kU64);
    i.c = d.source(s.operands[3], kPred);
    if (parse_integer(s.operands[4]) < 0) i.flags |= kNegateA;
    if (parse_integer(s.operands[5]) < 0) i.flags |= kNegateB;
    size_t at = 6;
    if (!(i.flags & kARegisters) && at + 1 < s.operands.size() && parse_integer(s.operands[at++])) i.flags |= kTransposeA;
    if (at < s.operands.size() && parse_integer(s.operands[at])) i.flags |= kTransposeB;
    i.list = d.list(registers);
    i.exec = mma_async;
  }
}

const Opcodes opcodes{{"wgmma", decode_wgmma}};

}  // namespace
}  // namespace gpusim
