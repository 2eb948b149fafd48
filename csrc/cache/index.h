// Which tokens of which user have valid states in which tier. Ids and states, never bytes.
//
// Each tier holds a true prefix [0, tokens) of the user's token sequence: page i of `pages` covers
// tokens [i * page_tokens, (i + 1) * page_tokens). Work on bytes happens outside, between a begin_*
// and its end_*; whatever a begin_* allocated is unfindable until its end_* succeeds.
//
// Who owns what while a ticket of the user is open (P: what the user's entry holds as committed prefix):
//
//   open ticket | reads                     | writes                          | meanwhile allowed
//   batch       | GPU P, a load's target    | GPU tokens [cached, stored)     | store
//   load        | host P                    | GPU tokens [gpu P, target)      | batch begun after it
//   store       | GPU [host P, gpu P)       | host tokens [host P, target)    | batch
//
//   - An entry with an open ticket is busy: eviction passes it by in both tiers.
//   - Privileged are users whose turn is near, and pinned users as far as the tier's budget for them goes. Eviction takes
//     from them when nobody else is left, and then for loads and batches alone, in the order of `last_resort`.
//   - Committed pages are "used". Pages held beyond ceil(tokens / page_tokens) are "in flight"; they go
//     back when the entry's last ticket ends, so no open job ever sees a page of its own reassigned.
//   - A load or store overwrites the destination's half-filled tail page from its twin in the other tier.
//     The tokens already valid there get the same states again, and nobody else reads that page: no load
//     begins beside a batch or a store, and a store excludes loads, the only readers of host pages.
//   - batch + load: a batch may begin over a load in flight and counts its target as cached; whoever runs
//     the batch lets it wait for the load's bytes before it reads or writes those pages. The load ends first.
//     Where it fails, the batch publishes nothing of that user.
//   - batch + store: the batch writes GPU tokens at and beyond the committed prefix, the store publishes
//     only tokens below it; a tail page copied while the batch fills it is copied again by the next store.
//   - A correction (begin_batch with a chain that differs at token L) during a copy: the batch rewrites
//     GPU tokens from L on, perhaps under a store's reads, so the copy's target falls to at most L.
//   - invalidate: the entry leaves the table at once with nothing committed ("detached"); its tickets still
//     hold its pages, publish nothing, and the last end_* frees them. A new entry of the user is independent.
//
// Single-threaded: one loop owns the index.
//
// A template over what users, histories and pages are: what the engine's are (hashed.h), or only numbers of them
// (counted.h), for a simulator that decides exactly as the engine does and holds no bytes.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "hashed.h"
#include "pin_order.h"
#include "policy.h"

namespace mtserve {

using Ticket = uint64_t;
enum Tier { kGpu = 0, kHost = 1 };
constexpr std::array<Tier, 2> kTiers = {kGpu, kHost};
constexpr const char* kTierNames[] = {"gpu", "host"};

struct Match {
    int32_t gpu_tokens = 0, host_tokens = 0;
};

// A match and what may change it: the user's open tickets that a reader of the device's states waits for.
struct Presence {
    int32_t gpu_tokens = 0, host_tokens = 0;
    int32_t arriving_tokens = 0;  // on the GPU once the load in flight has succeeded; 0 without one
    bool loading = false, in_batch = false;
};

// Where begin_batch writes its plan: cached [B], stored [B], page_table [B, width] where pages have ids.
struct BatchPlan {
    int32_t* cached;
    int32_t* stored;
    int32_t* page_table;
    int32_t width;
};

struct TierStats {
    int32_t total = 0, free = 0, used = 0, in_flight = 0;
    int64_t users = 0, evicted_pages = 0, evicted_users = 0;
    int64_t pinned_users = 0, pinned_pages = 0;  // that the budget covers
};

struct IndexStats {
    TierStats tier[2];
    int64_t users = 0, detached = 0, batches_in_flight = 0, loads_in_flight = 0, stores_in_flight = 0;
    int64_t corrections = 0, invalidated = 0, unsaved_pages = 0;
    int64_t pinned = 0, declined_stores = 0;
};

// `Kind`: Hashed or Counted.
template <typename Kind>
class BasicIndex {
public:
    using UserView = typename Kind::UserView;
    using User = typename Kind::User;
    using Chain = typename Kind::Chain;
    using View = typename Chain::View;
    using Pages = typename Kind::Pages;
    using PageList = typename Pages::List;
    using Allocator = typename Pages::Allocator;

