// Policies made of queues: doubly linked lists of slots, oldest to newest, all through one array indexed by slot.
// A listed entry is in exactly one of them.
//
// Held entries stay in their places until a search for a victim meets them. It puts them aside, into a list of the same
// queue before all others in it, so that no search meets them twice. Used, they go where others go; released, they are
// the oldest of their queue again.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../errors.h"
#include "../policy.h"

namespace mtserve {

// `Note`: what the policy remembers of an entry beside its place.
template <typename Note, int kQueues>
class Queued : public Policy {
public:
    void resize(Slot slot, int32_t pages) override {
        Node& node = nodes_[slot];
        queues_[node.queue].pages += pages - node.pages;
        pages_ += pages - node.pages;
        node.pages = pages;
    }

    void hold(Slot slot) final { nodes_[slot].held = true; }

    void release(Slot slot) final {
        Node& node = nodes_[slot];
        node.held = false;
        if (!node.aside) return;
        unlink(slot);
        Ends& ends = queues_[node.queue];
        join(slot, ends, kNoSlot, ends.oldest);
        node.aside = false;
    }

    void grow(int64_t) override {}
    bool contains(Slot slot) const final { return slot < nodes_.size() && nodes_[slot].queue != kNowhere; }

    size_t size() const final { return size_; }
    int64_t pages() const final { return pages_; }

    void check() const override {
        size_t listed = 0, queued = 0;
        int64_t pages = 0;
        for (const Node& node : nodes_) listed += node.queue != kNowhere;
        for (const Queue& queue : queues_) {
            queued += queue.size;
            pages += queue.pages;
        }
        if (queued != size_ || pages != pages_)
            throw corrupt_state("policy", "queues have " + std::to_string(queued) + " of " + std::to_string(size_) + " entries, " +
                                              std::to_string(pages) + " of " + std::to_string(pages_) + " pages");
        if (listed != size()) throw corrupt_state("policy", std::to_string(listed) + " listed, not " + std::to_string(size()));
        for (int8_t queue = 0; queue < kQueues; ++queue) check_queue(queue);
    }

protected:
    struct Node {
        Slot older = kNoSlot, newer = kNoSlot;
        int32_t pages = 0;
        int8_t queue = kNowhere;
        bool held = false, aside = false;
        Note note{};
    };
    struct Ends {
        Slot oldest = kNoSlot, newest = kNoSlot;
    };
    // The ends are of those that are not aside, the counts of all.
    struct Queue : Ends {
        size_t size = 0;
        int64_t pages = 0;
        Ends aside;
    };

    void push_newest(Slot slot, int8_t queue, int32_t pages, const Note& note) {
        if (slot >= nodes_.size()) nodes_.resize(slot + 1);
        nodes_[slot].pages = pages;
        nodes_[slot].note = note;
        link(slot, queue);
    }

    void move_to_newest(Slot slot, int8_t queue) {
        if (queues_[queue].newest == slot) return;
        take(slot);
        link(slot, queue);
    }

    void drop(Slot slot) {
        take(slot);
        nodes_[slot].queue = kNowhere;
        nodes_[slot].held = false;
    }

    // Looks at no more entries than are pinned, those held since they were met last, and one.
    Slot oldest(int8_t queue, const Evictable& evictable) {
        Slot slot = queues_[queue].oldest;
        while (slot != kNoSlot && !evictable(slot)) slot = pass(slot);
        return slot;
    }

    // The oldest, aside or not.
    Slot eldest(int8_t queue) const {
        const Queue& from = queues_[queue];
        return from.aside.oldest == kNoSlot ? from.oldest : from.aside.oldest;
    }

    // The next after one that may not be taken now, which is put aside if it is held.
    Slot pass(Slot slot) {
        Node& node = nodes_[slot];
        const Slot next = node.newer;
        if (node.held) {
            unlink(slot);
            Ends& aside = queues_[node.queue].aside;
            join(slot, aside, aside.newest, kNoSlot);
            node.aside = true;
        }
        return next;
    }

    const Queue& queue(int8_t which) const { return queues_[which]; }
    const Node& node(Slot slot) const { return nodes_[slot]; }
    Note& note(Slot slot) { return nodes_[slot].note; }

private:
    static constexpr int8_t kNowhere = -1;

    void link(Slot slot, int8_t which) {
        Node& node = nodes_[slot];
        Queue& queue = queues_[which];
        node.queue = which;
        node.aside = false;
        join(slot, queue, queue.newest, kNoSlot);
        queue.pages += node.pages;
        pages_ += node.pages;
        ++queue.size;
        ++size_;
    }

    void take(Slot slot) {
        unlink(slot);
        Queue& queue = queues_[nodes_[slot].queue];
        queue.pages -= nodes_[slot].pages;
        pages_ -= nodes_[slot].pages;
        --queue.size;
        --size_;
    }

    void join(Slot slot, Ends& ends, Slot older, Slot newer) {
        nodes_[slot].older = older;
        nodes_[slot].newer = newer;
        (older == kNoSlot ? ends.oldest : nodes_[older].newer) = slot;
        (newer == kNoSlot ? ends.newest : nodes_[newer].older) = slot;
    }

    void unlink(Slot slot) {
        const Node& node = nodes_[slot];
        Queue& queue = queues_[node.queue];
        Ends& ends = node.aside ? queue.aside : static_cast<Ends&>(queue);
        (node.older == kNoSlot ? ends.oldest : nodes_[node.older].newer) = node.newer;
        (node.newer == kNoSlot ? ends.newest : nodes_[node.newer].older) = node.older;
    }

    void check_queue(int8_t which) const {
        const Queue& queue = queues_[which];
        size_t walked = 0;
        int64_t pages = 0;
        for (const bool aside : {false, true}) {
            const Ends& ends = aside ? queue.aside : static_cast<const Ends&>(queue);
            Slot older = kNoSlot;
            for (Slot slot = ends.oldest; slot != kNoSlot; older = slot, slot = nodes_[slot].newer) {
                const Node& node = nodes_[slot];
                if (node.queue != which || node.older != older || node.pages < 1 || ++walked > queue.size ||
                    node.aside != aside || (aside && !node.held))
                    throw corrupt_state("policy", "queue " + std::to_string(which) + " is broken at slot " + std::to_string(slot));
                pages += node.pages;
            }
            if (ends.newest != older)
                throw corrupt_state("policy", "queue " + std::to_string(which) + " ends at slot " + std::to_string(older));
        }
        if (walked != queue.size || pages != queue.pages)
            throw corrupt_state("policy", "queue " + std::to_string(which) + " has " + std::to_string(walked) + " of " +
                                              std::to_string(queue.size) + " entries, " + std::to_string(pages) + " of " +
                                              std::to_string(queue.pages) + " pages");
    }

    std::vector<Node> nodes_;
    std::array<Queue, kQueues> queues_;
    size_t size_ = 0;     // of all queues
    int64_t pages_ = 0;
};

}  // namespace mtserve
