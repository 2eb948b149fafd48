// Python's view of host memory and of runs of pages in mtserve._core. Signatures are documented in mtserve/_core.pyi.
#include "bindings.h"

#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../cache/buffers.h"
#include "driver_queue.h"
#include "host_memory.h"
#include "runs.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mtserve {
namespace {

// A view holds a reference to `self`: the mapping lives as long as any view of it.
int get_buffer(PyObject* self, Py_buffer* view, int flags) {
    const HostMemory* memory = nb::inst_ptr<HostMemory>(self);
    return PyBuffer_FillInfo(view, self, memory->data(), memory->bytes(), 0, flags);
}

const int32_t* page_ids(const Buffer& buffer, const char* field) {
    if (buffer.rank() != 1 || !buffer.holds(4, "il")) throw invalid_argument(field, "needs an int32 array [pages]");
    return buffer.data<int32_t>();
}

// Those of all `arrays`, one after the other.
std::vector<int32_t> page_list(nb::sequence arrays, const char* field) {
    std::vector<int32_t> pages;
    for (const nb::handle array : arrays) {
        const Buffer buffer(array, field, PyBUF_FORMAT);
        const int32_t* ids = page_ids(buffer, field);
        pages.insert(pages.end(), ids, ids + buffer.extent(0));
    }
    return pages;
}

void check_runs(int64_t left, int64_t right, int64_t boundary) {
    if (left != right) throw invalid_argument("right", "needs as many pages as left");
    if (boundary < 0) throw invalid_argument("boundary", std::to_string(boundary) + " is below 0");
}

nb::bytes runs(nb::handle left, nb::handle right, int64_t boundary) {
    const Buffer from(left, "left", PyBUF_FORMAT), to(right, "right", PyBUF_FORMAT);
    const int32_t* left_ids = page_ids(from, "left");
    const int32_t* right_ids = page_ids(to, "right");
    check_runs(from.extent(0), to.extent(0), boundary);
    const std::vector<int64_t> found = find_runs(left_ids, right_ids, from.extent(0), boundary);
    return nb::bytes(found.data(), found.size() * sizeof(int64_t));
}

int64_t number_of_runs(nb::sequence left, nb::sequence right, int64_t boundary) {
    const std::vector<int32_t> from = page_list(left, "left"), to = page_list(right, "right");
    const int64_t count = static_cast<int64_t>(from.size());
    check_runs(count, static_cast<int64_t>(to.size()), boundary);
    return count_runs(from.data(), to.data(), count, boundary);
}

std::vector<int64_t> int64s(nb::handle array, const char* field, int64_t count = -1) {
    const Buffer buffer(array, field, PyBUF_FORMAT);
    if (buffer.rank() != 1 || !buffer.holds(8, "lq") || (count >= 0 && buffer.extent(0) != count))
        throw invalid_argument(field, "needs an int64 array [" + (count < 0 ? "n" : std::to_string(count)) + "]");
    return {buffer.data<int64_t>(), buffer.data<int64_t>() + buffer.extent(0)};
}

void queue_batch(DriverQueue& queue, nb::handle to, nb::handle source, nb::handle sizes, uintptr_t stream) {
    std::vector<int64_t> targets = int64s(to, "to");
    const int64_t count = static_cast<int64_t>(targets.size());
    queue.copy_batch(std::move(targets), int64s(source, "source", count), int64s(sizes, "sizes", count), stream);
}

PageLink page_link(uintptr_t pool, int64_t pool_pages, uintptr_t arena, int64_t arena_pages, int64_t layers,
                   int64_t layer_bytes, int64_t chunk_pages, int64_t strided_bytes) {
    const std::pair<int64_t, const char*> counts[] = {{layers, "layers"}, {layer_bytes, "layer_bytes"}};
    for (const auto& [value, field] : counts)
        if (value < 1) throw invalid_argument(field, std::to_string(value) + " is below 1");
    const std::pair<int64_t, const char*> sizes[] = {{pool_pages, "pool_pages"}, {arena_pages, "arena_pages"},
                                                     {chunk_pages, "chunk_pages"}, {strided_bytes, "strided_bytes"}};
    for (const auto& [value, field] : sizes)
        if (value < 0) throw invalid_argument(field, std::to_string(value) + " is below 0");
    return {static_cast<int64_t>(pool), pool_pages, static_cast<int64_t>(arena), arena_pages, layers, layer_bytes,
            chunk_pages, strided_bytes};
}

PageKernel page_kernel(uintptr_t function, uint32_t threads, uint32_t shared_bytes, const std::vector<nb::bytes>& parameters,
                       size_t paged, const std::vector<int64_t>& fields, int64_t most_pages, int64_t tile_pages,
                       int64_t column_tiles, int64_t most_blocks) {
    PageKernel kernel{function, threads, shared_bytes, {}, paged, 0, 0, 0, 0, most_pages, tile_pages, column_tiles, most_blocks};
    for (const nb::bytes& each : parameters) kernel.parameters.emplace_back(each.c_str(), each.size());
    if (paged >= kernel.parameters.size()) throw invalid_argument("paged", "is not one of the parameters");
    if (fields.size() != 4) throw invalid_argument("fields", "needs the offsets of first, last, count and pages");
    if (most_pages < 1 || tile_pages < 1 || column_tiles < 1 || most_blocks < 0)
        throw invalid_argument("most_pages", "needs pages, tiles and columns of 1 or more, and blocks of 0 or more");
    const int64_t word = sizeof(int32_t), size = static_cast<int64_t>(kernel.parameters[paged].size());
    for (size_t at = 0; at < fields.size(); ++at)
        if (fields[at] < 0 || fields[at] + (at == 3 ? most_pages : 1) * word > size)
            throw invalid_argument("fields", std::to_string(fields[at]) + " is outside the parameter of " + std::to_string(size) + " bytes");
    kernel.at_first = fields[0], kernel.at_last = fields[1], kernel.at_count = fields[2], kernel.at_pages = fields[3];
    return kernel;
}

constexpr size_t kStepWords = 8;

std::vector<MoveStep> move_steps(const std::vector<int64_t>& words) {
    if (words.size() % kStepWords) throw invalid_argument("steps", "needs 8 numbers a step");
    std::vector<MoveStep> steps;
    for (size_t at = 0; at < words.size(); at += kStepWords) {
        const int64_t* word = words.data() + at;
        steps.push_back({word[0], word[1], word[2], word[3], static_cast<uintptr_t>(word[4]), word[5], word[6],
                         static_cast<uintptr_t>(word[7])});
    }
    return steps;
}

void queue_move(DriverQueue& queue, const PageLink& link, bool to_pool, nb::sequence gpu_pages, nb::sequence host_pages,
                const std::vector<int64_t>& steps, uintptr_t stream, uintptr_t make_stream, const PageKernel* kernel) {
    queue.move({link, to_pool, page_list(gpu_pages, "gpu_pages"), page_list(host_pages, "host_pages"), move_steps(steps), stream,
                make_stream, kernel ? *kernel : PageKernel{}});
}

nb::object take_failure(DriverQueue& queue, uint64_t ticket) {
    const DriverFailure failed = queue.take_failure(ticket);
    if (!failed.function) return nb::none();
    return nb::make_tuple(failed.function, failed.code);
}

PyType_Slot slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(&get_buffer)}, {0, nullptr}};

}  // namespace

