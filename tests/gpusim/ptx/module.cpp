#include "module.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "mutation.h"

namespace gpusim {

bool parse_type(std::string_view word, Type* type) {
  static const std::map<std::string_view, Type> types = {
      {"b8", {Kind::kBits, 1}},       {"b16", {Kind::kBits, 2}},      {"b32", {Kind::kBits, 4}},         {"b64", {Kind::kBits, 8}},
      {"b128", {Kind::kBits, 16}},    {"u8", {Kind::kUnsigned, 1}},   {"u16", {Kind::kUnsigned, 2}},     {"u32", {Kind::kUnsigned, 4}},
      {"u64", {Kind::kUnsigned, 8}},  {"s8", {Kind::kSigned, 1}},     {"s16", {Kind::kSigned, 2}},       {"s32", {Kind::kSigned, 4}},
      {"s64", {Kind::kSigned, 8}},    {"f16", {Kind::kHalf, 2}},      {"bf16", {Kind::kBFloat, 2}},      {"f32", {Kind::kFloat, 4}},
      {"f64", {Kind::kFloat, 8}},     {"f16x2", {Kind::kHalf, 2, 2}}, {"bf16x2", {Kind::kBFloat, 2, 2}}, {"tf32", {Kind::kTf32, 4}},
      {"pred", {Kind::kPredicate, 4}}};
  const auto found = types.find(word);
  if (found == types.end()) return false;
  *type = found->second;
  return true;
}

bool Statement::has(std::string_view word) const { return std::find(words.begin() + 1, words.end(), word) != words.end(); }

std::string_view trim(std::string_view s) {
  while (!s.empty() && std::isspace(static_cast<unsigned char>(s.front()))) s.remove_prefix(1);
  while (!s.empty() && std::isspace(static_cast<unsigned char>(s.back()))) s.remove_suffix(1);
  return s;
}

std::vector<std::string> split_operands(std::string_view s) {
  std::vector<std::string> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i <= s.size(); ++i) {
    if (i < s.size() && std::strchr("{[(", s[i])) ++depth;
    if (i < s.size() && std::strchr("}])", s[i])) --depth;
    if (i < s.size() && (s[i] != ',' || depth)) continue;
    const std::string_view part = trim(s.substr(begin, i - begin));
    if (!part.empty()) parts.emplace_back(part);
    begin = i + 1;
  }
  return parts;
}

int64_t parse_integer(std::string_view s) { return static_cast<int64_t>(std::strtoull(std::string(s).c_str(), nullptr, 0)); }

