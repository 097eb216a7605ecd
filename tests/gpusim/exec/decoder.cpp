#include "decoder.h"

#include <algorithm>
#include <cstdlib>

namespace gpusim {

std::unordered_map<std::string, Decoder::Decode>& Decoder::table() {
  static std::unordered_map<std::string, Decode> table;
  return table;
}

Space space_of(const Statement& s) {
  for (const std::string& word : s.words) {
    if (word == "global" || word == "const") return kGlobal;
    if (word.rfind("shared", 0) == 0) return kShared;
    if (word == "local") return kLocal;
    if (word.rfind("param", 0) == 0) return kParameter;
  }
  return kGeneric;
}

namespace {

constexpr uint32_t kNoTarget = 0xffffffffu;

int64_t align_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Space of a variable's declaration.
Space space_of(const std::string& name) {
  if (name == "shared") return kShared;
  if (name == "local") return kLocal;
  if (name == "param") return kParameter;
  return kGlobal;
}

Flow do_nothing(Warp&, const Instr&, Mask) { return Flow::kNext; }

Flow do_copy8(Warp& w, const Instr& i, Mask m) {
  each_lane<uint64_t>(w, i.d, m, [a = w.reg<uint64_t>(i.a)](int l) { return a[l]; });
  return Flow::kNext;
}

// PTX ISA, "Control Flow Instructions: call, ret": pc of the callee; the way back is on the fragment's stack.
Flow do_call(Warp& w, const Instr& i, Mask m) {
  Fragment& f = *w.now;
  if (f.depth == 6) fail(w, i, lowest(m), "calls are nested deeper than this simulator follows");
  f.stack[f.depth++] = f.pc + 1;
  f.pc = static_cast<uint32_t>(i.imm);
  return Flow::kJump;
}

}  // namespace

void Decoder::unknown(const Statement& s, const std::string& why) const {
  throw Failure{kernel_->name + ", line " + std::to_string(s.line) + ": " + why + ": " + s.text};
}

uint32_t Decoder::allocate(int width) {
  const uint32_t bytes = width == 0 ? 4 : static_cast<uint32_t>(width) * kLanes;
  const uint32_t at = static_cast<uint32_t>(align_up(kernel_->register_bytes, width == 0 ? 4 : 64));
  kernel_->register_bytes = at + bytes;
  return at;
}

uint32_t Decoder::relocated(uint64_t bits, int width, bool parameter) {
  const auto key = std::make_tuple(bits, width, parameter);
  const auto found = constants_.find(key);
  if (found != constants_.end()) return found->second;
  const uint32_t slot = allocate(width);
  kernel_->constants.push_back({slot, static_cast<uint8_t>(width), parameter, bits});
  return constants_[key] = slot;
}

uint32_t Decoder::constant(uint64_t bits, int width) { return relocated(bits, width, false); }

std::vector<std::string> Decoder::elements(const std::string& operand) {
  if (operand.empty() || operand[0] != '{') return {operand};
  return split_operands(std::string_view(operand).substr(1, operand.size() - 2));
}

Type Decoder::type_of(const Statement& s, int from_end) const {
  Type t;
  for (size_t i = s.words.size(); i-- > 1;)
    if (parse_type(s.words[i], &t) && from_end-- == 0) return t;
  unknown(s, "a type is missing");
}

const uint32_t* Decoder::list(const std::vector<uint32_t>& registers) {
  kernel_->lists.push_back(std::make_unique<uint32_t[]>(registers.size() + 1));
  std::copy(registers.begin(), registers.end(), kernel_->lists.back().get());
  return kernel_->lists.back().get();
}

bool Decoder::find_register(const std::string& name, Slot* slot) {
  const Body& body = frame_->body;
  for (int scope = statement_->scope; scope >= 0; scope = body.scopes[scope].parent) {
    auto& known = frame_->registers[scope];
    if (const auto found = known.find(name); found != known.end()) {
      *slot = found->second;
      return true;
    }
    const Body::Scope& declared = body.scopes[scope];
    auto type = declared.registers.find(name);
    if (type == declared.registers.end()) {
      const size_t digits = name.find_last_not_of("0123456789") + 1;
      if (digits == name.size() || digits == 0) continue;
      const auto range = declared.ranges.find(std::string_view(name).substr(0, digits));
      if (range == declared.ranges.end() || std::atoi(name.c_str() + digits) >= range->second) continue;
      type = declared.registers.find(range->first);
    } else if (declared.ranges.count(name)) {
      continue;
    }
    slot->predicate = type->second.kind == Kind::kPredicate;
    slot->width = static_cast<uint8_t>(std::max(type->second.bytes(), 2));
    slot->offset = allocate(slot->predicate ? 0 : slot->width);
    known[name] = *slot;
    return true;
  }
  return false;
}

bool Decoder::find_special(const std::string& name, Slot* slot) {
  static const std::map<std::string, SpecialId> ids = {{"%tid", SpecialId::kTid},
                                                       {"%ntid", SpecialId::kNtid},
                                                       {"%ctaid", SpecialId::kCtaid},
                                                       {"%nctaid", SpecialId::kNctaid},
                                                       {"%cluster_ctaid", SpecialId::kClusterCtaid},
                                                       {"%cluster_nctaid", SpecialId::kClusterNctaid},
                                                       {"%clusterid", SpecialId::kClusterid},
                                                       {"%nclusterid", SpecialId::kNclusterid},
                                                       {"%laneid", SpecialId::kLaneid},
                                                       {"%warpid", SpecialId::kWarpid},
                                                       {"%nwarpid", SpecialId::kNwarpid},
                                                       {"%smid", SpecialId::kSmid},
                                                       {"%nsmid", SpecialId::kNsmid},
                                                       {"%gridid", SpecialId::kGridid},
                                                       {"%lanemask_eq", SpecialId::kMaskEq},
                                                       {"%lanemask_lt", SpecialId::kMaskLt},
                                                       {"%lanemask_le", SpecialId::kMaskLe},
                                                       {"%lanemask_gt", SpecialId::kMaskGt},
                                                       {"%lanemask_ge", SpecialId::kMaskGe},
                                                       {"%cluster_ctarank", SpecialId::kClusterCtarank},
                                                       {"%cluster_nctarank", SpecialId::kClusterNctarank},
                                                       {"%is_explicit_cluster", SpecialId::kExplicitCluster},
                                                       {"%dynamic_smem_size", SpecialId::kDynamicShared},
                                                       {"%total_smem_size", SpecialId::kTotalShared}};  // PTX ISA, "Special Registers"
  if (const auto found = specials_.find(name); found != specials_.end()) {
    *slot = found->second;
    return true;
  }
  std::string base = name;
  uint8_t dimension = 0;
  if (const size_t dot = name.find('.'); dot != std::string::npos) {
    base = name.substr(0, dot);
    dimension = static_cast<uint8_t>(name[dot + 1] - 'x');
  }
  const auto id = ids.find(base);
  if (id == ids.end()) return false;
  slot->predicate = base == "%is_explicit_cluster";
  slot->width = 4;
  slot->offset = allocate(slot->predicate ? 0 : 4);
  kernel_->specials.push_back({slot->offset, id->second, dimension});
  specials_[name] = *slot;
  return true;
}

bool Decoder::find_symbol(const std::string& name, uint64_t* value, bool* parameter, Space* space) {
  *parameter = false;
  for (int scope = statement_->scope; scope >= 0; scope = frame_->body.scopes[scope].parent) {
    const auto found = frame_->body.scopes[scope].variables.find(name);
    if (found == frame_->body.scopes[scope].variables.end()) continue;
    const Variable& v = found->second;
    *space = space_of(v.space);
    if (*space == kShared) {
      const std::string key = frame_->function->name + "/" + std::to_string(scope) + "/" + name;
      if (!shared_.count(key)) {
        kernel_->static_shared = align_up(kernel_->static_shared, v.align) + v.bytes;
        shared_[key] = kSharedBase + kernel_->static_shared - v.bytes;
      }
      *value = shared_[key];
    } else if (*space == kLocal) {
      if (!frame_->locals.count(name)) {
        frame_->locals[name] = static_cast<uint32_t>(align_up(kernel_->local_bytes, std::max<int64_t>(v.align, 16)));
        kernel_->local_bytes = frame_->locals[name] + v.bytes;
      }
      *value = frame_->locals[name];
    } else {  // .param of a call
      *space = kFrame;
      const std::string key = name + "/" + std::to_string(scope);
      if (!frame_->frames.count(key)) frame_->frames[key] = allocate(static_cast<int>(align_up(v.bytes, 8)));
      *value = frame_->frames[key];
    }
    return true;
  }
  if (!frame_->function->entry && frame_->frames.count(name)) {
    *space = kFrame;
    *value = frame_->frames[name];
    return true;
  }
  if (frame_->function->entry)
    for (size_t p = 0; p < frame_->function->parameters.size(); ++p)
      if (frame_->function->parameters[p].name == name) {
        *value = static_cast<uint64_t>(kernel_->parameters[p].first);
        *parameter = true;
        *space = kParameter;
        return true;
      }
  if (const auto found = globals_.find(name); found != globals_.end()) {
    *value = found->second;
    *space = kGlobal;
    return true;
  }
  if (const auto found = module_.variables.find(name); found != module_.variables.end() && found->second.space == "shared") {
    const Variable& v = found->second;
    *space = kShared;
    if (v.external) {
      *value = static_cast<uint64_t>(kernel_->dynamic_shared_at);
    } else {
      if (!shared_.count(name)) {
        kernel_->static_shared = align_up(kernel_->static_shared, v.align) + v.bytes;
        shared_[name] = kSharedBase + kernel_->static_shared - v.bytes;
      }
      *value = shared_[name];
    }
    return true;
  }
  return false;
}

Slot Decoder::slot(const std::string& operand, Type type) {
  Slot found;
  if (operand[0] == '%' && (find_register(operand, &found) || find_special(operand, &found))) return found;
  if (find_register(operand, &found)) return found;  // inline assembly may name registers without a percent sign
  uint64_t bits = 0;
  const char* s = operand.c_str();
  found.width = static_cast<uint8_t>(std::max(type.bytes(), 2));
  if (s[0] == '0' && (s[1] == 'f' || s[1] == 'F' || s[1] == 'd' || s[1] == 'D') && operand.size() > 9) {
    bits = std::strtoull(s + 2, nullptr, 16);
    if ((s[1] == 'f' || s[1] == 'F') && type.kind == Kind::kFloat && type.size == 8) {
      float f;
      const uint32_t low = static_cast<uint32_t>(bits);
      std::memcpy(&f, &low, 4);
      const double d = f;
      std::memcpy(&bits, &d, 8);
    }
  } else if (std::isdigit(static_cast<unsigned char>(s[0])) || s[0] == '-') {
    if (operand.find('.') != std::string::npos) unknown(*statement_, "decimal floating-point constants are not read");
    bits = static_cast<uint64_t>(parse_integer(operand));
    if (type.kind == Kind::kFloat) unknown(*statement_, "an integer constant in a floating-point instruction");
  } else {
    const size_t plus = operand.find('+');
    bool parameter = false;
    Space space;
    if (!find_symbol(operand.substr(0, plus), &bits, &parameter, &space)) unknown(*statement_, "unknown operand " + operand);
    if (plus != std::string::npos) bits += static_cast<uint64_t>(parse_integer(std::string_view(operand).substr(plus + 1)));
    found.offset = relocated(bits, found.width, parameter);
    return found;
  }
  if (type.kind == Kind::kPredicate) {
    found.predicate = true;
    found.offset = relocated(bits ? ~uint64_t{0} : 0, 0, false);
    return found;
  }
  if (type.packed == 1 && found.width < 8) bits &= (uint64_t{1} << (8 * found.width)) - 1;
  found.offset = constant(bits, found.width);
  return found;
}

uint32_t Decoder::source(const std::string& operand, Type type) {
  const Slot s = slot(operand, type);
  if (s.predicate != (type.kind == Kind::kPredicate) || (!s.predicate && s.width < type.bytes()))
    unknown(*statement_, "operand " + operand + " has another width");
  if (!s.predicate && s.width > std::max(type.bytes(), 2)) unknown(*statement_, "operand " + operand + " is wider than the operation");
  return s.offset;
}

uint32_t Decoder::destination(const std::string& operand) {
  if (operand == "_") return allocate(8);
  Slot s;
  if (!find_register(operand, &s)) unknown(*statement_, "unknown register " + operand);
  return s.offset;
}

uint32_t Decoder::predicate(const std::string& operand, bool* negated) {
  *negated = operand[0] == '!';
  return source(*negated ? operand.substr(1) : operand, kPred);
}

void Decoder::address(const std::string& operand, Instr& i, uint32_t Instr::* reg) {
  std::string inside = operand[0] == '[' ? operand.substr(1, operand.size() - 2) : operand;
  inside = std::string(trim(inside));
  const size_t sign = inside.find_first_of("+-", 1);
  const std::string base(trim(std::string_view(inside).substr(0, sign)));
  int64_t displacement = 0;
  if (sign != std::string::npos) {
    displacement = parse_integer(trim(std::string_view(inside).substr(sign + 1)));  // "+-2048" is how nvcc writes it
    if (inside[sign] == '-') displacement = -displacement;
  }
  Slot s;
  if (find_register(base, &s)) {
    i.*reg = s.offset;
    i.address32 = s.width == 4;
    i.imm = displacement;
    return;
  }
  uint64_t value = 0;
  bool parameter = false;
  Space space = kGlobal;
  if (std::isdigit(static_cast<unsigned char>(base[0]))) {
    value = static_cast<uint64_t>(parse_integer(base));
  } else if (!find_symbol(base, &value, &parameter, &space)) {
    unknown(*statement_, "unknown address " + operand);
  }
  if (space == kFrame) {  // i.imm: bytes into the registers that hold the variable
    i.*reg = static_cast<uint32_t>(value);
    i.space = kFrame;
  } else {
    i.*reg = relocated(value, 8, parameter);
    i.address32 = false;
  }
  i.imm = displacement;
}

void Decoder::jump(const std::string& label, Instr& i) {
  for (int scope = statement_->scope; scope >= 0; scope = frame_->body.scopes[scope].parent) {
    const auto found = frame_->body.scopes[scope].labels.find(label);
    if (found == frame_->body.scopes[scope].labels.end()) continue;
    i.imm = kNoTarget;
    fixes_.push_back({static_cast<uint32_t>(kernel_->code.size()), frame_, found->second, ""});
    return;
  }
  unknown(*statement_, "unknown label " + label);
}

void Decoder::emit(const Statement& s, Instr i) {
  i.line = s.line;
  kernel_->code.push_back(i);
  kernel_->text.push_back(s.text);
}

void Decoder::copy_frame(const Statement& s, uint32_t to, uint32_t from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 8) {
    Instr i;
    i.exec = do_copy8;
    i.d = to + static_cast<uint32_t>(at) * kLanes;
    i.a = from + static_cast<uint32_t>(at) * kLanes;
    emit(s, i);
  }
}

