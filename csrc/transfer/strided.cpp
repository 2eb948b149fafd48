#include "strided.h"

#include <cstddef>

namespace mtserve {

namespace {

constexpr int kUnified = 4;  // CU_MEMORYTYPE_UNIFIED

// Mirrors CUDA_MEMCPY2D of cuda.h.
struct Side {
    size_t x = 0, y = 0;
    int type = kUnified;
    const void* host = nullptr;
    uint64_t device = 0;
    void* array = nullptr;
    size_t pitch = 0;
};
struct Shape {
    Side source, to;
    size_t width = 0, rows = 0;
};
static_assert(sizeof(Side) == 56 && sizeof(Shape) == 128, "the driver's layout");

}  // namespace

int copy_strided(Copy2DFunction copy, int64_t count, const int64_t* to, const int64_t* source, const int64_t* rows,
                 int64_t width, int64_t pitch, void* stream) {
    Shape shape;
    shape.source.pitch = shape.to.pitch = static_cast<size_t>(pitch);
    shape.width = static_cast<size_t>(width);
    for (int64_t i = 0; i < count; ++i) {
        shape.source.device = static_cast<uint64_t>(source[i]);
        shape.to.device = static_cast<uint64_t>(to[i]);
        shape.rows = static_cast<size_t>(rows[i]);
        const int result = copy(&shape, stream);
        if (result != 0) return result;
    }
    return 0;
}

}  // namespace mtserve
