// What csrc/cache/policy_bindings.cpp adds to the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace mtserve {

void bind_policy(nanobind::module_& module);

}  // namespace mtserve
