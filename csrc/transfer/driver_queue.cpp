#include "driver_queue.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <utility>

#include "strided.h"

namespace mtserve {

namespace {

constexpr int64_t kMaxBatch = 1024;  // copies a call: far above what it takes to hide the call
constexpr int kStreamOrder = 1;      // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
constexpr int kProgrammaticStreamSerialization = 6;  // CUlaunchAttributeID
constexpr auto kPatience = std::chrono::seconds(1);

// Mirrors CUmemcpyAttributes: an order, hints of where source and destination lie (unused), flags.
struct CopyAttributes {
    int order = kStreamOrder;
    int hints[4] = {};
    unsigned flags = 0;
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
static_assert(sizeof(LaunchAttribute) == 72 && offsetof(LaunchConfig, stream) == 32, "the driver's layout");

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

std::vector<int64_t> copied(const int64_t* values, int64_t count) { return {values, values + count}; }

DriverFailure failure(const char* function, int code) {
    return code == 0 ? DriverFailure{} : DriverFailure{function, code};
}

int copy_one_by_one(uintptr_t function, const std::vector<int64_t>& to, const std::vector<int64_t>& source,
                    const std::vector<int64_t>& sizes, uintptr_t stream) {
    const auto copy = reinterpret_cast<int (*)(uint64_t, uint64_t, size_t, void*)>(function);
    for (size_t i = 0; i < to.size(); ++i) {
        const int code = copy(static_cast<uint64_t>(to[i]), static_cast<uint64_t>(source[i]),
                              static_cast<size_t>(sizes[i]), pointer(stream));
        if (code != 0) return code;
    }
    return 0;
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

struct DriverQueue::Shared {
    mutable std::mutex mutex;
    mutable std::condition_variable changed;
    std::deque<std::vector<Step>> waiting;
    std::map<uint64_t, DriverFailure> failures;
    uint64_t submitted = 0, done = 0;
    std::atomic<bool> stopping = false;
    bool stopped = false;

    void run(uintptr_t set_context, uintptr_t context) {
        reinterpret_cast<int (*)(void*)>(set_context)(pointer(context));
        std::unique_lock lock(mutex);
        while (true) {
            changed.wait(lock, [&] { return stopping || !waiting.empty(); });
            if (stopping) break;
            std::vector<Step> steps = std::move(waiting.front());
            waiting.pop_front();
            lock.unlock();
            const DriverFailure failed = make_calls(steps);
            steps.clear();  // while nobody waits for the lock
            lock.lock();
            if (failed.function) failures[done + 1] = failed;
            ++done;
            changed.notify_all();
        }
        stopped = true;
        changed.notify_all();
    }

    DriverFailure make_calls(const std::vector<Step>& steps) const {
        DriverFailure first;
        for (const Step& step : steps) {
            if (stopping) break;
            if (first.function && !step.always) continue;
            const DriverFailure failed = step.call();
            if (!first.function) first = failed;
        }
        return first;
    }
};

DriverQueue::DriverQueue(DriverFunctions functions, uintptr_t context)
    : functions_(functions), shared_(std::make_shared<Shared>()),
      thread_([shared = shared_, function = functions.set_context, context] { shared->run(function, context); }) {}

DriverQueue::~DriverQueue() {
    std::unique_lock lock(shared_->mutex);
    shared_->stopping = true;
    shared_->changed.notify_all();
    const bool stopped = shared_->changed.wait_for(lock, kPatience, [&] { return shared_->stopped; });
    lock.unlock();
    if (stopped) thread_.join();
    else thread_.detach();
}

void DriverQueue::add(Call call, bool always) { list_.push_back({std::move(call), always}); }

void DriverQueue::copy_batch(const int64_t* to, const int64_t* source, const int64_t* sizes, int64_t count, uintptr_t stream) {
    add([functions = functions_, to = copied(to, count), source = copied(source, count), sizes = copied(sizes, count),
         stream]() mutable {
        if (!functions.copy_batch) return failure("cuMemcpyAsync", copy_one_by_one(functions.copy, to, source, sizes, stream));
        for (int64_t first = 0, count = static_cast<int64_t>(to.size()); first < count; first += kMaxBatch) {
            const int code = copy_some(functions, to.data() + first, source.data() + first, sizes.data() + first,
                                       std::min(kMaxBatch, count - first), stream);
            if (code != 0) return failure("cuMemcpyBatchAsync", code);
        }
        return DriverFailure{};
    }, false);
}

void DriverQueue::copy_strided(const int64_t* to, const int64_t* source, const int64_t* rows, int64_t count, int64_t width,
                               int64_t pitch, uintptr_t stream) {
    add([copy = functions_.copy_2d, to = copied(to, count), source = copied(source, count), rows = copied(rows, count),
         width, pitch, stream] {
        return failure("cuMemcpy2DAsync_v2",
                       mtserve::copy_strided(reinterpret_cast<Copy2DFunction>(copy), static_cast<int64_t>(to.size()), to.data(),
                                             source.data(), rows.data(), width, pitch, pointer(stream)));
    }, false);
}

void DriverQueue::record(uintptr_t event, uintptr_t stream) {
    add([record = functions_.record, event, stream] {
        return failure("cuEventRecord", reinterpret_cast<int (*)(void*, void*)>(record)(pointer(event), pointer(stream)));
    }, true);
}

void DriverQueue::hold_back(uintptr_t stream, uintptr_t event) {
    add([wait = functions_.wait_event, stream, event] {
        const auto function = reinterpret_cast<int (*)(void*, void*, unsigned)>(wait);
        return failure("cuStreamWaitEvent", function(pointer(stream), pointer(event), 0));
    }, true);
}

void DriverQueue::launch(uintptr_t function, uint32_t grid, uint32_t threads, uint32_t shared_bytes, uintptr_t stream,
                         std::vector<std::string> parameters) {
    add([launch = functions_.launch, function, grid, threads, shared_bytes, stream, parameters = std::move(parameters)]() mutable {
        LaunchAttribute attribute;
        LaunchConfig config{{grid, 1, 1}, {threads, 1, 1}, shared_bytes, pointer(stream), &attribute, 1};
        std::vector<void*> addresses;
        for (std::string& each : parameters) addresses.push_back(each.data());
        const auto call = reinterpret_cast<int (*)(const void*, void*, void**, void**)>(launch);
        return failure("cuLaunchKernelEx", call(&config, pointer(function), addresses.data(), nullptr));
    }, false);
}

uint64_t DriverQueue::submit() {
    const std::lock_guard lock(shared_->mutex);
    shared_->waiting.push_back(std::exchange(list_, {}));
    shared_->changed.notify_all();
    return ++shared_->submitted;
}

bool DriverQueue::over(uint64_t ticket) const {
    const std::lock_guard lock(shared_->mutex);
    return shared_->done >= ticket;
}

void DriverQueue::wait(uint64_t ticket) const {
    std::unique_lock lock(shared_->mutex);
    shared_->changed.wait(lock, [&] { return shared_->done >= ticket; });
}

DriverFailure DriverQueue::take_failure(uint64_t ticket) {
    const std::lock_guard lock(shared_->mutex);
    const auto found = shared_->failures.find(ticket);
    if (found == shared_->failures.end()) return {};
    const DriverFailure failed = found->second;
    shared_->failures.erase(found);
    return failed;
}

}  // namespace mtserve
