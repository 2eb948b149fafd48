#include "driver_queue.h"

#include <atomic>
#include <chrono>
#include <utility>

namespace mtserve {

namespace {

constexpr auto kPatience = std::chrono::seconds(1);

}  // namespace

struct DriverQueue::Shared {
    mutable std::mutex mutex;
    mutable std::condition_variable changed;
    std::deque<std::vector<Step>> waiting;
    std::map<uint64_t, DriverFailure> failures;
    uint64_t submitted = 0, done = 0;
    std::atomic<bool> stopping = false;
    bool stopped = false;

    void run(const DriverFunctions& functions, uintptr_t context) {
        functions.use_context(context);
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
            step(first);
        }
        return first;
    }
};

DriverQueue::DriverQueue(DriverFunctions functions, uintptr_t context)
    : functions_(functions), shared_(std::make_shared<Shared>()),
      thread_([shared = shared_, functions, context] { shared->run(functions, context); }) {}

DriverQueue::~DriverQueue() {
    std::unique_lock lock(shared_->mutex);
    shared_->stopping = true;
    shared_->changed.notify_all();
    const bool stopped = shared_->changed.wait_for(lock, kPatience, [&] { return shared_->stopped; });
    lock.unlock();
    if (stopped) thread_.join();
    else thread_.detach();
}

void DriverQueue::copy_batch(std::vector<int64_t> to, std::vector<int64_t> source, std::vector<int64_t> sizes,
                             uintptr_t stream) {
    list_.push_back([functions = functions_, to = std::move(to), source = std::move(source), sizes = std::move(sizes),
                     stream](DriverFailure& first) mutable {
        if (!first.function) first.note(functions.queue_batch(to, source, sizes, stream));
    });
}

void DriverQueue::record(uintptr_t event, uintptr_t stream) {
    list_.push_back([functions = functions_, event, stream](DriverFailure& first) {
        first.note(functions.queue_record(event, stream));
    });
}

void DriverQueue::hold_back(uintptr_t stream, uintptr_t event) {
    list_.push_back([functions = functions_, stream, event](DriverFailure& first) {
        first.note(functions.queue_wait(stream, event));
    });
}

void DriverQueue::move(PageMove move) {
    move.check();
    // The flag is the thread's own, which runs the step.
    list_.push_back([functions = functions_, move = std::move(move), stopping = &shared_->stopping](DriverFailure& first) {
        move.run(functions, *stopping, first);
    });
}

uint64_t DriverQueue::submit() {
    uint64_t ticket;
    {
        const std::lock_guard lock(shared_->mutex);
        shared_->waiting.push_back(std::exchange(list_, {}));
        ticket = ++shared_->submitted;
    }
    shared_->changed.notify_all();
    return ticket;
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
