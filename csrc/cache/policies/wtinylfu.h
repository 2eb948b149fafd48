// W-TinyLFU: a small window of newcomers before a segmented LRU, and a contest between them: the window's oldest entry
// enters only if it was used more often of late than the one that would have to leave for it.
// Einziger, Friedman and Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM Transactions on Storage 2017.
//
// The window's share is 1% of the tier's pages, the protected segment's 80% of the rest. While the tier has room the
// window's oldest enter without a contest. The contest takes place when the index asks for a victim, which is before it
// inserts, so the window exceeds its share by the newcomers since. There is no doorkeeper. 24 bytes an entry
// and 4 to 8 a page for the sketch; O(1), and once in ten uses of each entry a pass over the sketch.
// Pinned entries are passed over where they are.
#pragma once

#include <algorithm>
#include <utility>

#include "queued.h"
#include "sketch.h"

namespace mtserve {

struct KeyNote {
    uint64_t key = 0;
};

class WTinyLfu final : public Queued<KeyNote, 3> {
public:
    explicit WTinyLfu(int64_t capacity_pages) : capacity_(capacity_pages), sketch_(capacity_pages) {}

    void insert(Slot slot, const Facts& facts, double) override {
        count(facts.key);
        push_newest(slot, kWindow, facts.pages, {facts.key});
        if (std::exchange(made_room_, false)) return;  // what was taken from others is not there for anybody to enter
        while (queue(kWindow).pages > window_pages()) {
            const Slot first = eldest(kWindow);
            if (main_pages() + node(first).pages > capacity_ - window_pages()) return;
            move_to_newest(first, kProbation);
        }
    }

    void access(Slot slot, double now) override {
        count(node(slot).note.key);
        if (node(slot).queue != kProbation) return refresh(slot, now);
        move_to_newest(slot, kProtected);
        while (queue(kProtected).pages > protected_pages()) move_to_newest(eldest(kProtected), kProbation);
    }

    void refresh(Slot slot, double) override { move_to_newest(slot, node(slot).queue); }
    void remove(Slot slot, bool) override { drop(slot); }

    // As in the contest, with the request that brings the newcomer, which is not counted yet.
    bool admits(const Facts& newcomer, Slot victim, double) const override {
        return sketch_.estimate(newcomer.key) + 1 > frequency(victim);
    }

    void decline(const Facts& newcomer, double) override {
        made_room_ = false;
        count(newcomer.key);
    }

    Slot victim(const Evictable& evictable, double) override {
        made_room_ = true;
        Slot leaving = oldest(kProbation, evictable);
        if (leaving == kNoSlot) leaving = oldest(kProtected, evictable);
        if (leaving == kNoSlot) return oldest(kWindow, evictable);
        if (queue(kWindow).pages <= window_pages()) return leaving;
        const Slot entering = oldest(kWindow, evictable);
        if (entering == kNoSlot) return leaving;
        if (frequency(entering) <= frequency(leaving)) return entering;
        move_to_newest(entering, kProbation);
        return leaving;
    }

    void grow(int64_t pages) override {
        capacity_ += pages;
        sketch_.fit(capacity_);
        made_room_ = false;  // there is room for those in the window as well
    }

private:
    static constexpr int8_t kWindow = 0, kProbation = 1, kProtected = 2;
    static constexpr size_t kUsesPerEntry = 10, kFewestEntries = 16;

    int64_t window_pages() const { return std::max<int64_t>(1, capacity_ / 100); }
    int64_t protected_pages() const { return (capacity_ - window_pages()) * 4 / 5; }
    int64_t main_pages() const { return queue(kProbation).pages + queue(kProtected).pages; }
    int frequency(Slot slot) const { return sketch_.estimate(node(slot).note.key); }

    void count(uint64_t key) {
        sketch_.count(key);
        if (++uses_ < kUsesPerEntry * std::max(size(), kFewestEntries)) return;
        sketch_.halve();
        uses_ = 0;
    }

    int64_t capacity_;
    Sketch sketch_;
    size_t uses_ = 0;  // since the counters were halved last
    bool made_room_ = false;  // for the next to be inserted
};

}  // namespace mtserve