namespace {

std::vector<std::string_view> words_of(std::string_view s) {
  std::vector<std::string_view> words;
  for (size_t i = 0; i < s.size();) {
    while (i < s.size() && std::isspace(static_cast<unsigned char>(s[i]))) ++i;
    const size_t begin = i;
    while (i < s.size() && !std::isspace(static_cast<unsigned char>(s[i]))) ++i;
    if (i > begin) words.push_back(s.substr(begin, i - begin));
  }
  return words;
}

void parse_initialiser(Variable* v, std::string_view text, Type element) {
  std::string flat(text);
  std::replace_if(flat.begin(), flat.end(), [](char c) { return c == '{' || c == '}'; }, ' ');
  v->data.assign(static_cast<size_t>(v->bytes), 0);
  int64_t at = 0;
  for (const std::string& item : split_operands(flat)) {
    uint64_t bits = 0;
    if (item.rfind("0f", 0) == 0 || item.rfind("0F", 0) == 0 || item.rfind("0d", 0) == 0 || item.rfind("0D", 0) == 0) {
      bits = std::strtoull(item.c_str() + 2, nullptr, 16);
    } else if (std::isdigit(static_cast<unsigned char>(item[0])) || item[0] == '-') {
      bits = static_cast<uint64_t>(parse_integer(item));
    } else {
      const size_t open = item.find('('), close = item.find(')');
      v->addresses.push_back({at, open == std::string::npos ? item : item.substr(open + 1, close - open - 1)});
    }
    std::memcpy(v->data.data() + at, &bits, element.size);
    at += element.size;
  }
}

// ".visible .global .align 16 .b8 name[12] = {1, 2}", ".param .u64 p", ".extern .shared .align 16 .b8 smem[]".
bool parse_variable(std::string_view text, Variable* v) {
  const size_t equals = text.find('=');
  const std::string_view declaration = text.substr(0, equals);
  Type type;
  bool typed = false;
  const auto words = words_of(declaration);
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string_view w = words[i];
    if (w == ".align") {
      v->align = parse_integer(words[++i]);
    } else if (w == ".extern") {
      v->external = true;
    } else if (w == ".global" || w == ".const" || w == ".shared" || w == ".local" || w == ".param") {
      v->space = w.substr(1);
    } else if (w[0] == '.' && parse_type(w.substr(1), &type)) {
      typed = true;
    } else if (w[0] != '.' && typed) {
      v->name += w;  // "name[12]" may be written with a space
    }
  }
  if (!typed || v->space.empty()) return false;
  v->bytes = type.bytes();
  v->align = std::max<int64_t>(v->align, type.bytes());
  const size_t open = v->name.find('[');
  if (open != std::string::npos) {
    for (size_t at = open; at != std::string::npos; at = v->name.find('[', at + 1)) v->bytes *= parse_integer(v->name.substr(at + 1));
    v->name.resize(open);
  }
  if (equals != std::string_view::npos) parse_initialiser(v, text.substr(equals + 1), type);
  return true;
}

std::vector<Variable> parse_parameters(std::string_view list) {
  std::vector<Variable> parameters;
  for (const std::string& item : split_operands(list)) {
    Variable v;
    std::string text = item;  // ".param .u64 .ptr .align 1 name": the alignment is that of the pointer's target
    if (const size_t pointer = text.find(".ptr"); pointer != std::string::npos)
      text = text.substr(0, pointer) + text.substr(text.rfind(' '));
    if (parse_variable(text, &v)) parameters.push_back(v);
  }
  return parameters;
}

// Comments become spaces, so that every character keeps its line.
void blank_comments(std::string* text) {
  bool quoted = false;
  for (size_t i = 0; i + 1 < text->size(); ++i) {
    char* c = text->data() + i;
    if (*c == '"') quoted = !quoted;
    if (quoted || *c != '/' || (c[1] != '/' && c[1] != '*')) continue;
    const bool line = c[1] == '/';
    size_t end = line ? text->find('\n', i) : text->find("*/", i + 2);
    end = end == std::string::npos ? text->size() : end + (line ? 0 : 2);
    for (size_t j = i; j < end; ++j)
      if ((*text)[j] != '\n') (*text)[j] = ' ';
    i = end - 1;
  }
}

size_t matching(std::string_view text, size_t open, char left, char right) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = open; i < text.size(); ++i) {
    if (text[i] == '"') quoted = !quoted;
    if (quoted) continue;
    if (text[i] == left) ++depth;
    if (text[i] == right && --depth == 0) return i;
  }
  throw Failure{"PTX: a bracket is not closed"};
}

