// SIEVE: a queue in the order of arrival, and a hand that goes from the oldest to the newest and takes the first
// entry not used since it came by last.
// Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024. 16 bytes an entry; O(1), amortised over the uses.
//
// The hand passes pinned entries as if they had been used, and leaves their mark alone. It puts held ones aside; released,
// they are before all others, where the hand comes by last.
#pragma once

#include "queued.h"

namespace mtserve {

struct Visited {
    bool visited = false;
};

class Sieve final : public Queued<Visited, 1> {
public:
    void insert(Slot slot, const Facts& facts, double) override { push_newest(slot, 0, facts.pages, {}); }
    void access(Slot slot, double) override { note(slot).visited = true; }
    void refresh(Slot, double) override {}

    void remove(Slot slot, bool) override {
        if (hand_ == slot) hand_ = node(slot).newer;
        drop(slot);
    }

    Slot victim(const Evictable& evictable, double) override {
        // The first round may do no more than unmark, the second meets an unmarked one unless all are pinned.
        for (size_t steps = 2 * size(); steps > 0; --steps) {
            if (hand_ == kNoSlot) hand_ = queue(0).oldest;
            if (hand_ == kNoSlot) return kNoSlot;  // all are aside
            if (!evictable(hand_)) {
                hand_ = pass(hand_);
                continue;
            }
            if (!node(hand_).note.visited) return hand_;
            note(hand_).visited = false;
            hand_ = node(hand_).newer;
        }
        return kNoSlot;
    }

    void check() const override {
        Queued::check();
        if (hand_ != kNoSlot && !contains(hand_))
            throw corrupt_state("policy", "the hand is at slot " + std::to_string(hand_));
    }

private:
    Slot hand_ = kNoSlot;  // none: at the oldest
};

}  // namespace mtserve
