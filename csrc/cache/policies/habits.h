// How often users asked who are not held: found by key, in a table that has 12 to 24 places for each entry that the tier
// held at once. A place is 4 bytes: 12 bits of the key, the time of the last request to 4 hours, and the frequency to a
// 32nd of it. Sixteen of them, one cache line, are a bucket in order of use, whose last one is forgotten for a new one.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
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
};

class Habits {
public:
    struct Habit {
        Frequency frequency;  // none: the user is not known
        double idle_s;        // since the last request
    };

    Habits() : buckets_(kFewest) {}

    void fit(size_t held) {
        while (kBucket * buckets_.size() < 12 * held) {
            const size_t half = buckets_.size();
            buckets_.resize(2 * half);
            std::copy_n(buckets_.begin(), half, buckets_.begin() + half);  // a key's bucket is found in the copy, too
        }
    }

    Habit take(uint64_t key, double now) {
        auto& places = bucket(key).places;
        const auto found = std::find_if(places.begin(), places.end(), [tag = tag_of(key)](uint32_t place) {
            return place != 0 && place >> 20 == tag;
        });
        if (found == places.end()) return {};
        const uint32_t place = *found;
        *std::move(found + 1, places.end(), found) = 0;
        // Times are known but for multiples of 682 days: of what a clock that went back would make half of that or more,
        // nothing is counted.
        const uint32_t units = (unit_of(now) - (place >> 8)) & kUnits;
        return {frequency_of(place & 255), units > kUnits / 2 ? 0 : units * kUnit};
    }

    // Of two users whose bits are the same the later is found first.
    void put(uint64_t key, Frequency frequency, double asked) {
        auto& places = bucket(key).places;
        std::move_backward(places.begin(), places.end() - 1, places.end());
        places[0] = tag_of(key) << 20 | unit_of(asked) << 8 | code_of(frequency);
    }

    void check() const {
        for (const Bucket& bucket : buckets_) {
            for (size_t at = 0; at < kBucket; ++at) {
                const uint32_t place = bucket.places[at];
                const bool gap = at > 0 && place != 0 && bucket.places[at - 1] == 0;
                if (gap || (place != 0 && (place & 255) >> 4 == 0))
                    throw corrupt_state("policy", "a bucket of habits is broken at " + std::to_string(at));
            }
        }
    }

private:
    static constexpr size_t kBucket = 16, kFewest = 1 << 8;
    static constexpr uint32_t kUnits = (1 << 12) - 1;
    static constexpr double kUnit = 4 * 3600.0;  // s
    struct alignas(64) Bucket {
        std::array<uint32_t, kBucket> places{};
    };

    static uint64_t mix(uint64_t key) {
        const uint64_t mixed = key * 0x9E3779B97F4A7C15u;
        return mixed ^ mixed >> 32;
    }
    static uint32_t tag_of(uint64_t key) { return static_cast<uint32_t>(mix(key) >> 52); }
    static uint32_t unit_of(double at) {
        return static_cast<uint32_t>(static_cast<int64_t>(std::floor(std::clamp(at / kUnit, -1e15, 1e15)))) & kUnits;
    }

    // Four bits of the power of two, from 1 at 32 on, and the next four below it; who asked has at least 64.
    static uint32_t code_of(Frequency frequency) {
        uint32_t power = 1, digits = frequency.value;
        for (; digits >= 64; digits /= 2) ++power;
        return power << 4 | (digits / 2 & 15);
    }
    static Frequency frequency_of(uint32_t code) {
        return {static_cast<uint16_t>((2 * (16 + (code & 15)) + 1) << ((code >> 4) - 1))};
    }

    Bucket& bucket(uint64_t key) { return buckets_[mix(key) & (buckets_.size() - 1)]; }

    std::vector<Bucket> buckets_;  // a power of two
};

}  // namespace mtserve
