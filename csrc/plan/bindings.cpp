// Python's view of the batch planners in mtserve._core. Signatures are documented in mtserve/_core.pyi.
#include "bindings.h"

#include <string>

#include "../cache/buffers.h"
#include "attention_work.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mtserve {
namespace {

// An int32 array, [rows] or [rows, columns].
int32_t* int32_array(const Buffer& buffer, const char* field, int64_t columns) {
    const bool matrix = columns > 0;
    if (buffer.rank() != (matrix ? 2 : 1) || !buffer.holds(4, "il") || (matrix && buffer.extent(1) != columns))
        throw invalid_argument(field, matrix ? "needs an int32 array [n, " + std::to_string(columns) + "]" : "needs an int32 array [n]");
    return buffer.data<int32_t>();
}

nb::tuple plan_work(nb::handle slots, nb::handle limits, int32_t heads, int32_t head_dim, int32_t sms, bool deterministic,
                    nb::handle out_work, nb::handle out_splits, int32_t pieces, int32_t tile_rows) {
    const Buffer slots_in(slots, "slots", PyBUF_FORMAT), limits_in(limits, "limits", PyBUF_FORMAT);
    const Buffer work(out_work, "out_work", PyBUF_FORMAT | PyBUF_WRITABLE);
    const Buffer splits(out_splits, "out_splits", PyBUF_FORMAT | PyBUF_WRITABLE);
    const WorkRequest request{int32_array(slots_in, "slots", 4), slots_in.extent(0), int32_array(limits_in, "limits", 0),
                              limits_in.extent(0), heads, head_dim, sms, deterministic, pieces, tile_rows};
    const WorkOut out{int32_array(work, "out_work", kItemWords), work.extent(0), int32_array(splits, "out_splits", 0),
                      splits.extent(0)};
    const WorkPlan plan = plan_attention_work(request, out);
    return nb::make_tuple(plan.items, plan.max_splits, plan.tile_rows);
}

}  // namespace

void bind_attention_work(nb::module_& module) {
    module.def("_plan_attention_work", &plan_work, "slots"_a, "limits"_a, "heads"_a, "head_dim"_a, "sms"_a, "deterministic"_a,
               "out_work"_a, "out_splits"_a, "pieces"_a, "tile_rows"_a);
}

}  // namespace mtserve
