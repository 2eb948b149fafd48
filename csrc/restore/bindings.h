// What csrc/restore adds to mtserve._core.
#pragma once

#include <nanobind/nanobind.h>

namespace mtserve {

void bind_restore(nanobind::module_& module);

}  // namespace mtserve
