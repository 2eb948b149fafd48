// Which bucket a gap falls into, without a search: by its octave, and a few comparisons that no branch depends on.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "../cache/errors.h"

namespace mtserve {

class GapBuckets {
public:
    // `thresholds`: the smallest gap of each bucket, ascending, the second above 0; gaps below that are of the first, whatever
    // the first says. Throws InvalidArgument for others, and where there is none.
    explicit GapBuckets(const std::vector<int64_t>& thresholds)
        : thresholds_(thresholds), last_(static_cast<int32_t>(thresholds.size()) - 1) {
        if (thresholds.empty() || !std::is_sorted(thresholds.begin(), thresholds.end()))
            throw invalid_argument("gap_thresholds", "needs at least one, ascending");
        if (thresholds.size() > 1 && thresholds[1] < 1) throw invalid_argument("gap_thresholds", "needs a second above 0");
        const auto bucket_of = [&](int64_t gap) {
            return static_cast<int32_t>(std::upper_bound(thresholds.begin() + 1, thresholds.end(), gap) - thresholds.begin() - 1);
        };
        for (int octave = 0; octave < kOctaves; ++octave) {
            const int64_t low = octave == 0 ? 0 : int64_t{1} << (octave - 1);
            const int64_t high = octave == 0 ? 0 : low + (low - 1);
            first_[octave] = bucket_of(low);
            most_ = std::max(most_, bucket_of(high) - first_[octave]);
        }
        thresholds_.resize(thresholds.size() + static_cast<size_t>(most_) + 1, std::numeric_limits<int64_t>::max());
    }

    int32_t of(int64_t gap) const {
        const uint64_t positive = static_cast<uint64_t>(std::max<int64_t>(gap, 0));
        const int32_t first = first_[positive == 0 ? 0 : 64 - __builtin_clzll(positive)];
        int32_t bucket = first;
        for (int32_t i = 1; i <= most_; ++i) bucket += gap >= thresholds_[static_cast<size_t>(first + i)];
        return std::min(bucket, last_);
    }

private:
    static constexpr int kOctaves = 64;  // gaps of 0, 1, 2 to 3, 4 to 7, ...
    std::vector<int64_t> thresholds_;    // and behind them what no gap reaches
    std::array<int32_t, kOctaves> first_{};
    int32_t last_, most_ = 0;            // bucket; thresholds inside an octave
};

}  // namespace mtserve