// call (results), name, (arguments): the arguments are copied into the callee's parameters, and the results back.
void Decoder::call(const Statement& s) {
  std::vector<std::string> results, arguments;
  std::string name;
  for (const std::string& operand : s.operands) {
    if (operand[0] != '(') {
      if (name.empty()) name = operand;
    } else {
      (name.empty() ? results : arguments) = split_operands(std::string_view(operand).substr(1, operand.size() - 2));
    }
  }
  if (name == "vprintf") return emit(s, {do_nothing});
  if (!module_.functions.count(name) || module_.functions.find(name)->second.body.empty()) {
    Instr i;
    i.exec = [](Warp& w, const Instr& instr, Mask m) -> Flow { fail(w, instr, lowest(m), "a device function without a body was called"); };
    return emit(s, i);
  }
  Frame* callee = function(name);
  const auto frame_of = [&](const std::string& operand) {
    uint64_t value = 0;
    bool parameter;
    Space space;
    if (!find_symbol(operand, &value, &parameter, &space) || space != kFrame) unknown(s, "an argument is no .param variable");
    return static_cast<uint32_t>(value);
  };
  for (size_t a = 0; a < arguments.size(); ++a)
    copy_frame(s, callee->frames[callee->function->parameters[a].name], frame_of(arguments[a]), callee->function->parameters[a].bytes);
  Instr i;
  i.exec = do_call;
  fixes_.push_back({static_cast<uint32_t>(kernel_->code.size()), nullptr, 0, name});
  i.whole = true;
  emit(s, i);
  for (size_t r = 0; r < results.size(); ++r)
    copy_frame(s, frame_of(results[r]), callee->frames[callee->function->results[r].name], callee->function->results[r].bytes);
}

