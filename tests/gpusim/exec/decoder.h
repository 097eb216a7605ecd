// From a statement to an Instr. Each file of exec/, tensor/ and async/ registers what decodes its opcodes.
#pragma once
#include <set>
#include <string>
#include <unordered_map>

#include "machine.h"

namespace gpusim {

struct Slot {
  uint32_t offset = 0;
  uint8_t width = 4;  // 2, 4, 8; a predicate is one word of 4
  bool predicate = false;
};

class Decoder {
 public:
  using Decode = void (*)(Decoder&, const Statement&, Instr&);
  static std::unordered_map<std::string, Decode>& table();  // by the first word of an opcode
  static std::unique_ptr<Kernel> decode(const Module& module, const std::string& name, const std::map<std::string, uint64_t>& globals);

  // Operands of the statement at hand.
  Slot slot(const std::string& operand, Type type);                                       // register, immediate, symbol or special register
  uint32_t source(const std::string& operand, Type type);                                 // the same, with the width checked
  uint32_t destination(const std::string& operand);                                       // "_" is a register nobody reads
  void address(const std::string& operand, Instr& i, uint32_t Instr::* reg = &Instr::a);  // "[%rd1+16]"
  const uint32_t* list(const std::vector<uint32_t>& registers);
  uint32_t predicate(const std::string& operand, bool* negated);  // "%p1", "!%p1"
  uint32_t constant(uint64_t bits, int width);
  uint32_t allocate(int width);
  uint32_t carry() { return carry_ ? carry_ : carry_ = allocate(0); }    // the predicate of extended-precision arithmetic
  static std::vector<std::string> elements(const std::string& operand);  // of "{%r1, %r2}", or the operand itself
  Type type_of(const Statement& s, int from_end = 0) const;              // the last type suffix (or the one before it)
  void jump(const std::string& label, Instr& i);                         // i.imm = its pc, once known
  void call(const Statement& s);
  [[noreturn]] void unknown(const Statement& s, const std::string& why) const;
  bool in_entry() const { return frame_->function->entry; }

  Kernel& kernel() { return *kernel_; }

 private:
  struct Frame {  // one function of the kernel: recursion does not exist here, so every function has its registers once
    const Function* function;
    Body body;
    uint32_t entry_pc = 0;
    std::vector<std::map<std::string, Slot, std::less<>>> registers;  // by scope
    std::map<std::string, uint32_t> locals;                           // .local variables, bytes into the thread's local memory
    std::map<std::string, uint32_t> frames;  // .param variables of calls and of this function: registers of 8 bytes
    std::vector<uint32_t> pc_of_statement;
  };
  Decoder(const Module& module, const std::map<std::string, uint64_t>& globals) : module_(module), globals_(globals) {}
  Frame* function(const std::string& name);
  void decode_body(Frame* frame);
  bool find_register(const std::string& name, Slot* slot);
  bool find_special(const std::string& name, Slot* slot);
  bool find_symbol(const std::string& name, uint64_t* value, bool* parameter, Space* space);
  uint32_t relocated(uint64_t bits, int width, bool parameter);
  void emit(const Statement& s, Instr i);
  void copy_frame(const Statement& s, uint32_t to, uint32_t from, int64_t bytes);

  const Module& module_;
  const std::map<std::string, uint64_t>& globals_;
  std::unique_ptr<Kernel> kernel_;
  std::map<std::string, Frame> frames_;
  std::vector<std::string> waiting_;  // functions called but not decoded yet
  Frame* frame_ = nullptr;
  uint32_t carry_ = 0;
  const Statement* statement_ = nullptr;
  std::map<std::tuple<uint64_t, int, bool>, uint32_t> constants_;
  std::map<std::string, Slot> specials_;
  std::map<std::string, uint64_t> shared_;
  struct Fix {
    uint32_t pc;
    Frame* frame;
    int statement;
    std::string function;
  };
  std::vector<Fix> fixes_;
};

// Registration at start-up: static const Opcodes names{{"add", decode_add}, ...};
struct Opcodes {
  Opcodes(std::initializer_list<std::pair<const char*, Decoder::Decode>> list) {
    for (const auto& [name, decode] : list) Decoder::table()[name] = decode;
  }
};

Space space_of(const Statement& s);  // of the addresses of a load, a store, an atomic or a conversion

// "d|p": two results, the second of which may be missing.
inline std::pair<std::string, std::string> split_pair(const std::string& operand) {
  const size_t bar = operand.find('|');
  if (bar == std::string::npos) return {operand, ""};
  return {std::string(trim(operand.substr(0, bar))), std::string(trim(operand.substr(bar + 1)))};
}

// f.template operator()<T>() for the C++ type of a PTX type.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class F>
Exec for_integer(Type t, const F& f) {
  if (t.kind == Kind::kSigned) {
    switch (t.size) {
      case 2:
        return f.template operator()<int16_t>();
      case 4:
        return f.template operator()<int32_t>();
      case 8:
        return f.template operator()<int64_t>();
    }
  } else {
    switch (t.size) {
      case 2:
        return f.template operator()<uint16_t>();
      case 4:
        return f.template operator()<uint32_t>();
      case 8:
        return f.template operator()<uint64_t>();
    }
  }
  return nullptr;
}
template <class F>
Exec for_float(Type t, const F& f) {
  if (t.kind == Kind::kFloat) return t.size == 8 ? f.template operator()<double>() : f.template operator()<float>();
  if (t.kind == Kind::kHalf) return f.template operator()<Half>();
  if (t.kind == Kind::kBFloat) return f.template operator()<BFloat>();
  return nullptr;
}
inline bool is_float(Type t) { return t.kind == Kind::kFloat || t.kind == Kind::kHalf || t.kind == Kind::kBFloat; }
constexpr Type kU16{Kind::kUnsigned, 2}, kU32{Kind::kUnsigned, 4}, kU64{Kind::kUnsigned, 8}, kPred{Kind::kPredicate, 4};

}  // namespace gpusim
