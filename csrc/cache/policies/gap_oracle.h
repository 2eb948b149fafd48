// The best that knowing how each user comes back allows, without knowing when: evicts the least hit density (ages.h)
// by the user's own gaps and the time since the last request. Who asked in the last kCalm seconds goes last, the one
// who was used first before others; from then on an entry changes its place twice an age.
#pragma once

#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "../oracle.h"
#include "ranked.h"

namespace mtserve {

class GapOracle final : public Ranked {
public:
    explicit GapOracle(const Oracle& oracle) : oracle_(oracle) {}

    void remove(Slot slot, bool evicted) override {
        due_.erase({states_[slot].due, slot});
        Ranked::remove(slot, evicted);
    }

    Slot victim(const Evictable& evictable, double now) override {
        while (!due_.empty() && due_.begin()->first <= now) {
            const Slot slot = due_.begin()->second;
            due_.erase(due_.begin());
            State& state = states_[slot];
            if (!state.known) state.densities = densities(oracle_.returns(key(slot), state.last));
            state.known = true;
            const double place = std::floor(2 * Ages::place(now - state.last)) / 2;
            move(slot, density_at(state.densities, place + 0.25));
            wait(slot, place + 0.5);
        }
        return Ranked::victim(evictable, now);
    }

private:
    static constexpr double kCalm = 64;  // an age begins there
    struct State {
        Densities densities{};
        bool known = false;         // the densities, since the last request
        double last = 0, due = 0;  // seconds: last request, next change of its place
    };

    void used(Slot slot, double now) override {
        if (slot >= states_.size()) states_.resize(slot + 1);
        State& state = states_[slot];
        due_.erase({state.due, slot});
        state.known = false;
        state.last = now;
        set_rank(slot, std::numeric_limits<double>::infinity());
        wait(slot, Ages::place(kCalm));
    }

    void wait(Slot slot, double place) {
        State& state = states_[slot];
        const int age = static_cast<int>(place);
        if (age >= Ages::kCount) return;
        // A whisker later, so that rounding does not find the entry where it was.
        state.due = state.last + (Ages::begin(age) + (place - age) * Ages::seconds(age)) + 1e-3;
        due_.insert({state.due, slot});
    }

    const Oracle& oracle_;
    std::vector<State> states_;  // by slot
    std::set<std::pair<double, Slot>> due_;
};

}  // namespace mtserve
