// Typed views of numpy arrays through the buffer protocol: checked, held while in use, never copied.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "chain.h"
#include "errors.h"

namespace mtserve {

// One C-contiguous array. Throws InvalidArgument naming `field` for anything else.
class Buffer {
public:
    Buffer(nanobind::handle array, const std::string& field, int flags = PyBUF_SIMPLE) {
        if (PyObject_GetBuffer(array.ptr(), &view_, flags | PyBUF_ND) == 0) return;
        PyErr_Clear();
        throw invalid_argument(field, flags & PyBUF_WRITABLE ? "needs a writable C-contiguous array" : "needs a C-contiguous array");
    }
    ~Buffer() { PyBuffer_Release(&view_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    template <typename T>
    T* data() const { return static_cast<T*>(view_.buf); }
    int rank() const { return view_.ndim; }
    int64_t extent(int axis) const { return view_.shape[axis]; }
    int64_t bytes() const { return view_.len; }

    // Whether items are native integers of `size` bytes, of one of the struct-module codes.
    bool holds(int64_t size, const char* codes) const {
        const char* format = view_.format;
        if (!format || view_.itemsize != size) return false;
        if (*format == '@' || *format == '=') ++format;
        for (const char* code = codes; *code; ++code)
            if (format[0] == *code && format[1] == 0) return true;
        return false;
    }

private:
    Py_buffer view_;
};

// A chain's view without its owner: valid while the array lives and is not resized.
inline ChainView chain_view(const Buffer& buffer, const std::string& field) {
    if (buffer.rank() != 1 || !buffer.holds(8, "LQ")) throw invalid_argument(field, "needs a uint64 array [tokens]");
    if (buffer.extent(0) > kMaxChain)
        throw invalid_argument(field, std::to_string(buffer.extent(0)) + " tokens; a chain has at most " + std::to_string(kMaxChain));
    return {buffer.data<uint64_t>(), static_cast<int32_t>(buffer.extent(0))};
}

}  // namespace mtserve
