// Users whose states eviction passes by as long as others can make room: those whose turn is near, and those pinned.
#include <algorithm>

#include "counted.h"
#include "errors.h"
#include "index.h"

namespace mtserve {

namespace {

constexpr size_t kMaxPins = 1 << 20;

}  // namespace

template <typename Kind>
typename BasicIndex<Kind>::Right& BasicIndex<Kind>::right_of(UserView user) {
    const auto known = rights_.find(user);
    if (known != rights_.end()) return *known->second;
    auto made = std::make_unique<Right>();
    Right& right = *made;
    right.user = user;
    if (Entry* entry = table_.find(user)) {
        right.slot = entry->slot;
        entry->right = &right;
    }
    return *(rights_[UserView(right.user)] = std::move(made));
}

template <typename Kind>
void BasicIndex<Kind>::drop_if_void(Right& right) {
    if (right.pinned || right.turn != kNoTurn) return;
    if (right.slot != kNoSlot) entries_[right.slot]->right = nullptr;
    rights_.erase(rights_.find(right.user));
}

template <typename Kind>
void BasicIndex<Kind>::check_users(const std::vector<UserView>& users) const {
    for (size_t i = 0; i < users.size(); ++i)
        if (!table_.admits(users[i])) throw table_.refusal("users[" + std::to_string(i) + "]", users[i]);
}

template <typename Kind>
void BasicIndex<Kind>::set_window(const std::vector<UserView>& users) {
    check_users(users);
    const std::vector<Right*> before = std::move(window_);
    window_.clear();
    for (Right* right : before) right->turn = kNoTurn;
    for (const UserView user : users) {
        Right& right = right_of(user);
        if (right.turn != kNoTurn) continue;
        right.turn = static_cast<int32_t>(window_.size());
        window_.push_back(&right);
    }
    for (TierState& state : tiers_) state.window_end = window_.size();
    const auto shield_all = [this](const std::vector<Right*>& rights) {
        for (const Right* right : rights)
            if (right->slot != kNoSlot) shield(*entries_[right->slot]);
    };
    shield_all(before);
    shield_all(window_);
    for (Right* right : before) drop_if_void(*right);
}

template <typename Kind>
int64_t BasicIndex<Kind>::pin_users(const std::vector<UserView>& users) {
    check_users(users);
    const size_t more = std::count_if(users.begin(), users.end(), [this](UserView user) {
        const auto known = rights_.find(user);
        return known == rights_.end() || !known->second->pinned;
    });
    if (static_cast<size_t>(pins_) + more > kMaxPins)
        throw resource_exhausted("users", std::to_string(pins_) + " are pinned; " + std::to_string(more) +
                                              " more would be above " + std::to_string(kMaxPins));
    const int64_t before = pins_;
    for (const UserView user : users) {
        Right& right = right_of(user);
        pins_ += !right.pinned;
        right.pinned = true;
        if (right.slot != kNoSlot) use_pin(*entries_[right.slot]);
    }
    return pins_ - before;
}

template <typename Kind>
int64_t BasicIndex<Kind>::unpin_users(const std::vector<UserView>& users) {
    check_users(users);
    const int64_t before = pins_;
    for (const UserView user : users) {
        const auto known = rights_.find(user);
        if (known == rights_.end() || !known->second->pinned) continue;
        Right& right = *known->second;
        right.pinned = false;
        --pins_;
        if (right.slot != kNoSlot) {
            for (Tier tier : kTiers) tiers_[tier].pins.remove(right.slot, shielder());
            shield(*entries_[right.slot]);
        }
        drop_if_void(right);
    }
    return before - pins_;
}

template <typename Kind>
void BasicIndex<Kind>::fit_budget(Tier tier) {
    TierState& state = tiers_[tier];
    if (!(state.pin_budget >= 0 && state.pin_budget <= 0.5))
        throw invalid_argument("pin_budget", std::to_string(state.pin_budget) + " is outside 0 to 0.5");
    state.pins.set_budget(static_cast<int64_t>(state.pin_budget * state.allocator.total()), shielder());
}

// The latest of the pinned users, in the tiers where it has pages.
template <typename Kind>
void BasicIndex<Kind>::use_pin(Entry& entry) {
    if (!entry.right || !entry.right->pinned) return;
    for (Tier tier : kTiers) {
        const Holding& holding = entry.on[tier];
        if (holding.listed) tiers_[tier].pins.use(entry.slot, static_cast<int32_t>(holding.pages.size()), shielder());
    }
}

template <typename Kind>
void BasicIndex<Kind>::shield(Entry& entry) {
    for (Tier tier : kTiers) {
        Holding& holding = entry.on[tier];
        const bool shielded = privileged(entry, tier);
        if (shielded == holding.shielded) continue;
        holding.shielded = shielded;
        if (shielded) tiers_[tier].policy->hold(entry.slot);
        else tiers_[tier].policy->release(entry.slot);
    }
}

template <typename Kind>
bool BasicIndex<Kind>::privileged(const Entry& entry, Tier tier) const {
    if (!entry.on[tier].listed || !entry.right || entry.busy()) return false;
    if (entry.right->turn != kNoTurn) return true;
    const PinOrder& pins = tiers_[tier].pins;
    return entry.right->pinned && pins.contains(entry.slot) && pins.pin(entry.slot).covered;
}

// When the policy has nobody left: pinned users first, those used first before others, then those whose turn is near, the
// last turn first. A load takes nothing from those whose turn comes before its own user's. A store takes nothing from
// anybody privileged: what it took would be missed sooner than what it saves.
//
// O(1) but for the entries passed over: busy ones, and pinned ones whose turn is near; and once for each call of
// set_window, those of the window without pages.
template <typename Kind>
Slot BasicIndex<Kind>::last_resort(const Entry& taker, Tier tier) {
    if (tier == kHost) return kNoSlot;
    TierState& state = tiers_[tier];
    const Slot pinned = state.pins.oldest([this](Slot slot) {
        const Entry& entry = *entries_[slot];
        return !entry.busy() && entry.right->turn == kNoTurn;
    });
    if (pinned != kNoSlot) return pinned;
    const int32_t own = taker.right ? taker.right->turn : kNoTurn;
    const size_t first = taker.batch ? 0 : own == kNoTurn ? window_.size() : static_cast<size_t>(own) + 1;
    for (size_t turn = state.window_end; turn > first; --turn) {
        const Slot slot = window_[turn - 1]->slot;
        const bool holds = slot != kNoSlot && entries_[slot]->on[tier].listed;
        if (holds && !entries_[slot]->busy()) return slot;
        if (!holds && turn == state.window_end) --state.window_end;
    }
    return kNoSlot;
}

template class BasicIndex<Hashed>;
template class BasicIndex<Counted>;

}  // namespace mtserve
