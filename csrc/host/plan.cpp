// The launch plan as Python sees it.
#include "../common/plan.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

namespace py = pybind11;

namespace {

using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, bool>;

// Each launch as (first layer, last layer, first block of each layer and the number of blocks).
py::list build_plan(const std::vector<ShapeTuple>& shapes, const std::string& kernel) {
  std::vector<orthoreg::Shape> layers;
  for (const auto& [groups, n, width, columns] : shapes) {
    if (groups < 1 || n < 0 || width < 0) {
      throw py::value_error("a shape is (groups >= 1, filters of a group, entries, columns)");
    }
    layers.push_back({groups, n, width, columns});
  }
  if (kernel != "gram" && kernel != "grad") {
    throw py::value_error("unknown kernel '" + kernel + "'; valid: gram, grad");
  }
  const auto units = kernel == "gram" ? orthoreg::gram_units : orthoreg::grad_units;
  py::list out;
  for (const orthoreg::Launch& launch : orthoreg::plan_launches(layers, units)) {
    const auto& blocks = launch.first_unit;
    out.append(py::make_tuple(launch.first, launch.last,
                              py::array_t<int64_t>(blocks.size(), blocks.data())));
  }
  return out;
}

}  // namespace

void bind_plan(py::module_& m) {
  m.attr("TILE") = orthoreg::kTile;
  m.attr("LAYERS_PER_LAUNCH") = orthoreg::kLayersPerLaunch;
  m.def("build_plan", &build_plan, py::arg("shapes"), py::arg("kernel") = "gram",
        "The launches of a tiled kernel over layers of shape (groups, n, width, columns).");
}
