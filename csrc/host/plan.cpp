// The launch plan as Python sees it.
#include "../common/plan.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

namespace py = pybind11;

namespace {

using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, bool>;

py::list launches(const std::vector<orthoreg::Launch>& plan) {
  py::list out;
  for (const orthoreg::Launch& launch : plan) {
    py::list items;
    for (const orthoreg::Item& item : launch.items) {
      items.append(py::dict(
          py::arg("layer") = item.layer, py::arg("units") = item.units,
          py::arg("first_unit") = item.first_unit, py::arg("slices") = item.slices,
          py::arg("slice_length") = item.slice_length, py::arg("first_part") = item.first_part,
          py::arg("first_slab") = item.first_slab));
    }
    out.append(py::dict(py::arg("tile") = launch.tile, py::arg("units") = launch.units,
                        py::arg("items") = items));
  }
  return out;
}

py::dict build_plan(const std::vector<ShapeTuple>& shapes, int tile, bool fused) {
  std::vector<orthoreg::Shape> layers;
  for (const auto& [groups, n, width, columns] : shapes) {
    if (groups < 1 || n < 0 || width < 0) {
      throw py::value_error("a shape is (groups >= 1, filters of a group, entries, columns)");
    }
    layers.push_back({groups, n, width, columns});
  }
  orthoreg::Plan plan;
  if (!fused || !orthoreg::plan_fused(layers, tile, plan)) {
    orthoreg::plan_gram(layers, tile, plan);
    orthoreg::plan_gradient(layers, tile, plan);
  }
  return py::dict(py::arg("fused") = plan.fused, py::arg("gram") = launches(plan.gram),
                  py::arg("gradient") = launches(plan.gradient), py::arg("parts") = plan.parts,
                  py::arg("slab_entries") = plan.slab_entries);
}

}  // namespace

void bind_plan(py::module_& m) {
  m.attr("LAYERS_PER_LAUNCH") = orthoreg::kLayersPerLaunch;
  m.def("build_plan", &build_plan, py::arg("shapes"), py::arg("tile") = 0, py::arg("fused") = false,
        "The launches for layers of shape (groups, n, width, columns); tile: of all layers, 0 for "
        "the "
        "best of each; fused: as for value and gradient in one call.");
  m.def("waves", &orthoreg::waves, py::arg("bytes"), py::arg("most"),
        "The first layers of the waves whose Gram matrices, of so many bytes each, fit into `most` "
        "bytes, and the number of layers.");
}
