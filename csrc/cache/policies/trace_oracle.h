// An oracle over the requests of a trace.
//
// A user's gaps are few: beside them count kPooled of the users with about as many requests (within a power of two).
// Those know how active the user is, and how likely after each request that it was the last. The gap after a last
// request is cut by the end of the trace, and counts at the ages that it passed.
#pragma once

#include <algorithm>
#include <iterator>
#include <limits>
#include <unordered_map>
#include <vector>

#include "../oracle.h"

namespace mtserve {

class TraceOracle final : public Oracle {
public:
    // Keys and times in seconds of all requests, in order of time.
    TraceOracle(const uint64_t* keys, const double* t_s, int64_t requests) : end_(requests ? t_s[requests - 1] : 0) {
        for (int64_t i = 0; i < requests; ++i) users_[keys[i]].times.push_back(t_s[i]);
        for (auto& [key, user] : users_) {
            for (size_t i = 0; i < user.times.size(); ++i) {
                add(user.gaps, user.times, i, 1);
                add(alike_[level(user)], user.times, i, 1);
            }
        }
    }

    double next_request_s(uint64_t key, double now) const override {
        const auto found = users_.find(key);
        if (found == users_.end()) return std::numeric_limits<double>::infinity();
        const auto& times = found->second.times;
        const auto next = std::upper_bound(times.begin(), times.end(), now);
        return next == times.end() ? std::numeric_limits<double>::infinity() : *next;
    }

    Returns returns(uint64_t key, double now) const override {
        const auto found = users_.find(key);
        if (found == users_.end()) return {};
        const User& user = found->second;
        Gaps own = user.gaps, alike = alike_[level(user)];
        const auto next = std::upper_bound(user.times.begin(), user.times.end(), now);
        if (next != user.times.begin()) {
            const size_t under_way = std::distance(user.times.begin(), next) - 1;
            for (Gaps* gaps : {&own, &alike}) add(*gaps, user.times, under_way, -1);
        }
        return own.returns(alike.returns({}, 0), kPooled);
    }

private:
    static constexpr double kPooled = 64;
    struct Gaps {
        std::array<int64_t, Ages::kCount> ended{}, passed{};  // gaps that ended at the age, and that went on
        Returns returns(const Returns& others, double weight) const {
            Returns out;
            for (int age = 0; age < Ages::kCount; ++age) {
                const double reached = ended[age] + passed[age] + weight;
                out[age] = reached > 0 ? (ended[age] + weight * others[age]) / reached : 0;
            }
            return out;
        }
    };
    struct User {
        std::vector<double> times;  // ascending
        Gaps gaps;
    };

    static int level(const User& user) {
        int level = 0;
        for (size_t requests = user.times.size(); requests > 1; requests /= 2) ++level;
        return level;
    }

    // The gap after request `i`, `sign` times.
    void add(Gaps& gaps, const std::vector<double>& times, size_t i, int sign) const {
        const bool last = i + 1 == times.size();
        const double gap = (last ? end_ : times[i + 1]) - times[i];
        const int age = std::min(Ages::kCount - 1, static_cast<int>(Ages::place(gap)));
        for (int before = 0; before < age; ++before) gaps.passed[before] += sign;
        if (!last) gaps.ended[age] += sign;
    }

    double end_;
    std::unordered_map<uint64_t, User> users_;
    std::array<Gaps, 64> alike_;  // by level
};

}  // namespace mtserve
