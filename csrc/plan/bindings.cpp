// Python's view of the batch planners in mtserve._core. Signatures are documented in mtserve/_core.pyi.
#include "bindings.h"

#include <limits>
#include <string>
#include <vector>

#include "../cache/buffers.h"
#include "attention_work.h"
#include "batch_layout.h"

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

// The items of a list or tuple, which owns them.
class Items {
public:
    Items(nb::handle sequence, const char* field) : fast_(nb::steal(PySequence_Fast(sequence.ptr(), ""))) {
        if (fast_.is_valid()) return;
        PyErr_Clear();
        throw invalid_argument(field, "needs a list");
    }
    size_t size() const { return static_cast<size_t>(PySequence_Fast_GET_SIZE(fast_.ptr())); }
    nb::handle operator[](size_t index) const { return PySequence_Fast_GET_ITEM(fast_.ptr(), static_cast<Py_ssize_t>(index)); }

private:
    nb::object fast_;
};

int64_t integer(nb::handle value, const char* field, int64_t low, int64_t high) {
    const long long number = PyLong_AsLongLong(value.ptr());
    const bool failed = number == -1 && PyErr_Occurred();
    if (failed) PyErr_Clear();
    if (failed || number < low || number > high)
        throw invalid_argument(field, "needs integers in " + std::to_string(low) + ".." + std::to_string(high));
    return number;
}

std::vector<SlotSpan> slot_spans(nb::handle spans) {
    constexpr size_t kWords = 5;
    const Items items(spans, "spans");
    if (items.size() % kWords) throw invalid_argument("spans", "needs 5 integers a slot");
    std::vector<SlotSpan> slots(items.size() / kWords);
    for (size_t b = 0; b < slots.size(); ++b) {
        int32_t words[kWords];
        for (size_t i = 0; i < kWords; ++i)
            words[i] = static_cast<int32_t>(integer(items[kWords * b + i], "spans", std::numeric_limits<int32_t>::min(),
                                                    std::numeric_limits<int32_t>::max()));
        slots[b] = {words[0], words[1], words[2], words[3], words[4]};
    }
    return slots;
}

// The view outlives its buffer: the caller's list keeps the array alive, and nobody resizes it while we hold the GIL.
FeatureRows feature_rows(nb::handle array, const char* field, int64_t row_bytes) {
    const Buffer buffer(array, field);
    if (buffer.rank() != 1 || buffer.bytes() != buffer.extent(0) * row_bytes)
        throw invalid_argument(field, "needs a C-contiguous array [n] of rows of " + std::to_string(row_bytes) + " bytes");
    return {buffer.data<uint8_t>(), buffer.extent(0)};
}

std::vector<FeatureRows> feature_list(nb::handle list, const char* field, int64_t row_bytes) {
    const Items items(list, field);
    std::vector<FeatureRows> rows(items.size());
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = feature_rows(items[i], field, row_bytes);
    return rows;
}

const int32_t* job_words(nb::handle array, const char* field, int64_t candidates) {
    const Buffer buffer(array, field, PyBUF_FORMAT);
    const int32_t* words = int32_array(buffer, field, 0);
    if (buffer.extent(0) != candidates) throw invalid_argument(field, "needs one entry a candidate: " + std::to_string(candidates));
    return words;
}

std::vector<JobRows> job_list(nb::handle candidates, nb::handle limits, nb::handle recency, int64_t row_bytes) {
    const Items rows(candidates, "candidates"), sees(limits, "limits"), buckets(recency, "recency");
    if (sees.size() != rows.size()) throw invalid_argument("limits", "needs one array a job: " + std::to_string(rows.size()));
    if (buckets.size() != rows.size()) throw invalid_argument("recency", "needs one array a job: " + std::to_string(rows.size()));
    std::vector<JobRows> jobs(rows.size());
    for (size_t i = 0; i < jobs.size(); ++i) {
        jobs[i].candidates = feature_rows(rows[i], "candidates", row_bytes);
        jobs[i].limits = job_words(sees[i], "limits", jobs[i].candidates.rows);
        jobs[i].recency = job_words(buckets[i], "recency", jobs[i].candidates.rows);
    }
    return jobs;
}

// [rows] or [rows, columns], to be written.
Int32s int32_out(nb::handle array, const char* field, int64_t columns) {
    const Buffer buffer(array, field, PyBUF_FORMAT | PyBUF_WRITABLE);
    int32_t* data = int32_array(buffer, field, columns);
    return {data, buffer.extent(0), columns ? columns : 1};
}

// [slots, pages] of any width; `flags` as for a buffer.
Int32s table(nb::handle array, int flags) {
    const Buffer buffer(array, "page_table", PyBUF_FORMAT | flags);
    if (buffer.rank() != 2 || !buffer.holds(4, "il")) throw invalid_argument("page_table", "needs an int32 array [slots, pages]");
    return {buffer.data<int32_t>(), buffer.extent(0), buffer.extent(1)};
}

