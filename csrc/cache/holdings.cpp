// How entries gain and lose pages, and how the policies and counters learn of it.
#include <algorithm>

#include "counted.h"
#include "index.h"

namespace mtserve {

namespace {

template <typename Entries>
struct Takeable final : Policy::Evictable {
    Takeable(const Entries& entries, Tier tier) : entries(entries), tier(tier) {}
    bool operator()(Slot slot) const override { return !entries[slot]->busy() && !entries[slot]->on[tier].shielded; }
    const Entries& entries;
    const Tier tier;
};

}  // namespace

template <typename Kind>
typename BasicIndex<Kind>::Entry& BasicIndex<Kind>::create(UserView user) {
    auto made = std::make_unique<Entry>();
    Entry& entry = *made;
    entry.user = user;
    entry.key = table_.key(user);
    if (free_slots_.empty()) {
        entry.slot = static_cast<Slot>(entries_.size());
        entries_.push_back(std::move(made));
    } else {
        entry.slot = free_slots_.back();
        free_slots_.pop_back();
        entries_[entry.slot] = std::move(made);
    }
    table_.add(entry);
    const auto right = rights_.find(user);
    if (right != rights_.end()) {
        entry.right = right->second.get();
        entry.right->slot = entry.slot;
    }
    return entry;
}

template <typename Kind>
void BasicIndex<Kind>::erase(Entry& entry) {
    if (entry.right) entry.right->slot = kNoSlot;
    if (entry.live) table_.remove(entry);
    else --detached_;
    const Slot slot = entry.slot;
    entries_[slot].reset();
    free_slots_.push_back(slot);
}

// Grows the holding to `pages` pages, evicting others where needed; to fewer when no more can be had.
template <typename Kind>
void BasicIndex<Kind>::acquire(Entry& entry, Tier tier, int32_t pages, double now) {
    auto& held = entry.on[tier].pages;
    Allocator& allocator = tiers_[tier].allocator;
    const int64_t missing = static_cast<int64_t>(pages) - static_cast<int64_t>(held.size());
    if (missing > allocator.free()) evict(entry, tier, pages, now);
    allocator.take(missing, held);
    if (!entry.on[tier].listed) list(entry, tier, now);
    else if (missing > 0) resize(entry, tier);
}

template <typename Kind>
void BasicIndex<Kind>::evict(Entry& taker, Tier tier, int32_t pages, double now) {
    if (tier == kHost && taker.declined) return;
    const Takeable<decltype(entries_)> takeable(entries_, tier);
    int64_t shortfall = pages - static_cast<int64_t>(taker.on[tier].pages.size()) - tiers_[tier].allocator.free();
    while (shortfall > 0) {
        Slot slot = tiers_[tier].policy->victim(takeable, now);
        if (slot == kNoSlot) slot = last_resort(taker, tier);
        else if (!admits(taker, tier, pages, slot, now)) return;
        if (slot == kNoSlot) return;
        Entry& victim = *entries_[slot];
        const int32_t taken = static_cast<int32_t>(std::min<int64_t>(shortfall, victim.on[tier].pages.size()));
        evict_tail(victim, tier, taken, now);
        shortfall -= taken;
    }
}

// Asked of users whom the host does not have: the device cannot choose, and who is in grows.
template <typename Kind>
bool BasicIndex<Kind>::admits(Entry& taker, Tier tier, int32_t pages, Slot victim, double now) {
    Policy& policy = *tiers_[tier].policy;
    const Facts facts{taker.key, pages};
    if (tier == kGpu || taker.on[tier].listed || policy.admits(facts, victim, now)) return true;
    policy.decline(facts, now);
    taker.declined = true;
    ++declined_stores_;
    return false;
}

// GPU pages from `kept` on with tokens that the host does not have.
template <typename Kind>
int64_t BasicIndex<Kind>::unsaved(const Entry& entry, int64_t kept) const {
    const int32_t tokens = entry.on[kGpu].tokens, on_host = entry.on[kHost].tokens;
    const int64_t saved = on_host >= tokens ? pages_for(tokens) : on_host / page_tokens_;
    return std::max<int64_t>(0, pages_for(tokens) - std::max(kept, saved));
}

// What stays is still a prefix, so the user's next request saves what it covers.
template <typename Kind>
void BasicIndex<Kind>::evict_tail(Entry& victim, Tier tier, int32_t pages, double now) {
    Holding& holding = victim.on[tier];
    const int64_t kept = static_cast<int64_t>(holding.pages.size()) - pages;
    if (tier == kGpu) unsaved_pages_ += unsaved(victim, kept);
    set_tokens(victim, tier, static_cast<int32_t>(std::min<int64_t>(holding.tokens, kept * page_tokens_)));
    settle(victim, tier, true);
    fit_chain(victim);
    if (tier == kGpu && !victim.lost) victim.lost = now;
    tiers_[tier].evicted_pages += pages;
    tiers_[tier].evicted_users += kept == 0;
    if (victim.empty()) erase(victim);
}

// The user's states are wanted beyond what the GPU has kept of them.
template <typename Kind>
void BasicIndex<Kind>::note_return(Entry& entry, double now) {
    if (!entry.lost) return;
    returns_.push_back(std::max(0.0, now - *entry.lost));
    entry.lost.reset();
}

// A batch of the user begins: one request, however many steps brought its states before, and however many batches it is
// encoded in. Nor is a policy that declined the user asked again before the next request: each time is counted.
template <typename Kind>
void BasicIndex<Kind>::use(Entry& entry, bool again, double now) {
    for (Tier tier : kTiers) {
        Holding& holding = entry.on[tier];
        if (!holding.listed) continue;
        if (again || holding.fresh) tiers_[tier].policy->refresh(entry.slot, now);
        else tiers_[tier].policy->access(entry.slot, now);
        holding.fresh = false;
    }
    if (!again) entry.declined = false;
    use_pin(entry);
}

template <typename Kind>
void BasicIndex<Kind>::refresh(Entry& entry, double now) {
    for (Tier tier : kTiers)
        if (entry.on[tier].listed) tiers_[tier].policy->refresh(entry.slot, now);
}

template <typename Kind>
void BasicIndex<Kind>::list(Entry& entry, Tier tier, double now) {
    Holding& holding = entry.on[tier];
    if (!entry.live || holding.pages.empty()) return;
    tiers_[tier].policy->insert(entry.slot, {entry.key, static_cast<int32_t>(holding.pages.size())}, now);
    holding.listed = true;
    holding.fresh = tier == kGpu && entry.load;
    if (!entry.right) return;
    TierState& state = tiers_[tier];
    if (entry.right->turn != kNoTurn) state.window_end = std::max<size_t>(state.window_end, entry.right->turn + 1);
    if (entry.right->pinned) state.pins.use(entry.slot, static_cast<int32_t>(holding.pages.size()), shielder());
    shield(entry);
}

template <typename Kind>
void BasicIndex<Kind>::unlist(Entry& entry, Tier tier, bool evicted) {
    if (!entry.on[tier].listed) return;
    tiers_[tier].policy->remove(entry.slot, evicted);
    entry.on[tier].listed = entry.on[tier].shielded = false;
    tiers_[tier].pins.remove(entry.slot, shielder());
}

// Tells of a listed entry's pages.
template <typename Kind>
void BasicIndex<Kind>::resize(Entry& entry, Tier tier) {
    const int32_t pages = static_cast<int32_t>(entry.on[tier].pages.size());
    tiers_[tier].policy->resize(entry.slot, pages);
    if (tiers_[tier].pins.contains(entry.slot)) tiers_[tier].pins.resize(entry.slot, pages, shielder());
}

template <typename Kind>
void BasicIndex<Kind>::set_tokens(Entry& entry, Tier tier, int32_t tokens) {
    Holding& holding = entry.on[tier];
    tiers_[tier].used += pages_for(tokens) - pages_for(holding.tokens);
    tiers_[tier].users += (tokens > 0) - (holding.tokens > 0);
    holding.tokens = tokens;
}

template <typename Kind>
void BasicIndex<Kind>::fit_chain(Entry& entry) {
    entry.chain.fit(std::max(entry.on[kGpu].tokens, entry.on[kHost].tokens));
}

// Gives back the pages beyond the committed tokens. Only where no open ticket may use them.
template <typename Kind>
void BasicIndex<Kind>::settle(Entry& entry, Tier tier, bool evicted) {
    Holding& holding = entry.on[tier];
    const size_t kept = pages_for(holding.tokens);
    if (holding.pages.size() == kept) return;
    Pages::release_behind(holding.pages, kept, tiers_[tier].allocator);
    if (holding.pages.empty()) unlist(entry, tier, evicted);
    else if (holding.listed) resize(entry, tier);
}

// Call after closing a ticket (or detaching): the last one settles the entry.
template <typename Kind>
void BasicIndex<Kind>::ended(Entry& entry) {
    if (entry.busy()) return;
    for (Tier tier : kTiers) settle(entry, tier);
    if (entry.empty()) erase(entry);
    else shield(entry);
}

template class BasicIndex<Hashed>;
template class BasicIndex<Counted>;

}  // namespace mtserve
