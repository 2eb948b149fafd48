// How users of each class come back, learned from some of them: from the gaps between their requests, and from those
// still under way.
//
// All users are watched until there are kMost; then half of the keys, and so on, so that the work for a request does not
// depend on how many users there are. A user is watched whether the tier holds it or not, for else those it lost would
// seem never to come back. A gap counts at every age that it passes and at the one where it ends; a round over the
// watched, one at each request, counts what passed of gaps that may never end. All counts are halved when kMemory gaps
// of each of the watched have ended. 24 bytes for each of kMost users, and some 50 of the table that finds them: 1.2 MB.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../errors.h"
#include "ages.h"

namespace mtserve {

class Watch {
public:
    static constexpr size_t kMost = 1 << 14;

    explicit Watch(int classes) : counts_(classes) {
        for (int age = 0; age < Ages::kCount; ++age) begins_[age] = Ages::begin(age);
    }

    // The user asks at `now` and is of class `next` until the request after this one.
    void request(uint64_t key, int next, double now) {
        at_ = at_ + 1 < users_.size() ? at_ + 1 : 0;
        if (!users_.empty()) pass(users_[at_], now);
        if (!watches(key)) return;
        const auto [place, isnew] = places_.try_emplace(key, static_cast<uint32_t>(users_.size()));
        if (isnew) {
            users_.push_back({key, now, next, 0});
            if (users_.size() > kMost) thin();
            return;
        }
        User& user = users_[place->second];
        pass(user, now);
        ++counts_[user.of].ended[user.age];
        user = {key, now, next, 0};
        if (++gaps_ > kMemory * users_.size()) halve();
    }

    // By class; where a class knows little, all classes together speak for it, their odds times what the class's own were
    // of theirs an age before: who comes back seldom after hours will after days. Before they know anything, a return is as
    // likely in each age: the older the less dense.
    std::vector<Returns> returns() const {
        Counts all;
        for (const Counts& counts : counts_) {
            for (int age = 0; age < Ages::kCount; ++age) {
                all.ended[age] += counts.ended[age];
                all.passed[age] += counts.passed[age];
            }
        }
        Returns unknown;
        unknown.fill(kUnknown);
        const Returns pooled = all.returns(unknown);
        std::vector<Returns> out;
        for (const Counts& counts : counts_) out.push_back(counts.returns(pooled));
        return out;
    }

    void check() const {
        bool whole = users_.size() <= kMost && places_.size() == users_.size();
        for (size_t i = 0; whole && i < users_.size(); ++i) {
            const auto place = places_.find(users_[i].key);
            whole = place != places_.end() && place->second == i && watches(users_[i].key) && users_[i].age < Ages::kCount;
        }
        if (!whole) throw corrupt_state("policy", std::to_string(users_.size()) + " watched users are not those found by key");
    }

private:
    static constexpr size_t kMemory = 64;
    static constexpr double kPooled = 128;  // gaps that all classes together count for in each
    static constexpr double kUnknown = 0.25;
    static constexpr double kLikelier = 64;  // at most, so that no return is certain
    struct User {
        uint64_t key;
        double last;  // request, s
        int16_t of, age;  // class; the age up to which the gap under way is counted
        User(uint64_t key, double last, int of, int age)
            : key(key), last(last), of(static_cast<int16_t>(of)), age(static_cast<int16_t>(age)) {}
    };
    struct Counts {
        std::array<uint64_t, Ages::kCount> ended{}, passed{};
        Returns returns(const Returns& others) const {
            Returns out;
            double likelier = 1;  // odds as a multiple of the others' at the age before
            for (int age = 0; age < Ages::kCount; ++age) {
                const double theirs = others[age] / (1 - others[age]), odds = theirs * likelier;
                out[age] = (ended[age] + kPooled * (odds / (1 + odds))) / (ended[age] + passed[age] + kPooled);
                likelier = std::clamp(out[age] / (1 - out[age]) / theirs, 1 / kLikelier, kLikelier);
            }
            return out;
        }
    };

    bool watches(uint64_t key) const { return (key * 0x9E3779B97F4A7C15u >> 32 & mask_) == 0; }

    void pass(User& user, double now) {
        for (const double idle = now - user.last; user.age + 1 < Ages::kCount && idle >= begins_[user.age + 1]; ++user.age)
            ++counts_[user.of].passed[user.age];
    }

    // Those who did not come back for as long as ages tell apart have told all they can; then half of the others go.
    void thin() {
        const auto leave = [this](auto goes) { users_.erase(std::remove_if(users_.begin(), users_.end(), goes), users_.end()); };
        leave([](const User& user) { return user.age + 1 == Ages::kCount; });
        if (users_.size() > kMost * 3 / 4) {
            mask_ = 2 * mask_ + 1;
            leave([this](const User& user) { return !watches(user.key); });
        }
        places_.clear();
        for (size_t i = 0; i < users_.size(); ++i) places_.emplace(users_[i].key, static_cast<uint32_t>(i));
    }

    void halve() {
        for (Counts& counts : counts_)
            for (auto* each : {&counts.ended, &counts.passed})
                for (uint64_t& count : *each) count /= 2;
        gaps_ = 0;
    }

    std::vector<User> users_;
    std::unordered_map<uint64_t, uint32_t> places_;  // in users_, by key
    std::vector<Counts> counts_;                     // by class
    std::array<double, Ages::kCount> begins_;        // of the ages, s
    uint64_t mask_ = 0;
    size_t at_ = 0, gaps_ = 0;
};

}  // namespace mtserve
