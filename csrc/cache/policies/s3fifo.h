// S3-FIFO: newcomers pass through a small queue, and only those used more than once on their way reach the main one,
// where entries used since they came up last go round again. Who left the small queue is remembered as a ghost, and
// goes to the main queue when it returns.
// Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023.
//
// The small queue's share is 10% of the tier's pages, the ghosts weigh at most the other 90%. 32 bytes an entry, 32 to
// 40 a ghost; O(1), amortised over the uses. Pinned entries are passed over where they are.
#pragma once

#include <algorithm>

#include "ghosts.h"
#include "queued.h"

namespace mtserve {

struct S3Note {
    uint8_t uses = 0;
    int32_t most_pages = 0;  // since it was used last: an entry is evicted in parts, its ghost weighs the whole
    uint64_t key = 0;
};

class S3Fifo final : public Queued<S3Note, 2> {
public:
    explicit S3Fifo(int64_t capacity_pages) : capacity_(capacity_pages) {}

    void insert(Slot slot, const Facts& facts, double) override {
        const int8_t where = ghosts_.take(facts.key) ? kMain : kSmall;
        push_newest(slot, where, facts.pages, {0, facts.pages, facts.key});
    }

    void access(Slot slot, double) override {
        S3Note& known = note(slot);
        known.uses = std::min<uint8_t>(known.uses + 1, kMostUses);
        known.most_pages = node(slot).pages;
    }

    void refresh(Slot, double) override {}

    void resize(Slot slot, int32_t pages) override {
        Queued::resize(slot, pages);
        note(slot).most_pages = std::max(note(slot).most_pages, pages);
    }

    void remove(Slot slot, bool evicted) override {
        if (evicted && node(slot).queue == kSmall) {
            ghosts_.push(note(slot).key, note(slot).most_pages);
            ghosts_.trim(capacity_ - capacity_ / 10);
        }
        drop(slot);
    }

    Slot victim(const Evictable& evictable, double) override {
        while (queue(kSmall).pages * 10 >= capacity_) {
            const Slot slot = oldest(kSmall, evictable);
            if (slot == kNoSlot) break;
            if (node(slot).note.uses <= 1) return slot;
            note(slot).uses = 0;
            move_to_newest(slot, kMain);
        }
        const Slot slot = main_victim(evictable);
        return slot == kNoSlot ? oldest(kSmall, evictable) : slot;
    }

    void grow(int64_t pages) override { capacity_ += pages; }

    void check() const override {
        Queued::check();
        ghosts_.check();
        if (ghosts_.pages() > capacity_ - capacity_ / 10)
            throw corrupt_state("policy", "ghosts weigh " + std::to_string(ghosts_.pages()) + " pages");
    }

private:
    static constexpr int8_t kSmall = 0, kMain = 1;
    static constexpr uint8_t kMostUses = 3;

    Slot main_victim(const Evictable& evictable) {
        Slot slot = queue(kMain).oldest;
        while (slot != kNoSlot) {
            if (!evictable(slot)) {
                slot = pass(slot);
                continue;
            }
            const Slot next = node(slot).newer == kNoSlot ? slot : node(slot).newer;
            if (node(slot).note.uses == 0) return slot;
            --note(slot).uses;
            move_to_newest(slot, kMain);
            slot = next;
        }
        return kNoSlot;
    }

    int64_t capacity_;
    Ghosts ghosts_;
};

}  // namespace mtserve
