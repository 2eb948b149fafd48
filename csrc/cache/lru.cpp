// Least recently used: a doubly linked list through an array indexed by slot.
#include <vector>

#include "errors.h"
#include "policy.h"

namespace mtserve {

namespace {

class Lru final : public Policy {
public:
    void insert(Slot slot, const Facts&, double) override {
        if (slot >= links_.size()) links_.resize(slot + 1);
        push_newest(slot);
        ++size_;
    }

    void access(Slot slot, const Facts&, double) override {
        if (slot == newest_) return;
        unlink(slot);
        push_newest(slot);
    }

    void remove(Slot slot) override {
        unlink(slot);
        links_[slot].listed = false;
        --size_;
    }

    Slot victim(const Evictable& evictable, double) override {
        Slot slot = oldest_;
        while (slot != kNoSlot && !evictable(slot)) slot = links_[slot].newer;
        return slot;
    }

    bool contains(Slot slot) const override { return slot < links_.size() && links_[slot].listed; }
    size_t size() const override { return size_; }

    void check() const override {
        size_t walked = 0;
        Slot older = kNoSlot;
        for (Slot slot = oldest_; slot != kNoSlot; older = slot, slot = links_[slot].newer)
            if (!contains(slot) || links_[slot].older != older || ++walked > size_)
                throw corrupt_state("policy", "lru list is broken at slot " + std::to_string(slot));
        if (walked != size_ || newest_ != older)
            throw corrupt_state("policy", "lru list has " + std::to_string(walked) + " of " + std::to_string(size_) + " entries");
    }

private:
    struct Link {
        Slot older = kNoSlot, newer = kNoSlot;
        bool listed = false;
    };

    void push_newest(Slot slot) {
        links_[slot] = {newest_, kNoSlot, true};
        (newest_ == kNoSlot ? oldest_ : links_[newest_].newer) = slot;
        newest_ = slot;
    }

    void unlink(Slot slot) {
        const Link link = links_[slot];
        (link.older == kNoSlot ? oldest_ : links_[link.older].newer) = link.newer;
        (link.newer == kNoSlot ? newest_ : links_[link.newer].older) = link.older;
    }

    std::vector<Link> links_;
    Slot oldest_ = kNoSlot, newest_ = kNoSlot;
    size_t size_ = 0;
};

}  // namespace

std::unique_ptr<Policy> make_policy(const std::string& name) {
    if (name == "lru") return std::make_unique<Lru>();
    throw invalid_argument("policy", "'" + name + "' is not one of lru");
}

}  // namespace mtserve
