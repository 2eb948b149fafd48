// Calls of the CUDA driver that queue work on streams, made by a thread of their own: a call takes a microsecond a
// copy, and a load has hundreds.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "driver_calls.h"
#include "page_move.h"

namespace mtserve {

class DriverQueue {
public:
    DriverQueue(DriverFunctions functions, uintptr_t context);
    // No call is made any more. Waits for that under way for a second at most: one that hangs in the driver is left to
    // the process's end, and is the last, whatever it finds there.
    ~DriverQueue();
    DriverQueue(const DriverQueue&) = delete;
    DriverQueue& operator=(const DriverQueue&) = delete;

    // Each adds to the list that `submit` hands over.
    void copy_batch(std::vector<int64_t> to, std::vector<int64_t> source, std::vector<int64_t> sizes, uintptr_t stream);
    void record(uintptr_t event, uintptr_t stream);
    void hold_back(uintptr_t stream, uintptr_t event);
    // Throws InvalidArgument for what the move cannot mean.
    void move(PageMove move);

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
    // Makes calls, those that copy only as long as none has failed, and notes the first that does.
    using Step = std::function<void(DriverFailure& first)>;

    DriverFunctions functions_;
    std::vector<Step> list_;
    std::shared_ptr<Shared> shared_;
    std::thread thread_;
};

}  // namespace mtserve
