// moe_ext._C: what the build says about itself. Introspection only, so everything else works without this module; it is the
// one part that is tied to a Python version. It registers no op and links neither torch nor the op libraries.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda/grouped_mm_config.h"
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

// The tables of kernels/cuda/grouped_mm_config.h, which the CUDA library reads too. Rules after the one that applies are not asked.
py::dict explain_grouped_mm(const std::string& dtype, int capability, int64_t rows, int64_t experts, int64_t N, int64_t K, bool aligned,
                            bool n_major, bool bias, bool accumulate, bool wgrad, bool gathered) {
  using namespace moe::cuda;
  if (rows < 0 || experts < 1 || N < 0 || K < 0) throw std::invalid_argument("moe_ext: rows, N and K are at least 0, experts at least 1");
  GemmQuery query{parse_dtype(dtype), capability, rows, experts, N, K};
  query.aligned = query.aligned_out = aligned;
  query.n_major = n_major;
  query.epilogue = bias || accumulate;
  query.gathered = gathered;
  query.has_sm90 = has_arch("sm_90");
  py::dict result;
  const auto explain = [&](const auto& rules) {
    const GemmRule& chosen = choose(rules, query);
    const GemmKernelInfo kernel = info(chosen.kernel);
    result["kernel"] = kernel.name;
    result["reason"] = chosen.reason;
    result["tile"] = py::make_tuple(kernel.tile_m, kernel.tile_n, kernel.tile_k);
    py::dict others;
    for (const GemmRule& rule : rules) {
      py::list missing;
      for_each_missing(rule.requirements, query, [&](const char* text) { missing.append(text); });
      const char* name = info(rule.kernel).name;
      if (rule.kernel == chosen.kernel) continue;
      if (!others.contains(name) || py::len(missing) < py::len(others[name])) others[name] = missing;  // a kernel may have two lines
    }
    result["others"] = others;
  };
  wgrad ? explain(kWgradRules) : explain(kGroupedMmRules);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What moe_ext's native libraries were built with and what they contain.";
  m.def(
      "build_info", &build_info,
      "Versions and targets this module was built with: version, compiler, torch_headers, torch_target, isas, cuda, cuda_archs, cutlass.");
  m.def("describe", &describe, py::arg("library_path"),
        "What a loaded op library says about itself: its build and its kernel tables. RuntimeError when the library is not loaded.");
  m.def("explain_grouped_mm", &explain_grouped_mm, py::kw_only(), py::arg("dtype"), py::arg("capability"), py::arg("rows"),
        py::arg("experts"), py::arg("N"), py::arg("K"), py::arg("aligned") = true, py::arg("n_major") = false, py::arg("bias") = false,
        py::arg("accumulate") = false, py::arg("wgrad") = false, py::arg("gathered") = false,
        "Which CUDA kernel this build runs for a grouped_mm (or, with wgrad, a grouped_mm_wgrad, whose results are N x K) and why; no GPU "
        "is needed. dtype: 'bfloat16', ...; capability: 80, 90, 120; rows: S, of all experts; aligned: whether rows and matrices begin at "
        "multiples of 16 bytes; n_major: a weight is [K, N]; gathered: rows of a wgrad lie elsewhere. Returns kernel, reason, tile (rows, "
        "columns, depth) and others: for each other kernel what it would have "
        "needed; nothing where the chosen one only comes first.");
}
