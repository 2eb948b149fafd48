// Runs of pages that are neighbours in both tiers: what one copy can move.
#pragma once

#include <cstdint>
#include <vector>

namespace mtserve {

// Left firsts, right firsts and counts of the longest runs in which both ids rise by one, one after the other in one
// vector of three equal parts. No run crosses a multiple of `boundary` on the right; 0: any may.
std::vector<int64_t> find_runs(const int32_t* left, const int32_t* right, int64_t count, int64_t boundary);
// How many there are.
int64_t count_runs(const int32_t* left, const int32_t* right, int64_t count, int64_t boundary);

}  // namespace mtserve
