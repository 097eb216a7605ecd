// moe_ext._C: what the build says about itself. Introspection only, so everything else works without this module; it is the
// one part that is tied to a Python version. It registers no op and links neither torch nor the op libraries.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda/rule_tables.h"
#include "moe_build_info.h"

namespace py = pybind11;

namespace {

py::dict parse_json(const char* text) { return py::module_::import("json").attr("loads")(text).cast<py::dict>(); }

py::dict build_info() { return parse_json(MOE_BUILD_INFO); }

// Closes the handle, which only counts references: RTLD_NOLOAD never loads and so never unloads a library.
struct LoadedLibrary {
  explicit LoadedLibrary(const std::string& path) : handle(dlopen(path.c_str(), RTLD_NOLOAD | RTLD_NOW | RTLD_LOCAL)) {
    if (!handle) throw std::runtime_error("moe_ext: " + path + " is not loaded in this process; import moe_ext before asking about it");
  }
  ~LoadedLibrary() { dlclose(handle); }
  LoadedLibrary(const LoadedLibrary&) = delete;
  LoadedLibrary& operator=(const LoadedLibrary&) = delete;

  void* handle;
};

py::dict describe(const std::string& library_path) {
  const LoadedLibrary library(library_path);
  using Describe = const char* (*)();
  const auto moe_describe = reinterpret_cast<Describe>(dlsym(library.handle, "moe_describe"));
  if (!moe_describe) {
    throw std::runtime_error("moe_ext: " + library_path + " exports no moe_describe, so it is not an op library of this version; " +
                             "build again: pip install --no-build-isolation -e .");
  }
  return parse_json(moe_describe());
}

moe::DType parse_dtype(const std::string& dtype) {
  for (moe::DType t : {moe::DType::kFloat64, moe::DType::kFloat32, moe::DType::kBFloat16, moe::DType::kFloat16}) {
    if (dtype == moe::name(t)) return t;
  }
  throw std::invalid_argument("moe_ext: dtype='" + dtype + "' is not one of float64, float32, bfloat16, float16");
}

bool has_arch(const std::string& start) {
  const py::list archs = build_info()["cuda_archs"];
  for (const py::handle& arch : archs) {
    if (arch.cast<std::string>().rfind(start, 0) == 0) return true;
  }
  return false;
}

py::object tile(const moe::cuda::KernelInfo& info) {
  return info.tile_m ? py::object(py::make_tuple(info.tile_m, info.tile_n, info.tile_k)) : py::none();
}

// The kernel of a table for a query and what it would take to get another. Rules after the one that applies are not asked.
template <class Rules>
py::dict explain(const Rules& rules, const moe::cuda::KernelQuery& query) {
  const auto& chosen = choose(rules, query);
  py::dict others;
  for (const auto& rule : rules) {
    if (rule.kernel == chosen.kernel) continue;
    py::list missing;
    for (const moe::cuda::Requirement* r : rule.needs) {
      if (!r->holds(query)) missing.append(r->text);
    }
    const char* name = info(rule.kernel).name;
    if (!others.contains(name) || py::len(missing) < py::len(others[name])) others[name] = missing;  // a kernel may have two lines
  }
  py::dict result;
  result["kernel"] = info(chosen.kernel).name;
  result["reason"] = chosen.reason;
  result["tile"] = tile(info(chosen.kernel));
  result["others"] = others;
  return result;
}

py::dict explain_kernel(const std::string& op, const std::string& dtype, int capability, int64_t rows, int64_t experts, int64_t N,
                        int64_t K, bool aligned, bool n_major, bool bias, bool accumulate, bool gathered, bool gated) {
  using namespace moe::cuda;
  if (rows < 0 || experts < 1 || N < 0 || K < 0) throw std::invalid_argument("moe_ext: rows, N and K are at least 0, experts at least 1");
  KernelQuery query{parse_dtype(dtype), capability, rows, experts, N, K};
  query.aligned = query.aligned_out = query.tensor_maps = aligned;
  query.n_major = n_major;
  query.epilogue = bias || accumulate;
  query.gathered = gathered;
  query.gated = gated;
  query.has_sm90 = has_arch("sm_90");
  py::dict result;
  std::string known;
  for_each_rule_table([&](const char* name, const auto& rules) {
    if (op == name) result = explain(rules, query);
    known += std::string(known.empty() ? "" : ", ") + name;
  });
  if (result.empty()) throw std::invalid_argument("moe_ext: op='" + op + "' has no table of rules; there are " + known);
  return result;
}

py::dict explain_grouped_mm(const std::string& dtype, int capability, int64_t rows, int64_t experts, int64_t N, int64_t K, bool aligned,
                            bool n_major, bool bias, bool accumulate, bool wgrad, bool gathered) {
  return explain_kernel(wgrad ? "grouped_mm_wgrad" : "grouped_mm", dtype, capability, rows, experts, N, K, aligned, n_major, bias,
                        accumulate, gathered, true);
}

py::dict rules() {
  py::dict tables;
  moe::cuda::for_each_rule_table([&](const char* name, const auto& rules) {
    py::list lines;
    for (const auto& rule : rules) {
      py::list needs;
      for (const moe::cuda::Requirement* r : rule.needs) needs.append(r->text);
      py::dict line;
      line["kernel"] = info(rule.kernel).name;
      line["tile"] = tile(info(rule.kernel));
      line["needs"] = needs;
      line["reason"] = rule.reason;
      lines.append(line);
    }
    tables[name] = lines;
  });
  return tables;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What moe_ext's native libraries were built with and what they contain.";
  m.def(
      "build_info", &build_info,
      "Versions and targets this module was built with: version, compiler, torch_headers, torch_target, isas, cuda, cuda_archs, cutlass.");
  m.def("describe", &describe, py::arg("library_path"),
        "What a loaded op library says about itself: its build and its kernel tables. RuntimeError when the library is not loaded.");
  m.def("rules", &rules,
        "The rules by which the CUDA library chooses kernels: for each op that has several, its rules in order, of which the first whose "
        "needs all hold applies. A rule has kernel, tile (rows, columns, depth; None where the op runs its steps), needs and reason.");
  m.def(
      "explain_kernel", &explain_kernel, py::arg("op"), py::kw_only(), py::arg("dtype"), py::arg("capability"), py::arg("rows"),
      py::arg("experts"), py::arg("N"), py::arg("K"), py::arg("aligned") = true, py::arg("n_major") = false, py::arg("bias") = false,
      py::arg("accumulate") = false, py::arg("gathered") = false, py::arg("gated") = true,
      "Which CUDA kernel this build runs and why; no GPU is needed. op: 'grouped_mm' (N outputs, K inputs of an expert), "
      "'grouped_mm_wgrad' (results are N x K), 'grouped_up' (N = I, or 2I where gate and up alternate along n_major outputs; K = H) or "
      "'grouped_down_backward' (N = I, K = H). dtype: 'bfloat16', ...; capability: 80, 90, 120; rows: S, of all experts; aligned: whether "
      "rows and matrices begin at multiples of 16 bytes; n_major: a weight is [K, N]; gathered: rows of a grouped_mm_wgrad lie elsewhere. "
      "Returns kernel, reason, tile (rows, columns, depth; None for 'steps') and others: for each other kernel what it would have needed; "
      "nothing where the chosen one only comes first. ValueError for an unknown op or dtype, or a size that cannot be.");
  m.def("explain_grouped_mm", &explain_grouped_mm, py::kw_only(), py::arg("dtype"), py::arg("capability"), py::arg("rows"),
        py::arg("experts"), py::arg("N"), py::arg("K"), py::arg("aligned") = true, py::arg("n_major") = false, py::arg("bias") = false,
        py::arg("accumulate") = false, py::arg("wgrad") = false, py::arg("gathered") = false,
        "explain_kernel of 'grouped_mm', or with wgrad of 'grouped_mm_wgrad'.");
}
