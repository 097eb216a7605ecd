// PTX text to functions, variables and statements. Bodies are split into statements when a kernel is first launched.
// PTX ISA, "Syntax" and "State Spaces, Types, and Variables".
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace gpusim {

// A type suffix of PTX: its size in bytes and what arithmetic it means.
enum class Kind : uint8_t { kBits, kUnsigned, kSigned, kFloat, kHalf, kBFloat, kTf32, kPredicate };
struct Type {
  Kind kind = Kind::kBits;
  uint8_t size = 4;    // of one element
  uint8_t packed = 1;  // 2 for f16x2 and bf16x2
  int bytes() const { return size * packed; }
  bool operator==(const Type&) const = default;
};
bool parse_type(std::string_view word, Type* type);  // "u32", "bf16x2", "pred"; false when it is no type

// One variable: a parameter, or a declaration in .global, .const, .shared, .local or .param space.
struct Variable {
  std::string space, name;
  int64_t align = 1, bytes = 0;
  bool external = false;  // .extern .shared: the dynamic shared memory
  std::vector<uint8_t> data;
  std::vector<std::pair<int64_t, std::string>> addresses;  // initialisers that are symbols: {offset, symbol}
};

struct Statement {
  std::string guard;  // predicate register, or empty
  bool guard_negated = false;
  std::string opcode;                 // "ld.global.v2.u32"
  std::vector<std::string> words;     // its parts: ld, global, v2, u32
  std::vector<std::string> operands;  // split at top-level commas
  std::string text;                   // as written
  int line = 0;
  int scope = 0;  // of the names in it

  bool has(std::string_view word) const;
};

struct Function {
  std::string name;
  bool entry = false;
  std::vector<Variable> parameters, results;
  std::string_view body;
  int line = 0;                                          // of the body's first character
  int max_threads = 0, max_registers = 0, min_ctas = 1;  // .maxntid or .reqntid, .maxnreg, .minnctapersm
  int cluster[3] = {0, 0, 0};                            // .reqnctapercluster
};

// A body, parsed: what is declared in each scope, where labels are, and the statements in order.
struct Body {
  struct Scope {
    int parent = -1;
    std::map<std::string, Type, std::less<>> registers;
    std::map<std::string, int, std::less<>> ranges;  // "%r" of .reg .b32 %r<100>, with the same entry in registers
    std::map<std::string, int, std::less<>> labels;  // to statement index
    std::map<std::string, Variable, std::less<>> variables;
  };
  std::vector<Scope> scopes;
  std::vector<Statement> statements;
};

struct Module {
  std::string text;
  int target = 0;            // 80 of .target sm_80
  bool accelerated = false;  // sm_90a
  std::map<std::string, Function, std::less<>> functions;
  std::map<std::string, Variable, std::less<>> variables;  // .global, .const, and .shared at module level
};

std::unique_ptr<Module> parse_module(std::string text);
Body parse_body(const Function& function);  // applies the mutation of GPUSIM_MUTATE

// What stops a simulation: the message names the kernel, the line and the thread.
struct Failure {
  std::string message;
};

std::string_view trim(std::string_view s);
std::vector<std::string> split_operands(std::string_view s);
int64_t parse_integer(std::string_view s);

}  // namespace gpusim
