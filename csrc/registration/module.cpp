// moe_ext._C: what the build says about itself. Introspection only, so everything else works without this module; it is the
// one part that is tied to a Python version. It registers no op and links neither torch nor the op libraries.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What moe_ext's native libraries were built with and what they contain.";
  m.def(
      "build_info", &build_info,
      "Versions and targets this module was built with: version, compiler, torch_headers, torch_target, isas, cuda, cuda_archs, cutlass.");
  m.def("describe", &describe, py::arg("library_path"),
        "What a loaded op library says about itself: its build and its kernel tables. RuntimeError when the library is not loaded.");
}
