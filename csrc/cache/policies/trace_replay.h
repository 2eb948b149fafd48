// A trace on one tier: users whose histories grow, and who lose their last pages first, only as many as are needed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "../policy.h"
#include "../xxh64.h"

namespace mtserve {

// All requests of a trace, in order of time; each is of a user below `known`.
struct Requests {
    const int32_t* users;
    const double* t_s;
    const int32_t* tokens;  // of the prefix that the request wants, and leaves behind
    int64_t count;
    int32_t known, page_tokens;

    int32_t pages(int64_t request) const { return (tokens[request] + page_tokens - 1) / page_tokens; }
    static uint64_t key(int32_t user) { return xxh64(&user, sizeof user, 0); }
};

// Slots are the users' numbers. As in the index a request counts before room is made for it, while its user is pinned.
class TraceReplay final : Policy::Evictable {
public:
    TraceReplay(Policy& policy, int64_t capacity_pages, const Requests& requests)
        : policy_(policy), requests_(requests), free_(capacity_pages), held_(requests.known) {}

    // Tokens that the request finds; they come in order.
    int32_t serve(int64_t request) {
        const double now = requests_.t_s[request];
        user_ = requests_.users[request];
        Held& held = held_[user_];
        const int32_t found = std::min(held.tokens, requests_.tokens[request]);
        const bool listed = held.pages > 0;
        if (listed) policy_.access(user_, now);
        const int32_t missing = std::max(0, requests_.pages(request) - held.pages);
        while (free_ < missing && take(missing - free_, now)) continue;
        const int32_t more = static_cast<int32_t>(std::min<int64_t>(free_, missing));
        free_ -= more;
        held.pages += more;
        held.tokens = std::min(requests_.tokens[request], held.pages * requests_.page_tokens);
        if (!listed && more > 0) policy_.insert(user_, {Requests::key(user_), held.pages}, now);
        else if (more > 0) policy_.resize(user_, held.pages);
        return found;
    }

private:
    struct Held {
        int32_t pages = 0, tokens = 0;
    };

    bool operator()(Slot slot) const override { return slot != static_cast<Slot>(user_); }

    bool take(int64_t wanted, double now) {
        const Slot slot = policy_.victim(*this, now);
        if (slot == kNoSlot) return false;
        Held& held = held_[slot];
        const int32_t pages = static_cast<int32_t>(std::min<int64_t>(wanted, held.pages));
        held.pages -= pages;
        held.tokens = std::min(held.tokens, held.pages * requests_.page_tokens);
        free_ += pages;
        if (held.pages == 0) policy_.remove(slot, true);
        else policy_.resize(slot, held.pages);
        return true;
    }

    Policy& policy_;
    const Requests& requests_;
    int64_t free_;  // pages
    int32_t user_ = -1;
    std::vector<Held> held_;  // by user
};

// Tokens that each request finds where the pages to keep are chosen knowing all requests, and a request need not leave its
// own behind: Belady's MIN with bypass. Pages are of one size, a request wants all of its user's, and those of one user
// are wanted at the same time, so that the last of them go first at no loss: no policy finds more pages.
inline void optimum(const Requests& requests, int64_t capacity_pages, int32_t* found) {
    constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
    std::vector<int64_t> next(requests.count), coming(requests.known, kNever);
    for (int64_t i = requests.count - 1; i >= 0; --i) next[i] = std::exchange(coming[requests.users[i]], i);
    std::vector<int32_t> held(requests.known, 0), tokens(requests.known, 0);  // pages, and tokens of the last request
    std::set<std::pair<int64_t, int32_t>> kept;                               // number of the next request, user
    int64_t pages = 0;
    for (int64_t i = 0; i < requests.count; ++i) {
        const int32_t user = requests.users[i];
        const int64_t whole = static_cast<int64_t>(held[user]) * requests.page_tokens;
        found[i] = static_cast<int32_t>(std::min<int64_t>({whole, tokens[user], requests.tokens[i]}));
        kept.erase({i, user});
        pages -= held[user];
        held[user] = next[i] == kNever ? 0 : requests.pages(i);
        tokens[user] = requests.tokens[i];
        if (held[user] > 0) kept.insert({next[i], user});
        for (pages += held[user]; pages > capacity_pages;) {
            const auto last = std::prev(kept.end());
            int32_t& its = held[last->second];
            const int32_t taken = static_cast<int32_t>(std::min<int64_t>(pages - capacity_pages, its));
            pages -= taken;
            its -= taken;
            if (its == 0) kept.erase(last);
        }
    }
}

}  // namespace mtserve
