// What only a trace that is over can tell: for the policies that others are measured against.
#pragma once

#include <cstdint>

#include "policies/ages.h"

namespace mtserve {

class Oracle {
public:
    virtual ~Oracle() = default;
    // Seconds at which the user asks next after `now`, so that what is held is of use; infinity when never.
    virtual double next_request_s(uint64_t key, double now) const = 0;
    // How the user comes back, over the whole trace but for the gap that `now` is in: that one would be the future.
    virtual Returns returns(uint64_t key, double now) const = 0;
};

}  // namespace mtserve
