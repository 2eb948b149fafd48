// Python's view of host memory and of runs of pages in mtserve._core. Signatures are documented in mtserve/_core.pyi.
#include "bindings.h"

#include <cstdint>

#include "../cache/buffers.h"
#include "host_memory.h"
#include "runs.h"
#include "strided.h"

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

// The interpreter's lock is kept: the calls are over sooner than another thread would give it back.
int copies(uintptr_t function, nb::handle to, nb::handle source, nb::handle rows, int64_t width, int64_t pitch,
           uintptr_t stream) {
    const Buffer to_all(to, "to", PyBUF_FORMAT), source_all(source, "source", PyBUF_FORMAT), rows_all(rows, "rows", PyBUF_FORMAT);
    const int64_t count = to_all.rank() == 1 ? to_all.extent(0) : -1;
    const int64_t* to_at = int64s(to_all, "to", count);
    const int64_t* source_at = int64s(source_all, "source", count);
    const int64_t* row_counts = int64s(rows_all, "rows", count);
    return copy_strided(reinterpret_cast<Copy2DFunction>(function), count, to_at, source_at, row_counts, width, pitch,
                        reinterpret_cast<void*>(stream));
}

PyType_Slot slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(&get_buffer)}, {0, nullptr}};

}  // namespace

void bind_transfer(nb::module_& module) {
    module.def("_find_runs", &runs, "left"_a, "right"_a, "boundary"_a);
    module.def("_copy_strided", &copies, "function"_a, "to"_a, "source"_a, "rows"_a, "width"_a, "pitch"_a, "stream"_a);
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    nb::class_<HostMemory>(module, "HostMemory", nb::type_slots(slots))
        .def(nb::init<int64_t>(), "bytes"_a)
        .def_prop_ro("address", [](const HostMemory& memory) { return reinterpret_cast<uintptr_t>(memory.data()); })
        .def_prop_ro("bytes", &HostMemory::bytes)
        .def("prefer_node", &HostMemory::prefer_node, "node"_a)
        .def("populate", &HostMemory::populate, "offset"_a, "bytes"_a, "threads"_a = 1, unlocked)
        .def("discard", &HostMemory::discard, "offset"_a, "bytes"_a, unlocked);
}

}  // namespace mtserve
