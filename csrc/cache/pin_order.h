// The pinned users who have pages in one tier, and which of them its budget covers: in the order of their last use, the
// latest whose pages fit the budget together. A covered user is covered until one used later needs its share.
//
// Each call does a step for a user whose cover changes, each of whom has a page that came, went or moved up: amortised
// O(1) a page.
#pragma once

#include <cstdint>
#include <iterator>
#include <list>
#include <string>
#include <unordered_map>

#include "errors.h"
#include "policy.h"

namespace mtserve {

class PinOrder {
public:
    struct Pin {
        Slot slot;
        int32_t pages;
        bool covered;
    };

    // `changed(slot, covered)` is told of everybody whose cover changes, but not of those removed.
    template <typename Changed>
    void set_budget(int64_t pages, const Changed& changed) {
        budget_ = pages;
        fit(changed);
    }

    // The user is pinned, comes, or is used: the latest from now on.
    template <typename Changed>
    void use(Slot slot, int32_t pages, const Changed& changed) {
        auto known = places_.find(slot);
        if (known == places_.end()) known = places_.emplace(slot, order_.insert(order_.end(), {slot, pages, false})).first;
        const auto at = known->second;
        const bool covered = at->covered;
        uncover(at);
        order_.splice(order_.end(), order_, at);
        at->pages = pages;
        if (first_ == order_.end()) first_ = at;
        cover(at);
        if (!covered) changed(slot, true);
        fit(changed);
    }

    template <typename Changed>
    void resize(Slot slot, int32_t pages, const Changed& changed) {
        Pin& pin = *places_.at(slot);
        if (pin.covered) pages_ += pages - pin.pages;
        pin.pages = pages;
        fit(changed);
    }

    template <typename Changed>
    void remove(Slot slot, const Changed& changed) {
        const auto known = places_.find(slot);
        if (known == places_.end()) return;
        uncover(known->second);
        order_.erase(known->second);
        places_.erase(known);
        fit(changed);
    }

    bool contains(Slot slot) const { return places_.count(slot) > 0; }
    size_t size() const { return order_.size(); }
    size_t covered_users() const { return covered_; }
    int64_t covered_pages() const { return pages_; }
    // Of those covered, the one used first that `may_go(slot)`.
    template <typename MayGo>
    Slot oldest(const MayGo& may_go) const {
        for (auto at = first_; at != order_.end(); ++at)
            if (may_go(at->slot)) return at->slot;
        return kNoSlot;
    }
    const Pin& pin(Slot slot) const { return *places_.at(slot); }

    void check() const {
        size_t covered = 0;
        int64_t pages = 0, missed = 0;  // pages of the covered, and with the latest of the others
        bool inside = false;
        for (auto at = order_.begin(); at != order_.end(); ++at) {
            inside |= at == first_;
            const auto known = places_.find(at->slot);
            if (known == places_.end() || known->second != at || at->covered != inside)
                throw corrupt_state("pins", "the pin of slot " + std::to_string(at->slot) + " is out of place");
            (inside ? pages : missed) = inside ? pages + at->pages : at->pages;
            covered += inside;
        }
        if (places_.size() != order_.size() || pages != pages_ || covered != covered_)
            throw corrupt_state("pins", std::to_string(covered) + " of " + std::to_string(covered_) + " covered, " +
                                            std::to_string(pages) + " of " + std::to_string(pages_) + " pages");
        if (pages > budget_ || (missed > 0 && pages + missed <= budget_))
            throw corrupt_state("pins", std::to_string(pages) + " pages covered, " + std::to_string(missed) +
                                            " of the next one not, of a budget of " + std::to_string(budget_));
    }

private:
    using Order = std::list<Pin>;  // oldest first

    void cover(Order::iterator at) {
        at->covered = true;
        pages_ += at->pages;
        ++covered_;
    }

    void uncover(Order::iterator at) {
        if (!at->covered) return;
        if (first_ == at) ++first_;
        at->covered = false;
        pages_ -= at->pages;
        --covered_;
    }

    template <typename Changed>
    void fit(const Changed& changed) {
        while (pages_ > budget_) {
            const Slot slot = first_->slot;
            uncover(first_);
            changed(slot, false);
        }
        while (first_ != order_.begin() && pages_ + std::prev(first_)->pages <= budget_) {
            cover(--first_);
            changed(first_->slot, true);
        }
    }

    Order order_;
    Order::iterator first_ = order_.end();  // covered
    std::unordered_map<Slot, Order::iterator> places_;
    int64_t budget_ = 0, pages_ = 0;  // covered pages
    size_t covered_ = 0;
};

}  // namespace mtserve