void bind_transfer(nb::module_& module) {
    module.def("_find_runs", &runs, "left"_a, "right"_a, "boundary"_a);
    module.def("_count_runs", &number_of_runs, "left"_a, "right"_a, "boundary"_a);
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    nb::class_<PageLink>(module, "_PageLink")
        .def("__init__",
             [](PageLink* self, uintptr_t pool, int64_t pool_pages, uintptr_t arena, int64_t arena_pages, int64_t layers,
                int64_t layer_bytes, int64_t chunk_pages, int64_t strided_bytes) {
                 new (self) PageLink(page_link(pool, pool_pages, arena, arena_pages, layers, layer_bytes, chunk_pages, strided_bytes));
             },
             "pool"_a, "pool_pages"_a, "arena"_a, "arena_pages"_a, "layers"_a, "layer_bytes"_a, "chunk_pages"_a,
             "strided_bytes"_a);
    nb::class_<PageKernel>(module, "_PageKernel")
        .def("__init__",
             [](PageKernel* self, uintptr_t function, uint32_t threads, uint32_t shared_bytes,
                const std::vector<nb::bytes>& parameters, size_t paged, const std::vector<int64_t>& fields, int64_t most_pages,
                int64_t tile_pages, int64_t column_tiles, int64_t most_blocks) {
                 new (self) PageKernel(page_kernel(function, threads, shared_bytes, parameters, paged, fields, most_pages,
                                                   tile_pages, column_tiles, most_blocks));
             },
             "function"_a, "threads"_a, "shared_bytes"_a, "parameters"_a, "paged"_a, "fields"_a, "most_pages"_a,
             "tile_pages"_a, "column_tiles"_a, "most_blocks"_a);
    nb::class_<DriverQueue>(module, "_DriverQueue")
        .def("__init__",
             [](DriverQueue* self, uintptr_t set_context, uintptr_t copy, uintptr_t copy_batch, uintptr_t copy_2d,
                uintptr_t record, uintptr_t wait_event, uintptr_t launch, bool batch_reports_failed, uintptr_t context) {
                 new (self) DriverQueue({set_context, copy, copy_batch, copy_2d, record, wait_event, launch, batch_reports_failed}, context);
             },
             "set_context"_a, "copy"_a, "copy_batch"_a, "copy_2d"_a, "record"_a, "wait_event"_a, "launch"_a,
             "batch_reports_failed"_a, "context"_a)
        .def("copy_batch", &queue_batch, "to"_a, "source"_a, "sizes"_a, "stream"_a)
        .def("record", &DriverQueue::record, "event"_a, "stream"_a)
        .def("hold_back", &DriverQueue::hold_back, "stream"_a, "event"_a)
        .def("move", &queue_move, "link"_a, "to_pool"_a, "gpu_pages"_a, "host_pages"_a, "steps"_a, "stream"_a,
             "make_stream"_a, "kernel"_a.none())
        .def("submit", &DriverQueue::submit)
        .def("over", &DriverQueue::over, "ticket"_a)
        .def("wait", &DriverQueue::wait, "ticket"_a, unlocked)
        .def("take_failure", &take_failure, "ticket"_a);
    nb::class_<HostMemory>(module, "HostMemory", nb::type_slots(slots))
        .def(nb::init<int64_t>(), "bytes"_a)
        .def_prop_ro("address", [](const HostMemory& memory) { return reinterpret_cast<uintptr_t>(memory.data()); })
        .def_prop_ro("bytes", &HostMemory::bytes)
        .def("prefer_node", &HostMemory::prefer_node, "node"_a)
        .def("populate", &HostMemory::populate, "offset"_a, "bytes"_a, "threads"_a = 1, unlocked)
        .def("discard", &HostMemory::discard, "offset"_a, "bytes"_a, unlocked);
}

}  // namespace mtserve
