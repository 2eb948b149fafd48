// Statistics, the walk over every invariant, and the means to break one on purpose.
#include <algorithm>

#include "counted.h"
#include "errors.h"
#include "index.h"

namespace mtserve {

namespace {

void require(bool holds, const char* where, const std::string& broken) {
    if (!holds) throw corrupt_state(where, broken);
}

}  // namespace

template <typename Kind>
std::vector<const typename BasicIndex<Kind>::Entry*> BasicIndex<Kind>::live_entries() const {
    std::vector<const Entry*> live;
    live.reserve(table_.size());
    for (const auto& entry : entries_)
        if (entry && entry->live) live.push_back(entry.get());
    return live;
}

template <typename Kind>
IndexStats BasicIndex<Kind>::stats() const {
    IndexStats stats;
    for (Tier tier : kTiers) {
        const TierState& from = tiers_[tier];
        TierStats& to = stats.tier[tier];
        to.total = from.allocator.total();
        to.free = from.allocator.free();
        to.used = static_cast<int32_t>(from.used);
        to.in_flight = to.total - to.free - to.used;
        to.users = from.users;
        to.evicted_pages = from.evicted_pages;
        to.evicted_users = from.evicted_users;
        to.pinned_users = static_cast<int64_t>(from.pins.covered_users());
        to.pinned_pages = from.pins.covered_pages();
    }
    stats.users = static_cast<int64_t>(table_.size());
    stats.detached = detached_;
    stats.batches_in_flight = static_cast<int64_t>(batches_.size());
    stats.loads_in_flight = static_cast<int64_t>(copies_[kGpu].size());
    stats.stores_in_flight = static_cast<int64_t>(copies_[kHost].size());
    stats.corrections = corrections_;
    stats.invalidated = invalidated_;
    stats.unsaved_pages = unsaved_pages_;
    stats.pinned = pins_;
    stats.declined_stores = declined_stores_;
    return stats;
}

template <typename Kind>
void BasicIndex<Kind>::check() const {
    std::array<Census, 2> owned = {Census(tiers_[kGpu].allocator), Census(tiers_[kHost].allocator)};
    size_t live = 0, occupied = 0;
    for (Slot slot = 0; slot < entries_.size(); ++slot) {
        if (!entries_[slot]) continue;
        require(entries_[slot]->slot == slot, "slots", "entry in another entry's slot" + of(*entries_[slot]));
        check_entry(*entries_[slot], owned);
        ++occupied;
        live += entries_[slot]->live;
    }
    require(live == table_.size(), "table", std::to_string(table_.size()) + " users listed, " + std::to_string(live) + " live");
    require(occupied - live == static_cast<size_t>(detached_), "detached", "counter disagrees with the entries");
    require(occupied + free_slots_.size() == entries_.size(), "slots", "free slots do not sum with the occupied ones");
    for (Tier tier : kTiers) check_tier(tier, owned[tier]);
    check_tickets();
    check_rights();
}

template <typename Kind>
void BasicIndex<Kind>::check_entry(const Entry& entry, std::array<Census, 2>& owned) const {
    require((table_.find(entry.user) == &entry) == entry.live, "table", "live and findable disagree" + of(entry));
    require(!(entry.load && entry.store), "tickets", "a load shares its user with a store" + of(entry));
    require(entry.busy() || (entry.live && !entry.empty()), "entries", "should have vanished" + of(entry));
    const int32_t longest = std::max(entry.on[kGpu].tokens, entry.on[kHost].tokens);
    require(entry.chain.size() == longest, "chain", std::to_string(entry.chain.size()) + " long for " + std::to_string(longest) +
                                                        " tokens" + of(entry));
    for (Tier tier : kTiers) {
        const Holding& holding = entry.on[tier];
        const size_t committed = pages_for(holding.tokens);
        require(entry.live || holding.tokens == 0, kTierNames[tier], "a detached entry has tokens" + of(entry));
        require(entry.busy() ? holding.pages.size() >= committed : holding.pages.size() == committed, kTierNames[tier],
                std::to_string(holding.pages.size()) + " pages for " + std::to_string(holding.tokens) + " tokens" + of(entry));
        const bool should_list = entry.live && !holding.pages.empty();
        require(holding.listed == should_list && tiers_[tier].policy->contains(entry.slot) == should_list, "policy",
                std::string(kTierNames[tier]) + " policy lists the wrong entries" + of(entry));
        require(holding.shielded == privileged(entry, tier), kTierNames[tier],
                "held without a right to it, or not held with one" + of(entry));
        const std::string broken = owned[tier].add(holding.pages);
        require(broken.empty(), kTierNames[tier], broken + of(entry));
    }
}

template <typename Kind>
void BasicIndex<Kind>::check_tier(Tier tier, const Census& owned) const {
    const TierState& state = tiers_[tier];
    const char* name = kTierNames[tier];
    state.allocator.check();
    state.policy->check();
    int64_t used = 0, users = 0, listed = 0, listed_pages = 0;
    for (const auto& entry : entries_) {
        if (!entry) continue;
        used += pages_for(entry->on[tier].tokens);
        users += entry->on[tier].tokens > 0;
        listed += entry->on[tier].listed;
        if (entry->on[tier].listed) listed_pages += static_cast<int64_t>(entry->on[tier].pages.size());
    }
    const int64_t held = owned.held();
    require(held + state.allocator.free() == state.allocator.total(), name,
            std::to_string(state.allocator.free()) + " free + " + std::to_string(held) + " held is not the total of " +
                std::to_string(state.allocator.total()) + " pages");
    require(used == state.used, name, "counter of used pages disagrees with the entries");
    require(users == state.users, name, "counter of users disagrees with the entries");
    require(static_cast<size_t>(listed) == state.policy->size(), "policy", std::string(name) + " policy lists strangers");
    require(listed_pages == state.policy->pages(), "policy",
            std::string(name) + " policy knows of " + std::to_string(state.policy->pages()) + " pages, not " + std::to_string(listed_pages));
}

template <typename Kind>
void BasicIndex<Kind>::check_tickets() const {
    size_t pins[3] = {0, 0, 0}, members = 0;
    for (const auto& entry : entries_) {
        if (!entry) continue;
        pins[0] += entry->batch != 0;
        pins[1] += entry->load != 0;
        pins[2] += entry->store != 0;
    }
    for (const auto& [ticket, batch] : batches_) {
        members += batch.members.size();
        for (const Member& member : batch.members) {
            const Holding& gpu = member.entry->on[kGpu];
            require(member.entry->batch == ticket, "tickets", "a batch's user is not pinned by it" + of(*member.entry));
            require(gpu.pages.size() >= static_cast<size_t>(pages_for(member.stored)), "tickets",
                    "a batch lost a page it writes" + of(*member.entry));
        }
    }
    for (Tier to : kTiers)
        for (const auto& [ticket, copy] : copies_[to]) {
            const Entry& entry = *copy.entry;
            require((to == kGpu ? entry.load : entry.store) == ticket, "tickets", "a copy's user is not pinned by it" + of(entry));
            require(!entry.live || copy.tokens <= entry.on[1 - to].tokens, "tickets", "a copy reads past its source" + of(entry));
            require(entry.on[to].pages.size() >= static_cast<size_t>(pages_for(copy.tokens)), "tickets",
                    "a copy lost a page it writes" + of(entry));
        }
    require(members == pins[0] && copies_[kGpu].size() == pins[1] && copies_[kHost].size() == pins[2], "tickets",
            "pins do not match the open tickets");
}

template <typename Kind>
void BasicIndex<Kind>::check_rights() const {
    size_t tied = 0, turns = 0;
    int64_t pinned = 0, listed[2] = {0, 0};
    for (const auto& [user, right] : rights_) {
        const Entry* entry = table_.find(user);
        const std::string whose = " (user '" + Users::text(right->user) + "')";
        require(right->pinned || right->turn != kNoTurn, "rights", "a right to nothing" + whose);
        require(right->slot == (entry ? entry->slot : kNoSlot) && (!entry || entry->right == right.get()), "rights",
                "a right is not tied to its user's entry" + whose);
        pinned += right->pinned;
        turns += right->turn != kNoTurn;
        tied += entry != nullptr;
        for (Tier tier : kTiers) listed[tier] += entry && check_right(*entry, tier);
    }
    for (size_t turn = 0; turn < window_.size(); ++turn)
        require(window_[turn]->turn == static_cast<int32_t>(turn), "window", "turns are out of order");
    size_t with_right = 0;
    for (const auto& entry : entries_) with_right += entry && entry->right;
    require(with_right == tied && turns == window_.size() && pinned == pins_, "rights", "counters disagree with the rights");
    for (Tier tier : kTiers) {
        tiers_[tier].pins.check();
        require(static_cast<size_t>(listed[tier]) == tiers_[tier].pins.size(), "pins", "strangers are pinned");
    }
}

// Says whether the user's pages in the tier are pinned.
template <typename Kind>
bool BasicIndex<Kind>::check_right(const Entry& entry, Tier tier) const {
    const TierState& state = tiers_[tier];
    const Holding& holding = entry.on[tier];
    if (!holding.listed) return false;
    require(entry.right->turn == kNoTurn || static_cast<size_t>(entry.right->turn) < state.window_end, "window",
            "has pages beyond where they are looked for" + of(entry));
    if (!entry.right->pinned) return false;
    const bool counted = state.pins.contains(entry.slot) &&
                         static_cast<size_t>(state.pins.pin(entry.slot).pages) == holding.pages.size();
    require(counted, "pins", "the pages of a pinned user are not those counted" + of(entry));
    return true;
}

template <>
void Index::sabotage(const std::string& what) {
    const auto live = live_entries();
    if (live.empty() || live.front()->on[kGpu].pages.empty())
        throw invalid_argument("what", "sabotage needs a first user with GPU pages");
    Entry& entry = *entries_[live.front()->slot];
    Holding& gpu = entry.on[kGpu];
    std::vector<int32_t> leaked;
    if (what == "leaked page") tiers_[kGpu].allocator.take(1, leaked);
    else if (what == "shared page") gpu.pages.back() = gpu.pages.front();
    else if (what == "freed page") tiers_[kGpu].allocator.release(gpu.pages.back());
    else if (what == "foreign page") gpu.pages.back() = tiers_[kGpu].allocator.total();
    else if (what == "long tokens") set_tokens(entry, kGpu, gpu.tokens + page_tokens_);
    else if (what == "short chain") entry.chain.fit(entry.chain.size() - 1);
    else if (what == "unlisted") tiers_[kGpu].policy->remove(entry.slot, false);
    else if (what == "used counter") ++tiers_[kGpu].used;
    else if (what == "stray pin") entry.store = next_ticket_++;
    else if (what == "unfindable") table_.remove(entry);
    else if (what == "lost shield") gpu.shielded = !gpu.shielded;
    else if (what == "forgotten right") entry.right->slot = kNoSlot;
    else if (what == "forgotten pin") tiers_[kGpu].pins.remove(entry.slot, shielder());
    else if (what == "pinned pages") tiers_[kGpu].pins.resize(entry.slot, pages_for(gpu.tokens) + 1, shielder());
    else if (what == "pin counter") ++pins_;
    else if (what == "window end") tiers_[kGpu].window_end = 0;
    else if (what == "broken turns") std::swap(window_.front()->turn, window_.back()->turn);
    else throw invalid_argument("what", "'" + what + "' is not a known sabotage");
}

template class BasicIndex<Hashed>;
template class BasicIndex<Counted>;

}  // namespace mtserve
