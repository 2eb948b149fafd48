// Who asks last goes first. Belady, "A Study of Replacement Algorithms for a Virtual-Storage Computer", IBM Systems
// Journal 1966. Pages are of one size and a request wants all of its user's, so this is the best order there is; that a
// request keeps its own states, even where nobody asks for them again, is what it loses against optimum.h.
#pragma once

#include "../oracle.h"
#include "ranked.h"

namespace mtserve {

class Belady final : public Ranked {
public:
    explicit Belady(const Oracle& oracle) : oracle_(oracle) {}

private:
    void used(Slot slot, double now) override { set_rank(slot, -oracle_.next_request_s(key(slot), now)); }

    const Oracle& oracle_;
};

}  // namespace mtserve
