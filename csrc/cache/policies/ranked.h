// Policies that only measure others: entries in the order of a rank, of equal rank the one used first. O(log n).
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "../errors.h"
#include "../policy.h"

namespace mtserve {

class Ranked : public Policy {
public:
    void insert(Slot slot, const Facts& facts, double now) override {
        if (slot >= entries_.size()) entries_.resize(slot + 1);
        entries_[slot] = {facts.key, facts.pages, ++uses_, 0, true};
        pages_ += facts.pages;
        used(slot, now);
        order_.insert(place(slot));
    }

    void access(Slot slot, double now) override {
        order_.erase(place(slot));
        entries_[slot].used = ++uses_;
        used(slot, now);
        order_.insert(place(slot));
    }

    void refresh(Slot slot, double now) override { access(slot, now); }

    void resize(Slot slot, int32_t pages) override {
        pages_ += pages - entries_[slot].pages;
        entries_[slot].pages = pages;
    }

    void remove(Slot slot, bool) override {
        order_.erase(place(slot));
        pages_ -= entries_[slot].pages;
        entries_[slot].listed = false;
    }

    Slot victim(const Evictable& evictable, double) override {
        for (const Place& place : order_)
            if (evictable(std::get<Slot>(place))) return std::get<Slot>(place);
        return kNoSlot;
    }

    void grow(int64_t) override {}
    bool contains(Slot slot) const final { return slot < entries_.size() && entries_[slot].listed; }
    size_t size() const final { return order_.size(); }
    int64_t pages() const final { return pages_; }

    void check() const override {
        int64_t pages = 0;
        for (const Place& each : order_) {
            const Slot slot = std::get<Slot>(each);
            if (!contains(slot) || each != place(slot) || entries_[slot].pages < 1)
                throw corrupt_state("policy", "the order is broken at slot " + std::to_string(slot));
            pages += entries_[slot].pages;
        }
        if (pages != pages_)
            throw corrupt_state("policy", std::to_string(pages) + " of " + std::to_string(pages_) + " pages");
    }

protected:
    // The slot was used, or inserted: sets its rank, and no other's.
    virtual void used(Slot slot, double now) = 0;

    uint64_t key(Slot slot) const { return entries_[slot].key; }
    void set_rank(Slot slot, double rank) { entries_[slot].rank = rank; }

    void move(Slot slot, double rank) {
        order_.erase(place(slot));
        entries_[slot].rank = rank;
        order_.insert(place(slot));
    }

private:
    using Place = std::tuple<double, uint64_t, Slot>;  // rank, number of the last use
    struct Entry {
        uint64_t key = 0;
        int32_t pages = 0;
        uint64_t used = 0;
        double rank = 0;
        bool listed = false;
    };

    Place place(Slot slot) const { return {entries_[slot].rank, entries_[slot].used, slot}; }

    std::vector<Entry> entries_;  // by slot
    std::set<Place> order_;
    uint64_t uses_ = 0;
    int64_t pages_ = 0;
};

}  // namespace mtserve
