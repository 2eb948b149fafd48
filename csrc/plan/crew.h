// Threads that help whoever has much to do at once, and sleep otherwise. Work is cut into parts, and whoever is free takes
// the next one, the caller too: helpers that the system wakes late, or not at all, hold nobody up.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace mtserve {

class Crew {
public:
    // The process's own, of up to `kMost` threads with the caller. Never destroyed: its threads may be asleep at the end.
    static Crew& shared() {
        static Crew* crew = new Crew;
        return *crew;
    }

    // Calls work(0) to work(parts - 1), which throw nothing, each once, and returns when all have returned. One caller has
    // the helpers at a time; another meanwhile does all by itself.
    void run(size_t parts, const std::function<void(size_t)>& work) {
        std::unique_lock turn(turn_, std::try_to_lock);
        if (parts < 2 || !turn.owns_lock()) {
            for (size_t part = 0; part < parts; ++part) work(part);
            return;
        }
        begin(parts, work);
        take_parts(parts, work);
        std::unique_lock lock(mutex_);
        work_ = nullptr;  // who wakes now finds nothing
        changed_.wait(lock, [this] { return helping_ == 0; });
    }

private:
    static constexpr size_t kMost = 8;

    void begin(size_t parts, const std::function<void(size_t)>& work) {
        {
            const std::lock_guard lock(mutex_);
            work_ = &work;
            parts_ = parts;
            next_ = 0;
            ++round_;
        }
        if (!hired_) hire();
        changed_.notify_all();
    }

    void hire() {
        hired_ = true;
        const size_t cores = std::thread::hardware_concurrency();
        for (size_t helper = 1; helper < kMost && helper < cores; ++helper) {
            try {
                std::thread([this] { help(); }).detach();
            } catch (const std::system_error&) {  // the system has no more threads
                return;
            }
        }
    }

    void help() {
        size_t seen = 0;
        std::unique_lock lock(mutex_);
        while (true) {
            changed_.wait(lock, [&] { return work_ && round_ != seen; });
            seen = round_;
            ++helping_;
            const size_t parts = parts_;
            const std::function<void(size_t)>& work = *work_;  // stays until nobody helps
            lock.unlock();
            take_parts(parts, work);
            lock.lock();
            if (--helping_ == 0) changed_.notify_all();
        }
    }

    void take_parts(size_t parts, const std::function<void(size_t)>& work) {
        for (size_t part = next_++; part < parts; part = next_++) work(part);
    }

    std::mutex turn_, mutex_;
    std::condition_variable changed_;
    const std::function<void(size_t)>* work_ = nullptr;
    size_t parts_ = 0, round_ = 0, helping_ = 0;
    std::atomic<size_t> next_{0};
    bool hired_ = false;
};

}  // namespace mtserve
