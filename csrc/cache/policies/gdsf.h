// GDSF: what costs least to bring back, per page freed and by how often it is wanted, goes first; what has not been
// wanted for long ages against a clock that is the priority of the last entry evicted.
// Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998.
//
// priority = clock at the last use + uses * cost / pages, where cost is that of encoding the user again: pages for the
// matrix products, and pages^2 / kEvenPages for attention, since every token attends to those before it. For the model
// of 8 layers, width 1024 and 4 heads of 128, a token takes 10 * 1024 * 512 FLOP a layer in products and 4 * 512 a
// visible key in attention: equal at 2,560 tokens where all see all, at 5,120 under a causal mask. So kEvenPages is 64,
// 4,096 tokens in pages of 64: among users wanted equally often, the long ones stay somewhat longer.
//
// A heap of four children a node; entries of equal priority leave in the order of their last use. 48 bytes an entry;
// O(log n), and O(p log p) where the p first of the heap are pinned. Held entries are taken out of the heap when a search
// for a victim meets them, until they are used or released.
#pragma once

#include <algorithm>
#include <cstdint>
#include <queue>
#include <string>
#include <unordered_map>
#include <vector>

#include "../errors.h"
#include "../policy.h"

namespace mtserve {

class Gdsf final : public Policy {
public:
    void insert(Slot slot, const Facts& facts, double) override {
        if (slot >= entries_.size()) entries_.resize(slot + 1);
        entries_[slot] = {clock_, facts.pages, 1, kNowhere, false};
        pages_ += facts.pages;
        place(slot, ++uses_);
    }

    void access(Slot slot, double now) override {
        entries_[slot].uses += entries_[slot].uses < UINT32_MAX;
        refresh(slot, now);
    }

    void refresh(Slot slot, double) override {
        entries_[slot].clock = clock_;
        place(slot, ++uses_);
    }

    void resize(Slot slot, int32_t pages) override {
        pages_ += pages - entries_[slot].pages;
        entries_[slot].pages = pages;
        if (entries_[slot].at != kAside) place(slot, heap_[entries_[slot].at].used);
    }

    void remove(Slot slot, bool evicted) override {
        if (evicted) clock_ = std::max(clock_, rank(slot, 0).priority);
        pages_ -= entries_[slot].pages;
        take(slot);
    }

    void hold(Slot slot) override { entries_[slot].held = true; }

    void release(Slot slot) override {
        entries_[slot].held = false;
        if (entries_[slot].at == kAside) place(slot, aside_.at(slot));
    }

    Slot victim(const Evictable& evictable, double) override {
        std::vector<Slot> held;
        const Slot found = first(evictable, held);
        for (const Slot slot : held) {
            aside_[slot] = heap_[entries_[slot].at].used;
            take(slot);
            entries_[slot].at = kAside;
        }
        return found;
    }

    void grow(int64_t) override {}
    bool contains(Slot slot) const override { return slot < entries_.size() && entries_[slot].at != kNowhere; }
    size_t size() const override { return heap_.size() + aside_.size(); }
    int64_t pages() const override { return pages_; }

    void check() const override {
        int64_t pages = 0;
        for (size_t at = 0; at < heap_.size(); ++at) {
            const Slot slot = heap_[at].slot;
            const bool in_place = contains(slot) && entries_[slot].at == at && heap_[at].priority == rank(slot, 0).priority;
            if (!in_place || entries_[slot].pages < 1 || (at > 0 && heap_[at] < heap_[parent(at)]))
                throw corrupt_state("policy", "gdsf heap is broken at slot " + std::to_string(slot));
            pages += entries_[slot].pages;
        }
        for (const auto& [slot, used] : aside_) {
            if (!contains(slot) || entries_[slot].at != kAside || !entries_[slot].held || entries_[slot].pages < 1)
                throw corrupt_state("policy", "gdsf has slot " + std::to_string(slot) + " aside in vain");
            pages += entries_[slot].pages;
        }
        if (pages != pages_)
            throw corrupt_state("policy", "gdsf has " + std::to_string(pages) + " of " + std::to_string(pages_) + " pages");
    }

private:
    static constexpr size_t kWays = 4;
    static constexpr double kEvenPages = 64;
    static constexpr uint32_t kNowhere = UINT32_MAX, kAside = UINT32_MAX - 1;
    struct Rank {
        double priority;
        uint64_t used;  // the number of its last use
        Slot slot;
        bool operator<(const Rank& other) const {
            return priority != other.priority ? priority < other.priority : used < other.used;
        }
    };
    struct Entry {
        double clock = 0;  // at the last use
        int32_t pages = 0;
        uint32_t uses = 0;
        uint32_t at = kNowhere;  // in the heap
        bool held = false;
    };