// The head of a function, from its first directive to the brace or semicolon.
Function parse_head(std::string_view head) {
  Function f;
  f.entry = head.find(".entry") != std::string_view::npos;
  size_t at = head.find(f.entry ? ".entry" : ".func") + (f.entry ? 6 : 5);
  std::string_view rest = trim(head.substr(at));
  if (!f.entry && rest[0] == '(') {
    const size_t close = matching(rest, 0, '(', ')');
    f.results = parse_parameters(rest.substr(1, close - 1));
    rest = trim(rest.substr(close + 1));
  }
  size_t end = 0;
  while (end < rest.size() && rest[end] != '(' && !std::isspace(static_cast<unsigned char>(rest[end]))) ++end;
  f.name = rest.substr(0, end);
  rest = trim(rest.substr(end));
  if (!rest.empty() && rest[0] == '(') {
    const size_t close = matching(rest, 0, '(', ')');
    f.parameters = parse_parameters(rest.substr(1, close - 1));
    rest = rest.substr(close + 1);
  }
  const auto numbers = [&](std::string_view directive) {
    std::vector<int64_t> n;
    size_t begin = rest.find(directive);
    if (begin == std::string_view::npos) return n;
    begin += directive.size();
    size_t stop = rest.find('.', begin);
    for (const std::string& s : split_operands(rest.substr(begin, stop - begin))) n.push_back(parse_integer(s));
    return n;
  };
  for (const char* directive : {".maxntid", ".reqntid"})
    if (const auto n = numbers(directive); !n.empty()) {
      f.max_threads = 1;
      for (int64_t k : n) f.max_threads *= static_cast<int>(k);
    }
  if (const auto n = numbers(".maxnreg"); !n.empty()) f.max_registers = static_cast<int>(n[0]);
  if (const auto n = numbers(".minnctapersm"); !n.empty()) f.min_ctas = static_cast<int>(n[0]);
  if (const auto n = numbers(".reqnctapercluster"); !n.empty())
    for (size_t i = 0; i < 3; ++i) f.cluster[i] = i < n.size() ? static_cast<int>(n[i]) : 1;
  return f;
}

}  // namespace

std::unique_ptr<Module> parse_module(std::string source) {
  auto module = std::make_unique<Module>();
  blank_comments(&source);
  module->text = std::move(source);
  const std::string_view text = module->text;
  int line = 1;
  const auto take = [&](size_t from, size_t to) { line += static_cast<int>(std::count(text.begin() + from, text.begin() + to, '\n')); };
  for (size_t at = 0; at < text.size();) {
    // A top-level item ends at a semicolon, at a function's body, or, for .version and its like, at the end of the line.
    const size_t begin = text.find_first_not_of(" \t\r\n", at);
    if (begin == std::string_view::npos) break;
    take(at, begin);
    at = begin;
    const std::string_view rest = text.substr(at);
    if (rest.starts_with(".version") || rest.starts_with(".target") || rest.starts_with(".address_size") || rest.starts_with(".file")) {
      const size_t end = std::min(text.find('\n', at), text.size());
      if (const size_t sm = rest.substr(0, end - at).find("sm_"); rest.starts_with(".target") && sm != std::string_view::npos) {
        module->target = std::atoi(rest.data() + sm + 3);
        module->accelerated = rest.substr(0, end - at).find('a', sm + 3) != std::string_view::npos;
      }
      at = end;
      continue;
    }
    if (rest.starts_with(".section")) {  // debug information
      const size_t end = matching(text, text.find('{', at), '{', '}') + 1;
      take(at, end);
      at = end;
      continue;
    }
    size_t stop = text.find_first_of(";{=", at);
    if (stop == std::string_view::npos) break;
    const std::string_view head = text.substr(at, stop - at);
    const bool function = head.find(".entry") != std::string_view::npos || head.find(".func") != std::string_view::npos;
    if (function) {
      Function f = parse_head(head);
      take(at, stop);
      at = stop;
      if (text[stop] == '{') {
        const size_t end = matching(text, stop, '{', '}');
        f.body = text.substr(stop + 1, end - stop - 1);
        f.line = line;
        take(at, end + 1);
        at = end + 1;
      } else {
        at = stop + 1;
      }
      if (!f.body.empty() || !module->functions.count(f.name)) module->functions[f.name] = f;
      continue;
    }
    const size_t end = text.find(';', at);
    Variable v;
    if (parse_variable(text.substr(at, end - at), &v)) module->variables[v.name] = v;
    take(at, end + 1);
    at = end + 1;
  }
  return module;
}

namespace {

class BodyParser {
 public:
  explicit BodyParser(const Function& f) : function_(f), mutation_(f.name), line_(f.line) { body_.scopes.emplace_back(); }

