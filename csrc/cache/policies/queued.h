// Policies made of queues: doubly linked lists of slots, oldest to newest, all through one array indexed by slot.
// A listed entry is in exactly one of them.
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
        Note note{};
    };
    struct Queue {
        Slot oldest = kNoSlot, newest = kNoSlot;
        size_t size = 0;
        int64_t pages = 0;
    };

    void push_newest(Slot slot, int8_t queue, int32_t pages, const Note& note) {
        if (slot >= nodes_.size()) nodes_.resize(slot + 1);
        nodes_[slot].pages = pages;
        nodes_[slot].note = note;
        link(slot, queue);
    }

    void move_to_newest(Slot slot, int8_t queue) {
        if (queues_[queue].newest == slot) return;
        unlink(slot);
        link(slot, queue);
    }

    void drop(Slot slot) {
        unlink(slot);
        nodes_[slot].queue = kNowhere;
    }

    // Looks at no more entries than are pinned, and one.
    Slot oldest(int8_t queue, const Evictable& evictable) const {
        Slot slot = queues_[queue].oldest;
        while (slot != kNoSlot && !evictable(slot)) slot = nodes_[slot].newer;
        return slot;
    }

    const Queue& queue(int8_t which) const { return queues_[which]; }
    const Node& node(Slot slot) const { return nodes_[slot]; }
    Note& note(Slot slot) { return nodes_[slot].note; }

private:
    static constexpr int8_t kNowhere = -1;

    void link(Slot slot, int8_t which) {
        Node& node = nodes_[slot];
        Queue& queue = queues_[which];
        node.older = queue.newest;
        node.newer = kNoSlot;
        node.queue = which;
        (queue.newest == kNoSlot ? queue.oldest : nodes_[queue.newest].newer) = slot;
        queue.newest = slot;
        queue.pages += node.pages;
        pages_ += node.pages;
        ++queue.size;
        ++size_;
    }

    void unlink(Slot slot) {
        const Node& node = nodes_[slot];
        Queue& queue = queues_[node.queue];
        (node.older == kNoSlot ? queue.oldest : nodes_[node.older].newer) = node.newer;
        (node.newer == kNoSlot ? queue.newest : nodes_[node.newer].older) = node.older;
        queue.pages -= node.pages;
        pages_ -= node.pages;
        --queue.size;
        --size_;
    }

    void check_queue(int8_t which) const {
        const Queue& queue = queues_[which];
        size_t walked = 0;
        int64_t pages = 0;
        Slot older = kNoSlot;
        for (Slot slot = queue.oldest; slot != kNoSlot; older = slot, slot = nodes_[slot].newer) {
            const Node& node = nodes_[slot];
            if (node.queue != which || node.older != older || node.pages < 1 || ++walked > queue.size)
                throw corrupt_state("policy", "queue " + std::to_string(which) + " is broken at slot " + std::to_string(slot));
            pages += node.pages;
        }
        if (walked != queue.size || pages != queue.pages || queue.newest != older)
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
