// Calls of the CUDA driver that queue work on streams. The driver's functions are looked up by the caller, so that this is
// built and runs where there is no driver.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mtserve {

// The first call that failed of some.
struct DriverFailure {
    const char* function = nullptr;  // null: none did
    int code = 0;

    void note(const DriverFailure& later) {
        if (!function) *this = later;
    }
};

// Addresses of cuCtxSetCurrent, cuMemcpyAsync, cuMemcpyBatchAsync (0: the driver has none), cuMemcpy2DAsync_v2,
// cuEventRecord, cuStreamWaitEvent and cuLaunchKernelEx, and calls of them, made at once.
struct DriverFunctions {
    uintptr_t set_context, copy, copy_batch, copy_2d, record, wait_event, launch;
    bool batch_reports_failed;  // whether copy_batch also takes where to say which copy failed

    void use_context(uintptr_t context) const;
    // sizes[i] bytes from source[i] to to[i]; where it fails, some may have been queued. The driver may write the lists.
    DriverFailure queue_batch(std::vector<int64_t>& to, std::vector<int64_t>& source, std::vector<int64_t>& sizes,
                              uintptr_t stream) const;
    // rows[i] rows of `width` bytes, `pitch` apart, from source[i] to to[i].
    DriverFailure queue_strided(const std::vector<int64_t>& to, const std::vector<int64_t>& source,
                                const std::vector<int64_t>& rows, int64_t width, int64_t pitch, uintptr_t stream) const;
    DriverFailure queue_record(uintptr_t event, uintptr_t stream) const;
    DriverFailure queue_wait(uintptr_t stream, uintptr_t event) const;
    // A programmatic dependent launch; `parameters` are the values of what it takes.
    DriverFailure queue_launch(uintptr_t function, uint32_t grid, uint32_t threads, uint32_t shared_bytes, uintptr_t stream,
                               std::vector<std::string>& parameters) const;
};

}  // namespace mtserve
