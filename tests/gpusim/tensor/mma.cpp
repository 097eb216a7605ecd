// Warp-wide matrix products and the loads that feed them. PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: mma, ldmatrix,
// stmatrix, movmatrix" and the matrix fragments there. Sums are formed in float32, k ascending, one rounding per step.
#include "../exec/access.h"
#include "fragments.h"

namespace gpusim {
namespace {

// .aligned: every living lane must be at this instruction.
bool whole_warp(Warp& w, const Instr& i, Mask m) {
  if (m != w.live) {
    w.now->why = "the other lanes of its warp at an .aligned instruction";
    return false;
  }
  if (m != kAll) fail(w, i, lowest(m), "a warp-wide matrix instruction in a warp with exited lanes");
  return true;
}

// list: registers of d, a, b, c. width: k; count: registers of a row of A per lane; flags: Element.

template <int K>
void multiply(const float (&a)[16][16], const float (&b)[16][8], float (&c)[16][8]) {
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) c[r][n] = std::fma(a[r][k], b[k][n], c[r][n]);
}

Flow mma(Warp& w, const Instr& i, Mask m) {
  if (!whole_warp(w, i, m)) return Flow::kWait;
  const auto e = static_cast<Element>(i.flags);
  const int k_size = i.width, a_count = i.list[0], b_count = i.list[1];
  const uint32_t *d = i.list + 2, *a = d + 4, *b = a + a_count, *c = b + b_count;
  float A[16][16], B[16][8], C[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const int group = l / 4, column = l % 4;
    for (int j = 0; j < a_count; ++j) {
      const uint32_t bits = w.reg<uint32_t>(a[j])[l];
      const int row = group + 8 * (j & 1), part = j >> 1;
      if (e == Element::kTf32) {
        A[row][column + 4 * part] = tf32(bits);
      } else {
        A[row][2 * column + 8 * part] = element(e, static_cast<uint16_t>(bits));
        A[row][2 * column + 8 * part + 1] = element(e, static_cast<uint16_t>(bits >> 16));
      }
    }
    for (int j = 0; j < b_count; ++j) {
      const uint32_t bits = w.reg<uint32_t>(b[j])[l];
      if (e == Element::kTf32) {
        B[column + 4 * j][group] = tf32(bits);
      } else {
        B[2 * column + 8 * j][group] = element(e, static_cast<uint16_t>(bits));
        B[2 * column + 8 * j + 1][group] = element(e, static_cast<uint16_t>(bits >> 16));
      }
    }
    for (int j = 0; j < 4; ++j) {
      const int row = group + 8 * (j >> 1), n = 2 * column + (j & 1);
      C[row][n] = w.reg<float>(c[j])[l];
    }
  }
  if (k_size == 16) multiply<16>(A, B, C);
  if (k_size == 8) multiply<8>(A, B, C);
  for (int l = 0; l < kLanes; ++l)
    for (int j = 0; j < 4; ++j) w.reg<float>(d[j])[l] = C[l / 4 + 8 * (j >> 1)][2 * (l % 4) + (j & 1)];
  w.cta->cluster->launch->counters.tensor_macs += static_cast<uint64_t>(16 * 8 * k_size);
  return Flow::kNext;
}

void decode_mma(Decoder& d, const Statement& s, Instr& i) {
  const bool tf32 = s.has("tf32"), bf16 = s.has("bf16"), f16 = s.has("f16");
  i.width = s.has("m16n8k16") ? 16 : s.has("m16n8k8") ? 8 : 0;
  Type result;
  for (size_t k = 1; k < s.words.size(); ++k)
    if (parse_type(s.words[k], &result)) break;
  if (!i.width || !s.has("row") || !s.has("col") || (!tf32 && !bf16 && !f16) || s.has("sp") || result.kind != Kind::kFloat) return;
  i.flags = static_cast<uint8_t>(tf32 ? Element::kTf32 : bf16 ? Element::kBFloat : Element::kHalf);
  std::vector<uint32_t> registers(2);
  const Type word{Kind::kBits, 4};
  for (int operand = 0; operand < 4; ++operand) {
    const auto names = Decoder::elements(s.operands[operand]);
    if (operand == 1) registers[0] = static_cast<uint32_t>(names.size());
    if (operand == 2) registers[1] = static_cast<uint32_t>(names.size());
    for (const std::string& name : names) registers.push_back(operand ? d.source(name, word) : d.destination(name));
  }
  i.list = d.list(registers);
  i.whole = true;
  i.exec = mma;
}

// count: number of 8x8 matrices; flags: 1 transposed. Lane 8k + r gives the address of row r of matrix k.
template <bool kLoading>
Flow matrix_move(Warp& w, const Instr& i, Mask m) {
  if (!whole_warp(w, i, m)) return Flow::kWait;
  for (int k = 0; k < i.count; ++k) {
    uint8_t* rows[8];
    uint64_t addresses[kLanes];
    for (int r = 0; r < 8; ++r) {
      addresses[r] = w.address(i, i.a, 8 * k + r);
      rows[r] = resolve(w, i, 8 * k + r, addresses[r], Space(i.space), 16, kLoading ? Access::kLoad : Access::kStore);
    }
    count_banks(*w.cta->cluster->launch, addresses, 0xff, 16);
    for (int l = 0; l < kLanes; ++l)
      for (int j = 0; j < 2; ++j) {
        const int row = i.flags ? 2 * (l % 4) + j : l / 4, column = i.flags ? l / 4 : 2 * (l % 4) + j;
        auto* in_register = reinterpret_cast<uint8_t*>(w.reg<uint32_t>(i.list[k]) + l) + 2 * j;
        if (kLoading)
          std::memcpy(in_register, rows[row] + 2 * column, 2);
        else
          std::memcpy(rows[row] + 2 * column, in_register, 2);
      }
  }
  if (!kLoading) ++w.cta->cluster->launch->progress;
  return Flow::kNext;
}

template <bool kLoading>
void decode_matrix(Decoder& d, const Statement& s, Instr& i) {
  if (!s.has("m8n8") || !s.has("b16")) return;
  d.address(s.operands[kLoading ? 1 : 0], i);
  std::vector<uint32_t> registers;
  for (const std::string& name : Decoder::elements(s.operands[kLoading ? 0 : 1])) registers.push_back(d.destination(name));
  i.list = d.list(registers);
  i.count = static_cast<uint8_t>(registers.size());
  i.flags = s.has("trans");
  i.space = s.has("shared") || s.has("shared::cta") ? kShared : kGeneric;
  i.whole = true;
  i.exec = matrix_move<kLoading>;
}

// movmatrix.trans: the transpose of an 8x8 matrix that lies in registers.
Flow transpose(Warp& w, const Instr& i, Mask m) {
  if (!whole_warp(w, i, m)) return Flow::kWait;
  uint16_t x[8][8];
  for (int l = 0; l < kLanes; ++l)
    for (int j = 0; j < 2; ++j) x[l / 4][2 * (l % 4) + j] = static_cast<uint16_t>(w.reg<uint32_t>(i.a)[l] >> (16 * j));
  for (int l = 0; l < kLanes; ++l) w.reg<uint32_t>(i.d)[l] = x[2 * (l % 4)][l / 4] | uint32_t{x[2 * (l % 4) + 1][l / 4]} << 16;
  return Flow::kNext;
}
void decode_movmatrix(Decoder& d, const Statement& s, Instr& i) {
  i.d = d.destination(s.operands[0]);
  i.a = d.source(s.operands[1], kU32);
  i.whole = true;
  i.exec = transpose;
}

const Opcodes opcodes{
    {"mma", decode_mma}, {"ldmatrix", decode_matrix<true>}, {"stmatrix", decode_matrix<false>}, {"movmatrix", decode_movmatrix}};

}  // namespace
}  // namespace gpusim
