// What csrc/plan adds to mtserve._core.
#pragma once

#include <nanobind/nanobind.h>

namespace mtserve {

void bind_attention_work(nanobind::module_& module);
void bind_batch_layout(nanobind::module_& module);

}  // namespace mtserve
