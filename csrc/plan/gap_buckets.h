// Which bucket a gap falls into, without a search: by its quarter octave, and a comparison that no branch depends on.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../cache/errors.h"

namespace mtserve {

class GapBuckets {
public:
    // `thresholds`: the smallest gap of each bucket, ascending, the second above 0, none above 2^53 - 1; gaps below the second
    // are of the first bucket, whatever the first says. Throws InvalidArgument for others, and where there is none.
    explicit GapBuckets(const std::vector<int64_t>& thresholds) : thresholds_(thresholds) {
        if (thresholds.empty() || !std::is_sorted(thresholds.begin(), thresholds.end()))
            throw invalid_argument("gap_thresholds", "needs at least one, ascending");
        if (thresholds.size() > 1 && thresholds[1] < 1) throw invalid_argument("gap_thresholds", "needs a second above 0");
        if (thresholds.back() > kMost) throw invalid_argument("gap_thresholds", "needs none above 2^53 - 1");
        const auto bucket_of = [&](int64_t gap) {
            return static_cast<int32_t>(std::upper_bound(thresholds.begin() + 1, thresholds.end(), gap) - thresholds.begin() - 1);
        };
        for (int64_t cell = 0; cell < kCells; ++cell) {
            first_[cell] = bucket_of(least(cell));
            most_ = std::max(most_, bucket_of(least(cell + 1) - 1) - first_[cell]);
        }
        thresholds_.resize(thresholds.size() + static_cast<size_t>(most_) + 1, std::numeric_limits<int64_t>::max());
    }

    int32_t of(int64_t gap) const {
        const int64_t known = std::clamp<int64_t>(gap, 0, kMost);
        const int32_t first = first_[cell_of(known)];
        int32_t bucket = first;
        for (int32_t i = 1; i <= most_; ++i) bucket += known >= thresholds_[static_cast<size_t>(first + i)];
        return bucket;
    }

private:
    // A float64 says the quarter octave of what it holds exactly, and sooner than a count of leading zeros does on some machines.
    static constexpr int kSteps = 2;  // bits behind the exponent
    static constexpr int64_t kMost = (int64_t{1} << 53) - 1;
    static constexpr int64_t kCells = (53 << kSteps) + 1;

    static int64_t cell_of(int64_t gap) {
        const double shifted = static_cast<double>(gap + 1);
        int64_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        return (bits >> (52 - kSteps)) - (int64_t{1023} << kSteps);
    }
    // The smallest gap of a cell.
    static int64_t least(int64_t cell) {
        const int64_t bits = (cell + (int64_t{1023} << kSteps)) << (52 - kSteps);
        double shifted;
        std::memcpy(&shifted, &bits, sizeof shifted);
        const int64_t whole = static_cast<int64_t>(shifted);
        return static_cast<double>(whole) < shifted ? whole : whole - 1;
    }

    std::vector<int64_t> thresholds_;  // and behind them what no gap reaches
    std::array<int32_t, kCells> first_{};
    int32_t most_ = 0;  // thresholds inside a cell
};

}  // namespace mtserve