    struct Holding {
        PageList pages;
        int32_t tokens = 0;
        bool listed = false;    // known to the tier's policy
        bool fresh = false;     // listed by a load: that counts the next batch, too
        bool shielded = false;  // the policy holds it: it is privileged, and nothing else keeps it
    };

    // What sets a user apart, whether it has states or not.
    struct Right {
        User user;
        Slot slot = kNoSlot;     // of its live entry
        int32_t turn = kNoTurn;  // in the window
        bool pinned = false;
    };

    struct Entry {
        User user;
        uint64_t key = 0;
        Slot slot = kNoSlot;
        bool live = true;                       // false: detached by invalidate
        Ticket batch = 0, load = 0, store = 0;  // open tickets, 0 for none
        Ticket named = 0;                       // last begin_batch that listed the user
        Chain chain;                            // as long as the longer tier's prefix
        Holding on[2];
        std::optional<double> lost;             // when GPU pages were first evicted, until they are wanted again
        Right* right = nullptr;                 // null for most; of live entries alone
        bool declined = false;                  // the host's policy did not let it in, and it was not used since

        bool busy() const { return batch || load || store; }
        bool empty() const { return on[kGpu].pages.empty() && on[kHost].pages.empty(); }
    };
    using Users = typename Kind::template Users<Entry>;

    struct BatchItem {
        UserView user;
        View chain;
        bool again = false;  // goes on with a request that an earlier batch began: no other use of the user
    };

    // One load or store: pages i of both lists are twins, from page first_token / page_tokens on.
    struct CopyPlan {
        Ticket ticket = 0;  // 0: nothing to do
        int32_t first_token = 0, tokens = 0;
        PageList gpu_pages, host_pages;
    };

    // What one tier starts with.
    struct TierParts {
        Allocator pages;
        std::unique_ptr<Policy> policy;
        double pin_budget = 0.1;  // share of the pages that pinned users may keep from others, 0 to 0.5
    };

    BasicIndex(int64_t page_tokens, TierParts gpu, TierParts host, Users users = Users());

    Match lookup(UserView user, View chain) const;
    Presence presence(UserView user, View chain) const;
    const Entry* find(UserView user) const;

    Ticket begin_batch(const std::vector<BatchItem>& items, const BatchPlan& plan, double now);
    // Returns the users of whom nothing was published because a load that the batch was begun over had failed.
    std::vector<User> end_batch(Ticket ticket, bool success);
    CopyPlan begin_load(UserView user, View chain, double now);
    void end_load(Ticket ticket, bool success);
    CopyPlan begin_store(UserView user, bool tail, double now);  // without `tail` full pages only
    int32_t unsaved_tokens(UserView user) const;  // on the GPU and not on the host
    void grow_host(int64_t pages);
    void end_store(Ticket ticket, bool success);

    // The users whose turn is near, the next one first, in place of those of the last call.
    void set_window(const std::vector<UserView>& users);
    // Pinned again, a user is the latest. Both return how many users changed; pins outlive the users' states.
    int64_t pin_users(const std::vector<UserView>& users);
    int64_t unpin_users(const std::vector<UserView>& users);
    bool invalidate(UserView user);
    int64_t invalidate_all();

    std::vector<const Entry*> live_entries() const;
    Allocator& allocator(Tier tier) { return tiers_[tier].allocator; }
    // Seconds from an eviction of GPU pages to the batch or load that wanted them again, for each since the last call.
    // Of users who lost everything in both tiers nothing is known.
    std::vector<double> drain_returns() { return std::exchange(returns_, {}); }
    IndexStats stats() const;
    int32_t page_tokens() const { return page_tokens_; }

