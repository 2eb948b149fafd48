// How long ago a user asked last, in bins, and what a page of such a user is worth.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

namespace mtserve {

// Age 0 is the first second; the others begin at 1, 1.5, 2, 3, 4, 6, 8 ... s, up to the open last one at 24 days.
struct Ages {
    static constexpr int kCount = 44;
    // Where in the ages so much idle time is: its age, and the share of it that is over.
    static double place(double idle_s) {
        if (!(idle_s >= 1)) return std::max(0.0, idle_s);
        int exponent = 0;
        const double part = std::frexp(idle_s, &exponent);
        return 2 * exponent - 3 + 4 * part;
    }
    static double begin(int age) { return age == 0 ? 0 : std::ldexp(age % 2 ? 1.0 : 1.5, (age - 1) / 2); }
    // Of the open one: as long again as all before it.
    static double seconds(int age) { return age + 1 < kCount ? begin(age + 1) - begin(age) : begin(age); }
};

using Returns = std::array<double, Ages::kCount>;    // share of those who reach the age that return during it
using Densities = std::array<double, Ages::kCount>;  // logarithm of a page's hits a second, from the age on

// The most hits a second that a page can bring if it is kept from the start of an age for as long as is best: the
// largest, over the ends of the stay, of P(return until the end) / E[seconds until return or end]. It is the index by
// which a bandit's arms are ranked (Gittins, "Bandit Processes and Dynamic Allocation Indices", 1979); LHD's hit density
// (Beckmann, Chen and Cidon, NSDI 2018) is the same quotient up to the age at which the cache happens to evict. Where
// returns only get rarer with age it is their rate; before a rise, as in the morning, it is more.
//
// From the last age back: a stay goes on into the next one as long as that one is denser.
inline Densities densities(const Returns& returns) {
    constexpr double kNever = 1e-12;  // hits a second: once in 30,000 years
    struct Stay {
        double hits, seconds, left;  // of a user at its start
        double density() const { return hits / seconds; }
    };
    std::array<Stay, Ages::kCount> later;
    int stays = 0;
    Densities out;
    for (int age = Ages::kCount - 1; age >= 0; --age) {
        const double share = returns[age];
        Stay stay{share, Ages::seconds(age) * (1 - share / 2), 1 - share};
        for (; stays > 0 && later[stays - 1].density() > stay.density(); --stays) {
            const Stay& next = later[stays - 1];
            stay = {stay.hits + stay.left * next.hits, stay.seconds + stay.left * next.seconds, stay.left * next.left};
        }
        out[age] = std::log(std::max(kNever, stay.density()));
        later[stays++] = stay;
    }
    return out;
}

// At a place in the ages: between the middles of two of them the logarithm is taken to change evenly, so that steps put
// nobody before who came later.
inline double density_at(const Densities& densities, double place) {
    const double from_middle = std::clamp(place - 0.5, 0.0, Ages::kCount - 1.0);
    const int age = std::min(static_cast<int>(from_middle), Ages::kCount - 2);
    return densities[age] + (from_middle - age) * (densities[age + 1] - densities[age]);
}

}  // namespace mtserve
