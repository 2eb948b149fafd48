// ARC: one list of users requested once and one of those requested again, each with ghosts of whom it lost; a ghost's
// return moves the target that divides the tier between them.
// Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003.
//
// Targets and bounds count pages: a returning ghost moves the target by its user's pages, and ghosts weigh no more than
// the tier. The index makes room before it inserts, so an insertion moves the target after the victims of its own room
// were chosen, not before. 32 bytes an entry, 32 to 40 a ghost; O(1). Pinned entries are passed over where they are.
#pragma once

#include <algorithm>

#include "ghosts.h"
#include "queued.h"

namespace mtserve {

struct ArcNote {
    int32_t most_pages = 0;  // since it was used last: an entry is evicted in parts, its ghost weighs the whole
    uint64_t key = 0;
};

class Arc final : public Queued<ArcNote, 2> {
public:
    explicit Arc(int64_t capacity_pages) : capacity_(capacity_pages) {}

    void insert(Slot slot, const Facts& facts, double) override {
        const bool known = adapt(facts);
        push_newest(slot, known ? kAgain : kOnce, facts.pages, {facts.pages, facts.key});
        trim();
    }

    void access(Slot slot, double) override {
        note(slot).most_pages = node(slot).pages;
        move_to_newest(slot, kAgain);
    }

    void refresh(Slot slot, double) override { move_to_newest(slot, node(slot).queue); }

    void resize(Slot slot, int32_t pages) override {
        Queued::resize(slot, pages);
        note(slot).most_pages = std::max(note(slot).most_pages, pages);
        trim();
    }

    void remove(Slot slot, bool evicted) override {
        const int8_t from = node(slot).queue;
        drop(slot);
        if (!evicted) return;
        ghosts_[from].push(note(slot).key, note(slot).most_pages);
        trim();
    }

    Slot victim(const Evictable& evictable, double) override {
        const int8_t first = queue(kOnce).pages > target_ ? kOnce : kAgain;
        const Slot slot = oldest(first, evictable);
        return slot == kNoSlot ? oldest(first == kOnce ? kAgain : kOnce, evictable) : slot;
    }

    void grow(int64_t pages) override { capacity_ += pages; }

    void check() const override {
        Queued::check();
        for (const Ghosts& ghosts : ghosts_) ghosts.check();
        const int64_t once = room(kOnce), all = room(kAgain);
        if (ghosts_[kOnce].pages() > once || ghosts_[kAgain].pages() > all || target_ < 0 || target_ > capacity_)
            throw corrupt_state("policy", "arc's ghosts weigh " + std::to_string(ghosts_[kOnce].pages()) + " of " +
                                              std::to_string(once) + " and " + std::to_string(ghosts_[kAgain].pages()) +
                                              " of " + std::to_string(all) + " pages, target " + std::to_string(target_));
    }

private:
    static constexpr int8_t kOnce = 0, kAgain = 1;

    // A ghost's return is a sign that its list was too short. Says whether there was one.
    bool adapt(const Facts& facts) {
        const double ratio = static_cast<double>(ghosts_[kAgain].pages()) / std::max<int64_t>(1, ghosts_[kOnce].pages());
        const double pages = facts.pages;
        if (ghosts_[kOnce].take(facts.key)) {
            target_ = std::min<double>(capacity_, target_ + std::max(1.0, ratio) * pages);
            return true;
        }
        if (!ghosts_[kAgain].take(facts.key)) return false;
        target_ = std::max(0.0, target_ - std::max(1.0, 1 / ratio) * pages);
        return true;
    }

    // Pages that the list's ghosts may weigh: the first list and its ghosts fill at most the tier, all four twice the tier.
    int64_t room(int8_t list) const {
        const int64_t once = std::max<int64_t>(0, capacity_ - queue(kOnce).pages);
        return list == kOnce ? once : std::max<int64_t>(0, 2 * capacity_ - pages() - ghosts_[kOnce].pages());
    }

    void trim() {
        for (int8_t list : {kOnce, kAgain}) ghosts_[list].trim(room(list));
    }

    int64_t capacity_;
    double target_ = 0;  // pages of the list of users requested once
    Ghosts ghosts_[2];
};

}  // namespace mtserve
