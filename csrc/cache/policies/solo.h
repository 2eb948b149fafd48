// A policy by itself, without an index: what tests compare with models and benchmarks time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "../errors.h"
#include "../policy.h"
#include "../xxh64.h"

namespace mtserve {

class Solo {
public:
    Solo(const std::string& name, int64_t capacity_pages, const Oracle* oracle)
        : policy_(make_policy(name, checked_capacity(capacity_pages), oracle)), capacity_(capacity_pages) {}

    void insert(Slot slot, uint64_t key, int32_t pages, double now, double cost) {
        if (slot > kLastSlot) throw invalid_argument("slot", std::to_string(slot) + " is above " + std::to_string(kLastSlot));
        if (policy_->contains(slot)) throw invalid_argument("slot", std::to_string(slot) + " is listed already");
        if (!(cost > 0 && cost <= 1e9)) throw invalid_argument("cost", std::to_string(cost) + " is not above 0 and up to 1e9");
        policy_->insert(slot, {key, checked(pages), cost}, finite(now));
    }
    void access(Slot slot, double now) { policy_->access(listed(slot), finite(now)); }
    void refresh(Slot slot, double now) { policy_->refresh(listed(slot), finite(now)); }
    void resize(Slot slot, int32_t pages) { policy_->resize(listed(slot), checked(pages)); }
    void remove(Slot slot, bool evicted) {
        policy_->remove(listed(slot), evicted);
        held_.erase(slot);
    }
    void hold(Slot slot) {
        if (held_.insert(listed(slot)).second) policy_->hold(slot);
    }
    void release(Slot slot) {
        if (!held_.erase(listed(slot))) throw invalid_argument("slot", std::to_string(slot) + " is not held");
        policy_->release(slot);
    }
    bool admits(uint64_t key, int32_t pages, Slot victim) const {
        return policy_->admits({key, checked(pages)}, listed(victim), 0);
    }
    void decline(uint64_t key, int32_t pages) { policy_->decline({key, checked(pages)}, 0); }

    Slot victim(const std::unordered_set<Slot>& pinned, double now) {
        struct Others final : Policy::Evictable {
            Others(const std::unordered_set<Slot>& pinned, Solo& solo) : pinned(pinned), solo(solo) {}
            bool operator()(Slot slot) const override {
                ++solo.looks_;
                return !pinned.count(slot) && !solo.held_.count(slot);
            }
            const std::unordered_set<Slot>& pinned;
            Solo& solo;
        };
        return policy_->victim(Others(pinned, *this), finite(now));
    }

    void grow(int64_t pages) {
        if (pages < 0) throw invalid_argument("pages", std::to_string(pages) + " is negative");
        checked_capacity(capacity_ + pages);
        policy_->grow(pages);
        capacity_ += pages;
    }

    const Policy& policy() const { return *policy_; }
    int64_t looks() const { return looks_; }  // at entries, by all searches of `victim`

    // Requests of whole users, one after the other, each of pages[user] pages; the users of the last `recent` requests
    // are pinned. One request follows the other after `every_s` seconds, from `start_s` on. Returns how many requests found
    // their user. Slots are given out as the index does: the last freed first.
    int64_t replay(const int32_t* users, int64_t requests, const int32_t* pages, int64_t known, int64_t recent,
                   double start_s, double every_s) {
        if (policy_->size() != user_of_.size() - free_.size())
            throw failed_precondition("users", "entries came or went by other calls than replay");
        if (slot_of_.size() < static_cast<size_t>(known)) slot_of_.resize(static_cast<size_t>(known), kNoSlot);
        Recent pinned(user_of_, recent);
        int64_t hits = 0;
        for (int64_t i = 0; i < requests; ++i) {
            const int32_t user = users[i];
            const double now = start_s + static_cast<double>(i) * every_s;
            if (slot_of_[user] != kNoSlot) {
                policy_->access(slot_of_[user], now);
                ++hits;
            } else if (make_room(pages[user], pinned, now)) {
                policy_->insert(seat(user), {xxh64(&user, sizeof user, 0), pages[user]}, now);
            }
            pinned.add(user);
        }
        return hits;
    }

private:
    // The users of the last requests; few, so that a look at all of them is cheap.
    struct Recent final : Policy::Evictable {
        Recent(const std::vector<int32_t>& user_of, int64_t count) : user_of(user_of), ring(static_cast<size_t>(count), -1) {}
        void add(int32_t user) {
            if (ring.empty()) return;
            ring[next] = user;
            next = (next + 1) % ring.size();
        }
        bool operator()(Slot slot) const override { return std::find(ring.begin(), ring.end(), user_of[slot]) == ring.end(); }
        const std::vector<int32_t>& user_of;
        std::vector<int32_t> ring;
        size_t next = 0;
    };

    static constexpr Slot kLastSlot = (1 << 27) - 1;

    static int64_t checked_capacity(int64_t pages) {
        if (pages < 0 || pages > INT32_MAX)
            throw invalid_argument("capacity_pages", std::to_string(pages) + " is outside 0 to " + std::to_string(INT32_MAX));
        return pages;
    }

    static double finite(double now) {
        if (!std::isfinite(now)) throw invalid_argument("now", "needs a finite number of seconds");
        return now;
    }

    static int32_t checked(int32_t pages) {
        if (pages < 1) throw invalid_argument("pages", std::to_string(pages) + " is less than 1");
        return pages;
    }

    Slot listed(Slot slot) const {
        if (!policy_->contains(slot)) throw invalid_argument("slot", std::to_string(slot) + " is not listed");
        return slot;
    }

    bool make_room(int32_t pages, const Recent& pinned, double now) {
        while (policy_->pages() + pages > capacity_) {
            const Slot slot = policy_->victim(pinned, now);
            if (slot == kNoSlot) return false;
            policy_->remove(slot, true);
            slot_of_[user_of_[slot]] = kNoSlot;
            free_.push_back(slot);
        }
        return true;
    }

    Slot seat(int32_t user) {
        if (free_.empty()) {
            free_.push_back(static_cast<Slot>(user_of_.size()));
            user_of_.push_back(-1);
        }
        const Slot slot = free_.back();
        free_.pop_back();
        slot_of_[user] = slot;
        user_of_[slot] = user;
        return slot;
    }

    std::unique_ptr<Policy> policy_;
    int64_t capacity_;
    std::vector<Slot> slot_of_;     // by user of a replay; kNoSlot where not listed
    std::vector<int32_t> user_of_;  // by slot
    std::vector<Slot> free_;
    std::unordered_set<Slot> held_;
    int64_t looks_ = 0;
};

}  // namespace mtserve
