// Locality: the page goes from which the fewest hits a second can be expected (the densities of ages.h), by how users
// of the kind of its own come back after as long as it has been idle.
//
// A user's kind is the size of its states and how often it asked of late, which is remembered of users that were evicted,
// too (habits.h). How each kind comes back is learned while serving (watch.h). Each kind is a queue in order of last
// requests whose oldest entry is its candidate; of candidates equally dense, as all are where the clock stands still, the
// one used first goes, and until something is learned, the one idle longest: that is LRU.
//
// 48 bytes an entry, 48 to 96 of habits for each and 1.2 MB of the watched; O(1): a choice among those of the 64
// kinds that have entries. Pinned entries are passed over where they are.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "habits.h"
#include "queued.h"
#include "watch.h"

namespace mtserve {

struct LocalNote {
    uint64_t key = 0;
    double asked = 0;   // the last request, s
    double last = 0;    // that, or what made it as recent
    uint32_t turn = 0;  // number of the last use
    Frequency frequency;
    uint8_t size = 0;   // level of the most pages that it had
};

constexpr int8_t kSizeLevels = 8, kRateLevels = 8;

class Locality final : public Queued<LocalNote, kSizeLevels * kRateLevels> {
public:
    Locality() : watch_(kKinds) {
        cost_.fill(1);
        learn();
    }

    void insert(Slot slot, const Facts& facts, double now) override {
        const auto [frequency, idle_s] = habits_.take(facts.key, now);
        const uint8_t size = size_level(facts.pages);
        const LocalNote note{facts.key, now, now, ++turn_, frequency.after(idle_s), size};
        const int8_t kind = kind_of(note);
        cost_[kind] += (facts.cost - cost_[kind]) / kCosts;
        push_newest(slot, kind, facts.pages, note);
        listed_ |= bit(kind);
        candidates_[kind].slot = kNoSlot;
        habits_.fit(Queued::size());
        request(facts.key, kind, now);
    }

    void access(Slot slot, double now) override {
        LocalNote& known = note(slot);
        known.frequency = known.frequency.after(now - known.asked);
        known.asked = now;
        request(known.key, kind_of(known), now);
        refresh(slot, now);
    }

    void refresh(Slot slot, double now) override {
        LocalNote& known = note(slot);
        known.last = now;
        known.turn = ++turn_;
        forget_candidate(slot);
        const int8_t kind = kind_of(known);
        move_to_newest(slot, kind);
        listed_ |= bit(kind);
        forget_candidate(slot);
    }

    void resize(Slot slot, int32_t pages) override {
        Queued::resize(slot, pages);
        note(slot).size = std::max(note(slot).size, size_level(pages));
    }

    void remove(Slot slot, bool evicted) override {
        if (evicted) habits_.put(note(slot).key, note(slot).frequency, note(slot).asked);
        forget_candidate(slot);
        drop(slot);
    }

    Slot victim(const Evictable& evictable, double now) override {
        if (std::abs(now - scored_at_) >= kScoredFor) {
            scored_at_ = now;
            for (Candidate& each : candidates_) each.slot = kNoSlot;
        }
        Candidate best;
        for (uint64_t left = listed_; left != 0; left &= left - 1) {
            const int8_t kind = lowest(left);
            const Slot slot = queue(kind).oldest;
            if (queue(kind).size == 0) listed_ &= ~bit(kind);
            if (slot == kNoSlot) continue;
            Candidate& each = candidates_[kind];
            if (each.slot != slot) each = candidate(slot);
            if (each < best) best = each;
        }
        if (best.slot == kNoSlot || evictable(best.slot)) return best.slot;
        best = {};
        for (uint64_t left = listed_; left != 0; left &= left - 1) {
            const int8_t kind = lowest(left);
            const Slot slot = oldest(kind, evictable);
            if (slot == kNoSlot) continue;
            const Candidate each = candidate(slot);
            if (each < best) best = each;
        }
        return best.slot;
    }

    void check() const override {
        Queued::check();
        for (int8_t kind = 0; kind < kKinds; ++kind)
            if (queue(kind).size > 0 && !(listed_ & bit(kind)))
                throw corrupt_state("policy", "kind " + std::to_string(kind) + " has entries and is not listed");
        watch_.check();
        habits_.check();
    }

private:
    static constexpr int8_t kKinds = kSizeLevels * kRateLevels;
    static constexpr int kCosts = 64;          // insertions over which a kind's cost is a mean
    static constexpr uint64_t kLearnFirst = 64, kLearnEvery = 16384;  // requests
    static constexpr double kScoredFor = 1;   // s
    static constexpr uint32_t kSeldom = 4 * static_cast<uint32_t>(Frequency::kOne);
    struct Candidate {
        Slot slot = kNoSlot;
        uint32_t turn = 0;
        double density = 0;
        bool operator<(const Candidate& other) const {
            if (other.slot == kNoSlot) return true;
            return density != other.density ? density < other.density : static_cast<int32_t>(turn - other.turn) < 0;
        }
    };

    static_assert(kKinds <= 64);
    static uint64_t bit(int8_t kind) { return uint64_t{1} << kind; }
    static int8_t lowest(uint64_t kinds) { return static_cast<int8_t>(__builtin_ctzll(kinds)); }

    static int8_t digits(uint32_t number) { return static_cast<int8_t>(number == 0 ? 0 : 32 - __builtin_clz(number)); }

    // Below 8 pages, 16, 32, ... 512, and more.
    static uint8_t size_level(int32_t pages) {
        return static_cast<uint8_t>(std::min<int8_t>(kSizeLevels - 1, digits(static_cast<uint32_t>(pages) / 8)));
    }

    // Up to 4 requests, 8, 16, ... 256, and more.
    static int8_t kind_of(const LocalNote& note) {
        const int8_t rate = std::min<int8_t>(kRateLevels - 1, digits((note.frequency.value - 1u) / kSeldom));
        return static_cast<int8_t>(note.size * kRateLevels + rate);
    }

    void request(uint64_t key, int8_t kind, double now) {
        watch_.request(key, kind, now);
        if (++requests_ == learn_at_) learn();
    }

    // Often at first, then now and then.
    void learn() {
        learn_at_ += std::clamp(learn_at_, kLearnFirst, kLearnEvery);
        const std::vector<Returns> returns = watch_.returns();
        for (int8_t kind = 0; kind < kKinds; ++kind) {
            density_[kind] = densities(returns[kind]);
            for (double& each : density_[kind]) each += std::log(cost_[kind]);
            candidates_[kind].slot = kNoSlot;
        }
    }

    void forget_candidate(Slot slot) {
        const int8_t kind = node(slot).queue;
        if (queue(kind).oldest == slot) candidates_[kind].slot = kNoSlot;
    }

    // Who asked this very second is in any case the last to go.
    Candidate candidate(Slot slot) const {
        const LocalNote& note = node(slot).note;
        const double place = Ages::place(scored_at_ - note.last);
        if (place < 1) return {slot, note.turn, std::numeric_limits<double>::infinity()};
        return {slot, note.turn, density_at(density_[node(slot).queue], place)};
    }

    Watch watch_;
    Habits habits_;
    std::array<Densities, kKinds> density_{};
    std::array<double, kKinds> cost_{};        // of restoring a page, the mean of those inserted last
    std::array<Candidate, kKinds> candidates_{};
    uint64_t listed_ = 0;                      // kinds that have entries, and some that had
    double scored_at_ = 0;
    uint32_t turn_ = 0;
    uint64_t requests_ = 0, learn_at_ = 0;
};

}  // namespace mtserve