Decoder::Frame* Decoder::function(const std::string& name) {
  const auto found = frames_.find(name);
  if (found != frames_.end()) return &found->second;
  Frame& frame = frames_[name];
  frame.function = &module_.functions.find(name)->second;
  frame.body = parse_body(*frame.function);
  frame.registers.resize(frame.body.scopes.size());
  if (!frame.function->entry)
    for (const auto* variables : {&frame.function->parameters, &frame.function->results})
      for (const Variable& v : *variables) frame.frames[v.name] = allocate(static_cast<int>(align_up(v.bytes, 8)));
  waiting_.push_back(name);
  return &frame;
}

void Decoder::decode_body(Frame* frame) {
  frame_ = frame;
  frame->entry_pc = static_cast<uint32_t>(kernel_->code.size());
  for (const Statement& s : frame->body.statements) {
    frame->pc_of_statement.push_back(static_cast<uint32_t>(kernel_->code.size()));
    statement_ = &s;
    const size_t begin = kernel_->code.size();
    if (s.words[0] == "call") {
      call(s);
    } else {
      const auto found = table().find(s.words[0]);
      if (found == table().end()) unknown(s, "unknown opcode");
      Instr i;
      found->second(*this, s, i);
      if (!i.exec) unknown(s, "unknown form of " + s.words[0]);
      emit(s, i);
    }
    if (s.guard.empty()) continue;
    bool negated;
    const uint32_t guard = predicate(s.guard, &negated);
    for (size_t at = begin; at < kernel_->code.size(); ++at) {
      kernel_->code[at].guard = guard + 1;
      kernel_->code[at].guard_negated = negated != s.guard_negated;
    }
  }
  // A body may end without ret.
  Statement end;
  end.words = {"ret"};
  end.text = "ret (end of function)";
  frame->pc_of_statement.push_back(static_cast<uint32_t>(kernel_->code.size()));
  Instr i;
  table()["ret"](*this, end, i);
  emit(end, i);
}

