// The pybind11 module _host. No tensor crosses it, so it needs no torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "build_config.h"

namespace py = pybind11;

namespace {

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> out;
  for (std::string word; stream >> word;) out.push_back(word);
  return out;
}

// What was decided when the binaries were built; orthoreg_ext/build_info.py adds what runs now.
py::dict build_info() {
  py::dict info;
  info["version"] = ORTHOREG_BUILD_VERSION;
  info["build_type"] = ORTHOREG_BUILD_TYPE;
  info["compiler"] = ORTHOREG_CXX_COMPILER;
  info["torch_headers"] = ORTHOREG_TORCH_HEADERS;
  info["torch_target"] = ORTHOREG_TORCH_TARGET;
  info["cpu_levels"] = words(ORTHOREG_CPU_LEVELS);
  info["cuda_version"] = ORTHOREG_CUDA_VERSION;
  info["cuda_architectures"] = words(ORTHOREG_CUDA_ARCHITECTURES);
  info["cuda_reason"] = ORTHOREG_CUDA_REASON;
  return info;
}

}  // namespace

void bind_plan(py::module_& m);  // plan.cpp

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information and launch plans of orthoreg_ext.";
  m.def("build_info", &build_info, "What was decided when the binaries were built.");
  bind_plan(m);
}
