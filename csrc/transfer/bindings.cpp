// Python's view of host memory in mtserve._core. Signatures are documented in mtserve/_core.pyi.
#include "bindings.h"

#include <cstdint>

#include "host_memory.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mtserve {
namespace {

// A view holds a reference to `self`: the mapping lives as long as any view of it.
int get_buffer(PyObject* self, Py_buffer* view, int flags) {
    const HostMemory* memory = nb::inst_ptr<HostMemory>(self);
    return PyBuffer_FillInfo(view, self, memory->data(), memory->bytes(), 0, flags);
}

PyType_Slot slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(&get_buffer)}, {0, nullptr}};

}  // namespace

void bind_host_memory(nb::module_& module) {
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
