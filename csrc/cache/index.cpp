// The index's questions and two-phase operations; see index.h for who owns what.
#include "index.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "counted.h"
#include "errors.h"

namespace mtserve {

namespace {

constexpr int64_t kMaxPageTokens = 1 << 16;
constexpr size_t kMaxBatch = 1 << 16;
constexpr const char* kCopyNames[] = {"load", "store"};

int32_t checked_page_tokens(int64_t page_tokens) {
    if (page_tokens < 1 || page_tokens > kMaxPageTokens)
        throw invalid_argument("page_tokens", std::to_string(page_tokens) + " is outside 1 to 65536");
    return static_cast<int32_t>(page_tokens);
}

std::string nth(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

Error not_open(const char* kind, Ticket ticket, Ticket next) {
    const char* why = ticket < next && ticket > 0 ? " (ended already, or of another kind)" : " (never issued)";
    return failed_precondition("ticket", std::to_string(ticket) + " is not an open " + kind + why);
}

}  // namespace

template <typename Kind>
BasicIndex<Kind>::BasicIndex(int64_t page_tokens, TierParts gpu, TierParts host, Users users)
    : page_tokens_(checked_page_tokens(page_tokens)),
      tiers_{TierState(std::move(gpu)), TierState(std::move(host))},
      table_(std::move(users)) {
    for (Tier tier : kTiers) fit_budget(tier);
}

template <typename Kind>
const typename BasicIndex<Kind>::Entry* BasicIndex<Kind>::find(UserView user) const {
    if (!table_.admits(user)) throw table_.refusal("user", user);
    return table_.find(user);
}

template <typename Kind>
typename BasicIndex<Kind>::Entry* BasicIndex<Kind>::find(UserView user) {
    return const_cast<Entry*>(std::as_const(*this).find(user));
}

template <typename Kind>
Match BasicIndex<Kind>::lookup(UserView user, View chain) const {
    const Presence found = presence(user, chain);
    return {found.gpu_tokens, found.host_tokens};
}

template <typename Kind>
Presence BasicIndex<Kind>::presence(UserView user, View chain) const {
    const Entry* entry = find(user);
    if (!entry) return {};
    const int32_t shared = common_prefix(entry->chain.view(), chain);
    const int32_t arriving = entry->load ? copies_[kGpu].at(entry->load).tokens : 0;
    return {std::min(entry->on[kGpu].tokens, shared), std::min(entry->on[kHost].tokens, shared), std::min(arriving, shared),
            entry->load != 0, entry->batch != 0};
}

// ---- batches

template <typename Kind>
Ticket BasicIndex<Kind>::begin_batch(const std::vector<BatchItem>& items, const BatchPlan& plan, double now) {
    const Ticket ticket = next_ticket_++;
    std::vector<Entry*> entries = admit(items, plan.width, ticket);
    Batch& batch = batches_[ticket];
    batch.members.reserve(items.size());
    // All are busy before any allocates, so that the batch's users do not evict each other.
    for (size_t row = 0; row < items.size(); ++row) {
        if (!entries[row]) entries[row] = &create(items[row].user);
        correct(*entries[row], items[row].chain);
        entries[row]->batch = ticket;
        shield(*entries[row]);
    }
    for (size_t row = 0; row < items.size(); ++row)
        plan_member(batch, *entries[row], items[row], plan, row, now);
    return ticket;
}

// Every refusal happens here, before anything changed. Returns each user's entry, null for users without one.
template <typename Kind>
std::vector<typename BasicIndex<Kind>::Entry*> BasicIndex<Kind>::admit(const std::vector<BatchItem>& items, int32_t width, Ticket ticket) {
    if (items.empty() || items.size() > kMaxBatch)
        throw invalid_argument("users", std::to_string(items.size()) + " users; a batch has 1 to 65536");
    std::vector<Entry*> entries;
    entries.reserve(items.size());
    std::unordered_set<UserView> strangers;
    for (size_t i = 0; i < items.size(); ++i) {
        const UserView user = items[i].user;
        if (!table_.admits(user)) throw table_.refusal(nth("users", i), user);
        if (pages_for(items[i].chain.size) > width)
            throw invalid_argument(nth("chains", i), std::to_string(items[i].chain.size) + " tokens do not fit a row of " +
                                                         std::to_string(width) + " pages of " + std::to_string(page_tokens_));
        Entry* entry = find(user);
        const bool repeated = entry ? entry->named == ticket : !strangers.insert(user).second;
        if (repeated) throw invalid_argument(nth("users", i), "is in the batch twice");
        if (entry && entry->batch) throw failed_precondition(nth("users", i), "is in a batch in flight");
        if (entry) entry->named = ticket;
        entries.push_back(entry);
    }
    return entries;
}

// A history that differs from the entry's chain was corrected upstream: what follows the common prefix is void.
template <typename Kind>
void BasicIndex<Kind>::correct(Entry& entry, View chain) {
    const int32_t shared = common_prefix(entry.chain.view(), chain);
    if (shared >= std::min(entry.chain.size(), chain.size)) return;
    ++corrections_;
    for (Tier tier : kTiers) set_tokens(entry, tier, std::min(entry.on[tier].tokens, shared));
    if (entry.on[kGpu].tokens == shared) entry.lost.reset();  // what was evicted is void: nobody will want it
    fit_chain(entry);
    for (Tier to : kTiers)
        if (const Ticket open = to == kGpu ? entry.load : entry.store) {
            Copy& copy = copies_[to].at(open);
            copy.tokens = std::min(copy.tokens, shared);
        }
    if (!entry.busy())
        for (Tier tier : kTiers) settle(entry, tier);
}

template <typename Kind>
void BasicIndex<Kind>::plan_member(Batch& batch, Entry& entry, const BatchItem& item, const BatchPlan& plan, size_t row,
                                   double now) {
    const View chain = item.chain;
    const int32_t wanted = pages_for(chain.size);
    use(entry, item.again, now);
    acquire(entry, kGpu, wanted, now);
    const auto& pages = entry.on[kGpu].pages;
    const int64_t room = static_cast<int64_t>(pages.size()) * page_tokens_;
    const int32_t stored = static_cast<int32_t>(std::min<int64_t>(room, chain.size));
    const int32_t present = std::max(entry.on[kGpu].tokens, entry.load ? copies_[kGpu].at(entry.load).tokens : 0);
    plan.cached[row] = std::min(present, chain.size);
    plan.stored[row] = stored;
    if (plan.cached[row] < chain.size) note_return(entry, now);
    Pages::write(pages, pages_for(stored), plan.page_table + row * static_cast<size_t>(plan.width), plan.width);
    batch.members.push_back({&entry, stored, entry.chain.keep(chain, stored, batch.tails), true});
}

template <typename Kind>
std::vector<typename BasicIndex<Kind>::User> BasicIndex<Kind>::end_batch(Ticket ticket, bool success) {
    const auto at = batches_.find(ticket);
    if (at == batches_.end()) throw not_open("batch", ticket, next_ticket_);
    if (success)
        for (const Member& member : at->second.members)
            if (member.entry->load) throw failed_precondition("ticket", "a load that the batch was begun over is still open");
    const Batch batch = std::move(at->second);
    batches_.erase(at);
    std::vector<User> spoiled;
    for (const Member& member : batch.members) {
        Entry& entry = *member.entry;
        if (success && member.good && entry.live) {
            entry.chain.append(batch.tails, member.tail);
            set_tokens(entry, kGpu, std::max(entry.on[kGpu].tokens, member.stored));
        }
        if (!member.good) spoiled.push_back(entry.user);
        entry.batch = 0;
        ended(entry);
    }
    return spoiled;
}

// ---- copies between the tiers

template <typename Kind>
typename BasicIndex<Kind>::CopyPlan BasicIndex<Kind>::begin_load(UserView user, View chain, double now) {
    Entry* entry = find(user);
    if (!entry || entry->busy()) return {};
    const int32_t target = std::min(entry->on[kHost].tokens, common_prefix(entry->chain.view(), chain));
    // With room for what the user's next batch adds: taken then, it would lie elsewhere.
    CopyPlan plan = begin_copy(*entry, kGpu, target, pages_for(chain.size), now);
    if (!plan.ticket) return plan;
    note_return(*entry, now);
    refresh(*entry, now);
    return plan;
}

template <typename Kind>
void BasicIndex<Kind>::grow_host(int64_t pages) {
    tiers_[kHost].allocator.grow(pages);
    tiers_[kHost].policy->grow(pages);
    fit_budget(kHost);
}

template <typename Kind>
typename BasicIndex<Kind>::CopyPlan BasicIndex<Kind>::begin_store(UserView user, bool tail, double now) {
    Entry* entry = find(user);
    if (!entry || entry->load || entry->store) return {};
    const int32_t tokens = entry->on[kGpu].tokens;
    return begin_copy(*entry, kHost, tail ? tokens : tokens / page_tokens_ * page_tokens_, 0, now);
}

template <typename Kind>
int32_t BasicIndex<Kind>::unsaved_tokens(UserView user) const {
    const Entry* entry = find(user);
    return entry ? std::max(0, entry->on[kGpu].tokens - entry->on[kHost].tokens) : 0;
}

// Plans the copy of tokens [what `to` has, target) into `to`, shortened to the room that can be had.
template <typename Kind>
typename BasicIndex<Kind>::CopyPlan BasicIndex<Kind>::begin_copy(Entry& entry, Tier to, int32_t target, int32_t wanted, double now) {
    const int32_t present = entry.on[to].tokens;
    if (target <= present) return {};
    Ticket& pin = to == kGpu ? entry.load : entry.store;
    pin = next_ticket_++;
    shield(entry);
    acquire(entry, to, std::max(pages_for(target), wanted), now);
    const int64_t room = static_cast<int64_t>(entry.on[to].pages.size()) * page_tokens_;
    target = static_cast<int32_t>(std::min<int64_t>(target, room));
    if (target <= present) {  // not a single page to be had, so none was evicted either
        pin = 0;
        shield(entry);
        return {};
    }
    copies_[to][pin] = {&entry, target};
    const int32_t first = present / page_tokens_, last = pages_for(target);
    return {pin, present, target, Pages::cut(entry.on[kGpu].pages, first, last), Pages::cut(entry.on[kHost].pages, first, last)};
}

template <typename Kind>
void BasicIndex<Kind>::end_load(Ticket ticket, bool success) { end_copy(kGpu, ticket, success); }
template <typename Kind>
void BasicIndex<Kind>::end_store(Ticket ticket, bool success) { end_copy(kHost, ticket, success); }

template <typename Kind>
void BasicIndex<Kind>::end_copy(Tier to, Ticket ticket, bool success) {
    const auto at = copies_[to].find(ticket);
    if (at == copies_[to].end()) throw not_open(kCopyNames[to], ticket, next_ticket_);
    const Copy copy = at->second;
    copies_[to].erase(at);
    Entry& entry = *copy.entry;
    (to == kGpu ? entry.load : entry.store) = 0;
    if (success && entry.live) set_tokens(entry, to, std::max(entry.on[to].tokens, copy.tokens));
    if (!success && to == kGpu && entry.batch)
        for (Member& member : batches_.at(entry.batch).members)
            if (member.entry == &entry) member.good = false;
    ended(entry);
}

// ---- invalidation

template <typename Kind>
bool BasicIndex<Kind>::invalidate(UserView user) {
    Entry* entry = find(user);
    if (!entry) return false;
    ++invalidated_;
    for (Tier tier : kTiers) {
        set_tokens(*entry, tier, 0);
        unlist(*entry, tier, false);
    }
    fit_chain(*entry);
    if (entry->right) entry->right->slot = kNoSlot;
    entry->right = nullptr;
    table_.remove(*entry);
    entry->live = false;
    ++detached_;
    ended(*entry);
    return true;
}

template <typename Kind>
int64_t BasicIndex<Kind>::invalidate_all() {
    const auto entries = live_entries();
    for (const Entry* entry : entries) invalidate(entry->user);
    return static_cast<int64_t>(entries.size());
}

template class BasicIndex<Hashed>;
template class BasicIndex<Counted>;

}  // namespace mtserve
