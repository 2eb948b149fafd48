// What csrc/transfer adds to mtserve._core.
#pragma once

#include <nanobind/nanobind.h>

namespace mtserve {

void bind_transfer(nanobind::module_& module);

}  // namespace mtserve