    // Walks everything; throws CorruptState naming the first broken invariant.
    void check() const;
    // Breaks one invariant on purpose, so that tests can see check() find it.
    void sabotage(const std::string& what);

private:
    struct TierState {
        explicit TierState(TierParts parts)
            : allocator(std::move(parts.pages)), policy(std::move(parts.policy)), pin_budget(parts.pin_budget) {}
        Allocator allocator;
        std::unique_ptr<Policy> policy;
        int64_t used = 0;   // committed pages
        int64_t users = 0;  // live entries with committed tokens
        int64_t evicted_pages = 0, evicted_users = 0;
        double pin_budget;
        PinOrder pins;
        size_t window_end = 0;  // none of the window's users from here on has pages
    };
    struct Member {
        Entry* entry;
        int32_t stored;
        typename Chain::Tail tail;  // what success appends to the chain, in Batch::tails
        bool good;                  // false once a load that it was begun over has failed
    };
    struct Batch {
        std::vector<Member> members;
        typename Chain::Tails tails;
    };
    struct Copy {
        Entry* entry;
        int32_t tokens;  // prefix after success; corrections lower a store's
    };
    using Copies = std::unordered_map<Ticket, Copy>;
    static constexpr int32_t kNoTurn = -1;

    int32_t pages_for(int64_t tokens) const { return static_cast<int32_t>((tokens + page_tokens_ - 1) / page_tokens_); }
    Entry* find(UserView user);
    Entry& create(UserView user);
    void erase(Entry& entry);

    std::vector<Entry*> admit(const std::vector<BatchItem>& items, int32_t width, Ticket ticket);
    void correct(Entry& entry, View chain);
    void plan_member(Batch& batch, Entry& entry, const BatchItem& item, const BatchPlan& plan, size_t row, double now);
    // `wanted`: pages to have, where more than the copy fills.
    CopyPlan begin_copy(Entry& entry, Tier to, int32_t target, int32_t wanted, double now);
    void end_copy(Tier to, Ticket ticket, bool success);

    void acquire(Entry& entry, Tier tier, int32_t pages, double now);
    void evict(Entry& taker, Tier tier, int32_t pages, double now);
    bool admits(Entry& taker, Tier tier, int32_t pages, Slot victim, double now);
    Slot last_resort(const Entry& taker, Tier tier);
    void evict_tail(Entry& victim, Tier tier, int32_t pages, double now);
    int64_t unsaved(const Entry& entry, int64_t kept) const;
    void note_return(Entry& entry, double now);
    void use(Entry& entry, bool again, double now);
    void refresh(Entry& entry, double now);
    void list(Entry& entry, Tier tier, double now);
    void unlist(Entry& entry, Tier tier, bool evicted);
    void resize(Entry& entry, Tier tier);
    void set_tokens(Entry& entry, Tier tier, int32_t tokens);
    void fit_chain(Entry& entry);
    void settle(Entry& entry, Tier tier, bool evicted = false);
    void ended(Entry& entry);

    Right& right_of(UserView user);
    void drop_if_void(Right& right);
    void check_users(const std::vector<UserView>& users) const;
    void fit_budget(Tier tier);
    void use_pin(Entry& entry);
    bool privileged(const Entry& entry, Tier tier) const;
    void shield(Entry& entry);
    auto shielder() {
        return [this](Slot slot, bool) { shield(*entries_[slot]); };
    }

    using Census = typename Pages::Census;
    void check_entry(const Entry& entry, std::array<Census, 2>& owned) const;
    void check_tier(Tier tier, const Census& owned) const;
    static std::string of(const Entry& entry) { return " (user '" + Users::text(entry.user) + "')"; }
    void check_tickets() const;
    void check_rights() const;
    bool check_right(const Entry& entry, Tier tier) const;

    int32_t page_tokens_;
    TierState tiers_[2];
    std::vector<std::unique_ptr<Entry>> entries_;  // by slot
    std::vector<Slot> free_slots_;
    Users table_;  // live entries only
    Ticket next_ticket_ = 1;
    std::unordered_map<Ticket, Batch> batches_;
    Copies copies_[2];  // by destination: loads to kGpu, stores to kHost
    std::vector<double> returns_;
    std::unordered_map<UserView, std::unique_ptr<Right>> rights_;  // keys point into the rights
    std::vector<Right*> window_;                                    // by turn
    int64_t detached_ = 0, corrections_ = 0, invalidated_ = 0, pins_ = 0, declined_stores_ = 0;
    int64_t unsaved_pages_ = 0;  // evicted from the GPU with tokens that the host did not have
};

using Index = BasicIndex<Hashed>;

}  // namespace mtserve