std::unique_ptr<Kernel> Decoder::decode(const Module& module, const std::string& name, const std::map<std::string, uint64_t>& globals) {
  const auto found = module.functions.find(name);
  if (found == module.functions.end()) throw Failure{"no kernel " + name + " in this module"};
  const Function& entry = found->second;
  Decoder d(module, globals);
  d.kernel_ = std::make_unique<Kernel>();
  Kernel& k = *d.kernel_;
  k.name = name;
  k.module = &module;
  k.max_threads = entry.max_threads;
  // Without .maxnreg: what the CTAs that must fit on a multiprocessor leave of its 65536, in units of 8; 255 (in units: 256) at most.
  if (entry.max_registers || entry.max_threads)
    k.registers = std::min(256, (entry.max_registers ? entry.max_registers : 65536 / (entry.max_threads * entry.min_ctas)) / 8 * 8);
  std::copy(std::begin(entry.cluster), std::end(entry.cluster), k.cluster);
  for (const Variable& p : entry.parameters) {
    k.parameter_bytes = align_up(k.parameter_bytes, p.align);
    k.parameters.push_back({k.parameter_bytes, p.bytes});
    k.parameter_bytes += p.bytes;
  }
  // Static shared memory first, so that the place of the dynamic part is known.
  d.function(name);
  std::vector<std::string> order;
  int64_t dynamic_align = 16;
  for (const auto& [n, v] : module.variables)
    if (v.space == "shared" && v.external) dynamic_align = std::max(dynamic_align, v.align);
  for (size_t i = 0; i < d.waiting_.size(); ++i) {
    Frame& frame = d.frames_[d.waiting_[i]];
    d.frame_ = &frame;
    uint64_t value;
    bool parameter;
    Space space;
    for (size_t scope = 0; scope < frame.body.scopes.size(); ++scope)
      for (const auto& [n, v] : frame.body.scopes[scope].variables)
        if (v.space == "shared") {
          Statement at;
          at.scope = static_cast<int>(scope);
          d.statement_ = &at;
          d.find_symbol(n, &value, &parameter, &space);
        }
    for (const Statement& s : frame.body.statements)
      for (const std::string& operand : s.operands) {
        if (s.words[0] == "call" && module.functions.count(operand) && !module.functions.find(operand)->second.body.empty())
          d.function(operand);
        std::string symbol = operand.substr(operand[0] == '[' ? 1 : 0);
        symbol = symbol.substr(0, symbol.find_first_of("+]"));
        if (module.variables.count(symbol) && module.variables.find(symbol)->second.space == "shared") {
          d.statement_ = &s;
          d.find_symbol(symbol, &value, &parameter, &space);
        }
      }
  }
  k.dynamic_shared_at = align_up(kSharedBase + k.static_shared, dynamic_align);
  for (size_t i = 0; i < d.waiting_.size(); ++i) d.decode_body(&d.frames_[d.waiting_[i]]);
  for (const Fix& fix : d.fixes_) {
    Instr& i = k.code[fix.pc];
    i.imm = fix.frame ? fix.frame->pc_of_statement[fix.statement] : d.frames_[fix.function].entry_pc;
  }
  k.register_bytes = static_cast<uint32_t>(align_up(k.register_bytes, 64));
  return std::move(d.kernel_);
}

}  // namespace gpusim