BatchOut batch_out(nb::handle arrays) {
    const Items out(arrays, "out");
    if (out.size() != 11) throw invalid_argument("out", "needs 11 arrays, got " + std::to_string(out.size()));
    const Buffer raw(out[10], "raw", PyBUF_WRITABLE);
    return {int32_out(out[0], "slots", 4), table(out[1], PyBUF_WRITABLE), int32_out(out[2], "limit", 0),
            int32_out(out[3], "group", 0), int32_out(out[4], "target", 0), int32_out(out[5], "tiles", kTileWords),
            int32_out(out[6], "row", 0), int32_out(out[7], "source", 0), int32_out(out[8], "position", 0),
            int32_out(out[9], "bucket", 0), raw.data<uint8_t>(), raw.bytes()};
}

nb::tuple plan_batch(const BatchLayout& layout, nb::handle spans, nb::handle features, nb::handle kept, nb::handle candidates,
                     nb::handle limits, nb::handle recency, nb::handle page_table, nb::handle out) {
    const LayoutModel& model = layout.model();
    const BatchRequest request{slot_spans(spans), feature_list(features, "features", model.user_bytes),
                         feature_list(kept, "kept", model.behaviour_bytes),
                         job_list(candidates, limits, recency, model.candidate_bytes),
                         page_table.is_none() ? Int32s{nullptr, 0, 0} : table(page_table, PyBUF_SIMPLE)};
    const BatchCounts counts = layout.plan(request, batch_out(out));
    nb::list first_token;
    for (int64_t first : counts.first_token) first_token.append(first);
    return nb::make_tuple(counts.tiles, nb::tuple(first_token));
}

GapBuckets gap_buckets(nb::handle gap_thresholds) {
    const Buffer thresholds(gap_thresholds, "gap_thresholds", PyBUF_FORMAT);
    if (thresholds.rank() != 1 || !thresholds.holds(8, "lq")) throw invalid_argument("gap_thresholds", "needs an int64 array [buckets]");
    const int64_t* first = thresholds.data<int64_t>();
    return GapBuckets({first, first + thresholds.extent(0)});
}

void find_buckets(const GapBuckets& buckets, nb::handle gaps, nb::handle out) {
    const Buffer in(gaps, "gaps", PyBUF_FORMAT), to(out, "out", PyBUF_FORMAT | PyBUF_WRITABLE);
    if (in.rank() != 1 || !in.holds(8, "lq")) throw invalid_argument("gaps", "needs an int64 array [n]");
    int32_t* found = int32_array(to, "out", 0);
    if (to.extent(0) != in.extent(0)) throw invalid_argument("out", "needs one entry a gap: " + std::to_string(in.extent(0)));
    const int64_t* gap = in.data<int64_t>();
    for (int64_t i = 0; i < in.extent(0); ++i) found[i] = buckets.of(gap[i]);
}

void make_layout(BatchLayout* layout, int32_t users, int64_t user_bytes, int64_t behaviour_bytes, int64_t candidate_bytes,
                 int32_t page_tokens, int32_t tile_tokens, bool full_attention, bool plain_norm, nb::handle gap_thresholds,
                 int64_t rows_of_part) {
    new (layout) BatchLayout({users, user_bytes, behaviour_bytes, candidate_bytes, page_tokens, tile_tokens, full_attention,
                              plain_norm, gap_buckets(gap_thresholds), rows_of_part});
}

}  // namespace

void bind_batch_layout(nb::module_& module) {
    nb::class_<GapBuckets>(module, "_GapBuckets")
        .def("__init__", [](GapBuckets* self, nb::handle thresholds) { new (self) GapBuckets(gap_buckets(thresholds)); },
             "gap_thresholds"_a)
        .def("find", &find_buckets, "gaps"_a, "out"_a);
    nb::class_<BatchLayout>(module, "_BatchLayout")
        .def("__init__", &make_layout, "users"_a, "user_bytes"_a, "behaviour_bytes"_a, "candidate_bytes"_a, "page_tokens"_a,
             "tile_tokens"_a, "full_attention"_a, "plain_norm"_a, "gap_thresholds"_a,
             "rows_of_part"_a)
        .def("plan", &plan_batch, "spans"_a, "features"_a, "kept"_a, "candidates"_a, "limits"_a, "recency"_a,
             "page_table"_a.none(), "out"_a);
}

void bind_attention_work(nb::module_& module) {
    module.def("_plan_attention_work", &plan_work, "slots"_a, "limits"_a, "heads"_a, "head_dim"_a, "sms"_a, "deterministic"_a,
               "out_work"_a, "out_splits"_a, "pieces"_a, "tile_rows"_a);
}

}  // namespace mtserve
