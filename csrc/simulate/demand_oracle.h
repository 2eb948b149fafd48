// What comes, for the policies that others are measured against; a key is the user's number.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "../cache/oracle.h"

namespace mtserve {

class DemandOracle final : public Oracle {
public:
    // `habits`: how users come back; outlives this.
    DemandOracle(const Oracle& habits, int64_t users)
        : habits_(habits), next_s_(static_cast<size_t>(users), std::numeric_limits<double>::infinity()) {}

    // From now on the user's next request for the states that it leaves is at `t_s`; infinity where there is none.
    void expect(int32_t user, double t_s) { next_s_[user] = t_s; }

    double next_request_s(uint64_t key, double) const override { return next_s_[key]; }
    Returns returns(uint64_t key, double now) const override { return habits_.returns(key, now); }

private:
    const Oracle& habits_;
    std::vector<double> next_s_;  // by user
};

}  // namespace mtserve
