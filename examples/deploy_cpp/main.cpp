// Runs a TorchScript module and an AOTInductor package that call torch.ops.moe.grouped_forward, without Python.
//   deploy LIBRARY FOLDER     LIBRARY = .../moe_ext/libmoe_cpu.so, FOLDER = what export.py wrote
// Both must obey the error rule on every case: |y - truth| at most twice plain PyTorch's.
// Exit status: 0 all cases right, 1 a result is wrong, 2 something could not be loaded or run.
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Registers the ops; has to come before a model that names them is loaded. Never closed: the dispatcher keeps pointers into it.
void load_ops(const std::string& path) {
  const std::string advice =
      "\nBuild it with `pip install --no-build-isolation -e .` and pass the path that "
      "`python -c \"import moe_ext; print(moe_ext.ops.CPU_LIBRARY)\"` prints.";
  if (!dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    throw std::runtime_error("cannot load the op library: " + std::string(dlerror()) + advice);
  }
  if (!c10::Dispatcher::singleton().findSchema({"moe::grouped_forward", ""})) {
    throw std::runtime_error(path + " is loaded, but registers no moe::grouped_forward: it is not moe_ext's op library" + advice);
  }
}

c10::IValue read_cases(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path + "; run export.py first");
  return torch::jit::pickle_load(std::vector<char>(std::istreambuf_iterator<char>(file), {}));
}

double relative_error(const at::Tensor& y, const at::Tensor& truth) {
  return ((y.to(at::kDouble) - truth).norm() / truth.norm()).item<double>();
}

// One line per case; whether all are right.
bool run_cases(const std::string& folder) {
  c10::InferenceMode inference;  // the gradient formulas live in Python
  const c10::IValue cases = read_cases(folder + "/cases.pt");
  torch::jit::Module script = torch::jit::load(folder + "/model.ts");
  torch::inductor::AOTIModelPackageLoader package(folder + "/model.pt2");
  bool all_right = true;
  for (const c10::IValue& item : cases.toListRef()) {
    const auto& fields = item.toTupleRef().elements();
    const at::Tensor x = fields[0].toTensor(), plain = fields[1].toTensor(), truth = fields[2].toTensor();
    const at::Tensor scripted = script.forward({x}).toTensor();
    std::vector<at::Tensor> inputs{x};
    const at::Tensor packaged = package.run(inputs).at(0);
    const double allowed = 2 * relative_error(plain, truth);
    const double script_error = relative_error(scripted, truth), package_error = relative_error(packaged, truth);
    const double apart = relative_error(scripted, packaged.to(at::kDouble));
    const bool right = script_error <= allowed && package_error <= allowed && apart <= 2 * allowed;  // NaN is wrong too
    all_right = all_right && right;
    std::printf("%4lld tokens: error of TorchScript %.2e, of AOTInductor %.2e, allowed %.2e; apart %.2e: %s\n",
                static_cast<long long>(x.size(0)), script_error, package_error, allowed, apart, right ? "ok" : "WRONG");
  }
  return all_right;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s LIBRARY FOLDER\n  LIBRARY  moe_ext/libmoe_cpu.so\n  FOLDER   what export.py wrote\n", argv[0]);
    return 2;
  }
  try {
    load_ops(argv[1]);
    return run_cases(argv[2]) ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
