// What csrc/simulate/bindings.cpp adds to the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace mtserve {

void bind_simulation(nanobind::module_& module);

}  // namespace mtserve
