// Calls of the CUDA driver that queue work on streams, made by a thread of their own: a call takes a microsecond a
// copy, and a load has hundreds. The driver's functions are looked up by the caller, so that this is built and runs
// where there is no driver.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace mtserve {

// Addresses of cuCtxSetCurrent, cuMemcpyAsync, cuMemcpyBatchAsync (0: the driver has none), cuMemcpy2DAsync_v2,
// cuEventRecord, cuStreamWaitEvent and cuLaunchKernelEx.
struct DriverFunctions {
    uintptr_t set_context, copy, copy_batch, copy_2d, record, wait_event, launch;
    bool batch_reports_failed;  // whether copy_batch also takes where to say which copy failed
};

// The first call that failed of one list.
struct DriverFailure {
    const char* function = nullptr;  // null: none did
    int code = 0;
};

class DriverQueue {
public:
    DriverQueue(DriverFunctions functions, uintptr_t context);
    // No call is made any more. Waits for that under way for a second at most: one that hangs in the driver is left to
    // the process's end, and is the last, whatever it finds there.
    ~DriverQueue();
    DriverQueue(const DriverQueue&) = delete;
    DriverQueue& operator=(const DriverQueue&) = delete;

    // Each adds a call to the list that `submit` hands over. The arrays are copied.
    void copy_batch(const int64_t* to, const int64_t* source, const int64_t* sizes, int64_t count, uintptr_t stream);
    void copy_strided(const int64_t* to, const int64_t* source, const int64_t* rows, int64_t count, int64_t width,
                      int64_t pitch, uintptr_t stream);
    void record(uintptr_t event, uintptr_t stream);
    void hold_back(uintptr_t stream, uintptr_t event);
    // A programmatic dependent launch of `grid` blocks; `parameters` are the values of what it takes.
    void launch(uintptr_t function, uint32_t grid, uint32_t threads, uint32_t shared_bytes, uintptr_t stream,
                std::vector<std::string> parameters);

    // Has the thread make the calls of the list, in order, after those of earlier ones; tickets rise from 1. When a call
    // fails, copies and launches behind it are left out; events are recorded and waited for all the same, so that what
    // was queued can be waited for.
    uint64_t submit();

    bool over(uint64_t ticket) const;
    void wait(uint64_t ticket) const;
    // Of a list that is over; forgets it.
    DriverFailure take_failure(uint64_t ticket);

private:
    struct Shared;  // with the thread, which may outlive us
    using Call = std::function<DriverFailure()>;
    struct Step {
        Call call;
        bool always;  // made even after a failure
    };
    void add(Call call, bool always);

    DriverFunctions functions_;
    std::vector<Step> list_;
    std::shared_ptr<Shared> shared_;
    std::thread thread_;
};

}  // namespace mtserve