    static size_t parent(size_t at) { return (at - 1) / kWays; }

    Rank rank(Slot slot, uint64_t used) const {
        const Entry& entry = entries_[slot];
        return {entry.clock + entry.uses * (1 + entry.pages / kEvenPages), used, slot};
    }

    // The first in order that is not pinned: what comes next is among the children of those seen. `held`: those met.
    Slot first(const Evictable& evictable, std::vector<Slot>& held) const {
        if (heap_.empty() || evictable(heap_[0].slot)) return heap_.empty() ? kNoSlot : heap_[0].slot;
        const auto later = [this](size_t a, size_t b) { return heap_[b] < heap_[a]; };
        std::priority_queue<size_t, std::vector<size_t>, decltype(later)> seen(later);
        for (seen.push(0); !seen.empty();) {
            const size_t at = seen.top();
            const Slot slot = heap_[at].slot;
            if (evictable(slot)) return slot;
            if (entries_[slot].held) held.push_back(slot);
            seen.pop();
            const size_t child = kWays * at + 1, end = std::min(child + kWays, heap_.size());
            for (size_t each = child; each < end; ++each) seen.push(each);
        }
        return kNoSlot;
    }

    // Moves the entry, wherever it is, to where its last use puts it.
    void place(Slot slot, uint64_t used) {
        if (entries_[slot].at == kAside) aside_.erase(slot);
        if (entries_[slot].at >= kAside) {
            entries_[slot].at = static_cast<uint32_t>(heap_.size());
            heap_.push_back(rank(slot, used));
        }
        settle(entries_[slot].at, rank(slot, used));
    }

    void take(Slot slot) {
        const uint32_t at = entries_[slot].at;
        entries_[slot].at = kNowhere;
        if (at == kAside) {
            aside_.erase(slot);
            return;
        }
        const Rank last = heap_.back();
        heap_.pop_back();
        if (at < heap_.size()) settle(at, last);
    }

    void put(size_t at, const Rank& rank) {
        heap_[at] = rank;
        entries_[rank.slot].at = static_cast<uint32_t>(at);
    }

    // Puts `rank` where the place at `at` is free.
    void settle(size_t at, const Rank& rank) {
        heap_[at] = rank;
        if (at > 0 && rank < heap_[parent(at)]) rise(at);
        else sink(at);
    }

    void rise(size_t at) {
        const Rank rank = heap_[at];
        for (; at > 0 && rank < heap_[parent(at)]; at = parent(at)) put(at, heap_[parent(at)]);
        put(at, rank);
    }

    void sink(size_t at) {
        const Rank rank = heap_[at];
        for (;;) {
            const size_t first = kWays * at + 1, end = std::min(first + kWays, heap_.size());
            if (first >= end) break;
            const size_t least = std::min_element(heap_.begin() + first, heap_.begin() + end) - heap_.begin();
            if (!(heap_[least] < rank)) break;
            put(at, heap_[least]);
            at = least;
        }
        put(at, rank);
    }

    std::vector<Entry> entries_;  // by slot
    std::vector<Rank> heap_;
    std::unordered_map<Slot, uint64_t> aside_;  // held entries that a search has met, and the number of their last use
    double clock_ = 0;
    uint64_t uses_ = 0;
    int64_t pages_ = 0;
};

}  // namespace mtserve