  Body parse() {
    const std::string_view text = function_.body;
    std::vector<int> open{0};
    for (size_t at = 0; at < text.size();) {
      const char c = text[at];
      if (std::isspace(static_cast<unsigned char>(c))) {
        line_ += c == '\n';
        ++at;
      } else if (c == '{') {
        body_.scopes.emplace_back();
        body_.scopes.back().parent = open.back();
        open.push_back(static_cast<int>(body_.scopes.size()) - 1);
        ++at;
      } else if (c == '}') {
        open.pop_back();
        ++at;
      } else if (text.substr(at).starts_with(".loc ") ||
                 text.substr(at).starts_with(".loc\t")) {  // ends with its line, without a semicolon
        at = std::min(text.find('\n', at), text.size());
      } else if (const size_t label = label_length(text.substr(at))) {
        body_.scopes[open.back()].labels[std::string(trim(text.substr(at, label - 1)))] = static_cast<int>(body_.statements.size());
        at += label;
      } else {
        const size_t end = text.find(';', at);
        item(text.substr(at, end - at), &body_.scopes[open.back()], open.back());
        line_ += static_cast<int>(std::count(text.begin() + at, text.begin() + end, '\n'));
        at = end + 1;
      }
    }
    return std::move(body_);
  }

 private:
  static size_t label_length(std::string_view s) {
    size_t i = 0;
    while (i < s.size() && (std::isalnum(static_cast<unsigned char>(s[i])) || std::strchr("_$%", s[i]))) ++i;
    while (i < s.size() && s[i] == ' ') ++i;
    return i && i < s.size() && s[i] == ':' && s[i + 1] != ':' ? i + 1 : 0;
  }

  void item(std::string_view text, Body::Scope* scope, int scope_index) {
    if (text.starts_with(".reg")) return declare_registers(text, scope);
    if (text[0] == '.' && !text.starts_with(".pragma")) {
      Variable v;
      if (parse_variable(text, &v)) scope->variables[v.name] = v;
      return;
    }
    if (text[0] == '.') return;
    Statement s;
    s.line = line_;
    s.scope = scope_index;
    s.text = text;
    std::replace(s.text.begin(), s.text.end(), '\t', ' ');
    std::replace(s.text.begin(), s.text.end(), '\n', ' ');
    mutation_.apply(&s.text);
    if (!s.text.empty()) body_.statements.push_back(split(std::move(s)));
  }

  static Statement split(Statement s) {
    std::string_view rest = trim(s.text);
    if (rest[0] == '@') {
      s.guard_negated = rest[1] == '!';
      const size_t begin = s.guard_negated ? 2 : 1, end = rest.find(' ');
      s.guard = rest.substr(begin, end - begin);
      rest = trim(rest.substr(end));
    }
    const size_t end = std::min(rest.find_first_of(" {[("), rest.size());
    s.opcode = rest.substr(0, end);
    for (size_t at = 0; at <= s.opcode.size();) {
      const size_t dot = std::min(s.opcode.find('.', at), s.opcode.size());
      s.words.push_back(s.opcode.substr(at, dot - at));
      at = dot + 1;
    }
    s.operands = split_operands(rest.substr(end));
    return s;
  }

  static void declare_registers(std::string_view text, Body::Scope* scope) {
    const auto words = words_of(text);
    Type type;
    parse_type(words[1].substr(1), &type);
    const size_t names = text.find(words[1]) + words[1].size();
    for (const std::string& name : split_operands(text.substr(names))) {
      const size_t open = name.find('<');
      const std::string base = name.substr(0, open);
      scope->registers[base] = type;
      if (open != std::string::npos) scope->ranges[base] = static_cast<int>(parse_integer(name.substr(open + 1)));
    }
  }

  const Function& function_;
  Mutation mutation_;
  Body body_;
  int line_;
};

}  // namespace

Body parse_body(const Function& function) { return BodyParser(function).parse(); }

}  // namespace gpusim
