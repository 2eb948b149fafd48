// How often users asked who are not held: found by key, in a table that never has more than 16 places for each entry
// that the tier held at once. A place is 8 bytes: 24 bits of the key, the frequency, and the minute of the last request.
// Eight of them, one cache line, are a bucket in order of use, whose last one is forgotten for a new one.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../errors.h"

namespace mtserve {

// Requests of late, in 64ths: after a pause of kHalfLife half of them are left, after two a third.
struct Frequency {
    static constexpr double kHalfLife = 7 * 86400.0;  // s
    static constexpr double kOne = 64;
    uint16_t value = 0;

    // With one more after so much time.
    Frequency after(double idle_s) const {
        const double left = value / (1 + std::max(0.0, idle_s) / kHalfLife);
        return {static_cast<uint16_t>(std::min(65535.0, left + kOne + 0.5))};
    }
    double requests() const { return value / kOne; }
};

class Habits {
public:
    struct Habit {
        Frequency frequency;  // none: the user is not known
        double last;          // request, s; to the minute
    };

    Habits() : buckets_(kFewest) {}

    // Room for four users for each that is held.
    void fit(size_t held) {
        while (kBucket * buckets_.size() < 4 * held) {
            const size_t half = buckets_.size();
            buckets_.resize(2 * half);
            std::copy_n(buckets_.begin(), half, buckets_.begin() + half);  // a key's bucket is found in the copy, too
        }
    }

    Habit take(uint64_t key) {
        auto& places = bucket(key).places;
        const auto found = std::find_if(places.begin(), places.end(), [key](uint64_t place) {
            return place != 0 && place >> 40 == mix(key) >> 40;
        });
        if (found == places.end()) return {};
        const uint64_t place = *found;
        *std::move(found + 1, places.end(), found) = 0;
        return {{static_cast<uint16_t>(place)}, (from_ + static_cast<double>(place >> 16 & kMinutes)) * 60};
    }

    void put(uint64_t key, const Habit& habit) {
        take(key);  // of two users with one key only the later is remembered
        auto& places = bucket(key).places;
        std::move_backward(places.begin(), places.end() - 1, places.end());
        const double asked = std::floor(habit.last / 60);
        if (std::isnan(from_)) from_ = asked - (kMinutes + 1) / 2;
        const double minute = std::clamp(asked - from_, 0.0, static_cast<double>(kMinutes));
        places[0] = mix(key) >> 40 << 40 | static_cast<uint64_t>(minute) << 16 | habit.frequency.value;
    }

    void check() const {
        for (const Bucket& bucket : buckets_) {
            for (size_t at = 0; at < kBucket; ++at) {
                const uint64_t place = bucket.places[at];
                const bool gap = at > 0 && place != 0 && bucket.places[at - 1] == 0;
                if (gap || (place != 0 && static_cast<uint16_t>(place) == 0))
                    throw corrupt_state("policy", "a bucket of habits is broken at " + std::to_string(at));
            }
        }
    }

private:
    static constexpr size_t kBucket = 8, kFewest = 1 << 9;
    static constexpr uint64_t kMinutes = (1 << 24) - 1;
    struct alignas(64) Bucket {
        std::array<uint64_t, kBucket> places{};
    };

    static uint64_t mix(uint64_t key) {
        const uint64_t mixed = key * 0x9E3779B97F4A7C15u;
        return mixed ^ mixed >> 32;
    }

    Bucket& bucket(uint64_t key) { return buckets_[mix(key) & (buckets_.size() - 1)]; }

    std::vector<Bucket> buckets_;  // a power of two
    // Minute from which on the others are counted: 16 years before the first one. A clock may count from an epoch that is
    // longer ago than kMinutes reach.
    double from_ = std::numeric_limits<double>::quiet_NaN();
};

}  // namespace mtserve
