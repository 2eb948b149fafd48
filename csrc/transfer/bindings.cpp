// Python's view of host memory and of runs of pages in mtserve._core. Signatures are documented in mtserve/_core.pyi.
#include "bindings.h"

#include <nanobind/stl/vector.h>

#include <cstdint>

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

nb::bytes runs(nb::handle left, nb::handle right, int64_t boundary) {
    const Buffer from(left, "left", PyBUF_FORMAT), to(right, "right", PyBUF_FORMAT);
    const int32_t* left_ids = page_ids(from, "left");
    const int32_t* right_ids = page_ids(to, "right");
    if (from.extent(0) != to.extent(0)) throw invalid_argument("right", "needs as many pages as left");
    if (boundary < 0) throw invalid_argument("boundary", std::to_string(boundary) + " is below 0");
    const std::vector<int64_t> found = find_runs(left_ids, right_ids, from.extent(0), boundary);
    return nb::bytes(found.data(), found.size() * sizeof(int64_t));
}

const int64_t* int64s(const Buffer& buffer, const char* field, int64_t count) {
    if (buffer.rank() != 1 || !buffer.holds(8, "lq") || buffer.extent(0) != count)
        throw invalid_argument(field, "needs an int64 array [" + std::to_string(count) + "]");
    return buffer.data<int64_t>();
}

// Where copies go to and come from, and how large each is: three int64 arrays of one length.
struct Copies {
    Copies(nb::handle to, nb::handle source, nb::handle sizes, const char* name)
        : buffers{{to, "to", PyBUF_FORMAT}, {source, "source", PyBUF_FORMAT}, {sizes, name, PyBUF_FORMAT}},
          count(buffers[0].rank() == 1 ? buffers[0].extent(0) : -1), to(int64s(buffers[0], "to", count)),
          source(int64s(buffers[1], "source", count)), sizes(int64s(buffers[2], name, count)) {}
    Buffer buffers[3];
    int64_t count;
    const int64_t *to, *source, *sizes;
};

void queue_batch(DriverQueue& queue, nb::handle to, nb::handle source, nb::handle sizes, uintptr_t stream) {
    const Copies copies(to, source, sizes, "sizes");
    queue.copy_batch(copies.to, copies.source, copies.sizes, copies.count, stream);
}

void queue_strided(DriverQueue& queue, nb::handle to, nb::handle source, nb::handle rows, int64_t width, int64_t pitch,
                   uintptr_t stream) {
    const Copies copies(to, source, rows, "rows");
    queue.copy_strided(copies.to, copies.source, copies.sizes, copies.count, width, pitch, stream);
}

void queue_launch(DriverQueue& queue, uintptr_t function, uint32_t grid, uint32_t threads, uint32_t shared_bytes,
                  uintptr_t stream, const std::vector<nb::bytes>& parameters) {
    std::vector<std::string> values;
    for (const nb::bytes& each : parameters) values.emplace_back(each.c_str(), each.size());
    queue.launch(function, grid, threads, shared_bytes, stream, std::move(values));
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
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    nb::class_<DriverQueue>(module, "_DriverQueue")
        .def("__init__",
             [](DriverQueue* self, uintptr_t set_context, uintptr_t copy, uintptr_t copy_batch, uintptr_t copy_2d,
                uintptr_t record, uintptr_t wait_event, uintptr_t launch, bool batch_reports_failed, uintptr_t context) {
                 new (self) DriverQueue({set_context, copy, copy_batch, copy_2d, record, wait_event, launch, batch_reports_failed}, context);
             },
             "set_context"_a, "copy"_a, "copy_batch"_a, "copy_2d"_a, "record"_a, "wait_event"_a, "launch"_a,
             "batch_reports_failed"_a, "context"_a)
        .def("copy_batch", &queue_batch, "to"_a, "source"_a, "sizes"_a, "stream"_a)
        .def("copy_strided", &queue_strided, "to"_a, "source"_a, "rows"_a, "width"_a, "pitch"_a, "stream"_a)
        .def("record", &DriverQueue::record, "event"_a, "stream"_a)
        .def("hold_back", &DriverQueue::hold_back, "stream"_a, "event"_a)
        .def("launch", &queue_launch, "function"_a, "grid"_a, "threads"_a, "shared_bytes"_a, "stream"_a, "parameters"_a)
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
