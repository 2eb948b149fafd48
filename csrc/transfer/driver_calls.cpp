#include "driver_calls.h"

#include <algorithm>
#include <cstddef>

namespace mtserve {

namespace {

constexpr int64_t kMaxBatch = 1024;  // copies a call: far above what it takes to hide the call
constexpr int kStreamOrder = 1;      // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
constexpr int kProgrammaticStreamSerialization = 6;  // CUlaunchAttributeID
constexpr int kUnified = 4;                          // CU_MEMORYTYPE_UNIFIED

// Mirrors CUmemcpyAttributes: an order, hints of where source and destination lie (unused), flags.
struct CopyAttributes {
    int order = kStreamOrder;
    int hints[4] = {};
    unsigned flags = 0;
};
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
// Mirrors CUlaunchAttribute: an id, padded to 8 bytes, and a union of 64.
struct LaunchAttribute {
    int id = kProgrammaticStreamSerialization, pad = 0, value = 1;
    char rest[60] = {};
};
// Mirrors CUlaunchConfig.
struct LaunchConfig {
    uint32_t grid[3], block[3], shared_bytes;
    void* stream;
    LaunchAttribute* attributes;
    uint32_t attribute_count;
};
static_assert(sizeof(Side) == 56 && sizeof(Shape) == 128, "the driver's layout");
static_assert(sizeof(LaunchAttribute) == 72 && offsetof(LaunchConfig, stream) == 32, "the driver's layout");

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

DriverFailure failure(const char* function, int code) {
    return code == 0 ? DriverFailure{} : DriverFailure{function, code};
}

int copy_some(const DriverFunctions& functions, int64_t* to, int64_t* source, int64_t* sizes, int64_t count,
              uintptr_t stream) {
    CopyAttributes attributes;
    size_t used_from = 0, failed = 0;
    if (functions.batch_reports_failed) {
        using Batch = int (*)(void*, void*, void*, size_t, void*, size_t*, size_t, size_t*, void*);
        return reinterpret_cast<Batch>(functions.copy_batch)(to, source, sizes, static_cast<size_t>(count), &attributes,
                                                             &used_from, 1, &failed, pointer(stream));
    }
    using Batch = int (*)(void*, void*, void*, size_t, void*, size_t*, size_t, void*);
    return reinterpret_cast<Batch>(functions.copy_batch)(to, source, sizes, static_cast<size_t>(count), &attributes,
                                                         &used_from, 1, pointer(stream));
}

}  // namespace

void DriverFunctions::use_context(uintptr_t context) const {
    reinterpret_cast<int (*)(void*)>(set_context)(pointer(context));
}

DriverFailure DriverFunctions::queue_batch(std::vector<int64_t>& to, std::vector<int64_t>& source, std::vector<int64_t>& sizes,
                                           uintptr_t stream) const {
    const int64_t count = static_cast<int64_t>(to.size());
    if (!copy_batch) {
        const auto one = reinterpret_cast<int (*)(uint64_t, uint64_t, size_t, void*)>(copy);
        for (size_t i = 0; i < to.size(); ++i) {
            const int code = one(static_cast<uint64_t>(to[i]), static_cast<uint64_t>(source[i]),
                                 static_cast<size_t>(sizes[i]), pointer(stream));
            if (code != 0) return failure("cuMemcpyAsync", code);
        }
        return {};
    }
    for (int64_t first = 0; first < count; first += kMaxBatch) {
        const int code = copy_some(*this, to.data() + first, source.data() + first, sizes.data() + first,
                                   std::min(kMaxBatch, count - first), stream);
        if (code != 0) return failure("cuMemcpyBatchAsync", code);
    }
    return {};
}

DriverFailure DriverFunctions::queue_strided(const std::vector<int64_t>& to, const std::vector<int64_t>& source,
                                             const std::vector<int64_t>& rows, int64_t width, int64_t pitch,
                                             uintptr_t stream) const {
    const auto copy = reinterpret_cast<int (*)(const void*, void*)>(copy_2d);
    Shape shape;
    shape.source.pitch = shape.to.pitch = static_cast<size_t>(pitch);
    shape.width = static_cast<size_t>(width);
    for (size_t i = 0; i < to.size(); ++i) {
        shape.source.device = static_cast<uint64_t>(source[i]);
        shape.to.device = static_cast<uint64_t>(to[i]);
        shape.rows = static_cast<size_t>(rows[i]);
        const int code = copy(&shape, pointer(stream));
        if (code != 0) return failure("cuMemcpy2DAsync_v2", code);
    }
    return {};
}

DriverFailure DriverFunctions::queue_record(uintptr_t event, uintptr_t stream) const {
    return failure("cuEventRecord", reinterpret_cast<int (*)(void*, void*)>(record)(pointer(event), pointer(stream)));
}

DriverFailure DriverFunctions::queue_wait(uintptr_t stream, uintptr_t event) const {
    const auto wait = reinterpret_cast<int (*)(void*, void*, unsigned)>(wait_event);
    return failure("cuStreamWaitEvent", wait(pointer(stream), pointer(event), 0));
}

DriverFailure DriverFunctions::queue_launch(uintptr_t function, uint32_t grid, uint32_t threads, uint32_t shared_bytes,
                                            uintptr_t stream, std::vector<std::string>& parameters) const {
    LaunchAttribute attribute;
    LaunchConfig config{{grid, 1, 1}, {threads, 1, 1}, shared_bytes, pointer(stream), &attribute, 1};
    std::vector<void*> addresses;
    for (std::string& each : parameters) addresses.push_back(each.data());
    const auto call = reinterpret_cast<int (*)(const void*, void*, void**, void**)>(launch);
    return failure("cuLaunchKernelEx", call(&config, pointer(function), addresses.data(), nullptr));
}

}  // namespace mtserve
