#include "simulation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace mtserve {

namespace {

constexpr int kMaxLoads = 2;  // as mtserve.engine.onload.MAX_LOADS
constexpr int64_t kMaxUsers = INT32_MAX;

NumberedUsers<CountedIndex::Entry> numbered(int64_t users, std::vector<uint64_t> keys) {
    if (users < 0 || users > kMaxUsers)
        throw invalid_argument("users", std::to_string(users) + " is outside 0 to " + std::to_string(kMaxUsers));
    if (!keys.empty() && static_cast<int64_t>(keys.size()) != users)
        throw invalid_argument("keys", std::to_string(keys.size()) + " keys for " + std::to_string(users) + " users");
    return NumberedUsers<CountedIndex::Entry>(static_cast<int32_t>(users), std::move(keys));
}

CountedIndex::TierParts tier(int64_t pages, const std::string& policy) { return {PageCounter(pages), make_policy(policy, pages)}; }

void refuse(const char* field, int64_t row, const std::string& why) {
    throw invalid_argument(std::string(field) + "[" + std::to_string(row) + "]", why);
}

}  // namespace

Simulation::Simulation(int64_t page_tokens, int64_t gpu_pages, int64_t host_pages, const std::string& policy, int64_t users,
                       std::vector<uint64_t> keys)
    : index_(page_tokens, tier(gpu_pages, policy), tier(host_pages, policy), numbered(users, std::move(keys))),
      users_(users),
      now_(-std::numeric_limits<double>::infinity()),
      batch_(1) {}

void Simulation::run(const RequestColumns& requests, int32_t* gpu_tokens, int32_t* host_tokens) {
    check_requests(requests);
    for (int64_t i = 0; i < requests.size; ++i) {
        const int32_t user = requests.users[i];
        const CountedView before{requests.generations[i], requests.tokens[i]};
        const CountedView after{requests.generations_after[i], requests.tokens_after[i]};
        now_ = requests.t_s[i];
        const Match found = serve(user, before, now_);
        gpu_tokens[i] = found.gpu_tokens;
        host_tokens[i] = found.host_tokens;
        if (after.generation == before.generation) continue;
        const Match held = index_.lookup(user, before);
        if (held.gpu_tokens == 0 && held.host_tokens == 0) continue;  // nobody encodes for users who are not kept
        encode(user, after, now_);
        ++stats_.rebuilt;
    }
    stats_.requests += requests.size;
    index_.drain_returns();
}

// Everything is looked at before anything changes.
void Simulation::check_requests(const RequestColumns& requests) const {
    double last = now_;
    for (int64_t i = 0; i < requests.size; ++i) {
        if (requests.users[i] < 0 || requests.users[i] >= users_)
            refuse("users", i, std::to_string(requests.users[i]) + " is outside 0 to " + std::to_string(users_ - 1));
        if (!(requests.t_s[i] >= last) || std::isinf(requests.t_s[i])) refuse("t_s", i, "is before the previous request, or not finite");
        last = requests.t_s[i];
        for (const auto& [field, tokens] : {std::pair{"tokens", requests.tokens}, std::pair{"tokens_after", requests.tokens_after}})
            if (tokens[i] < 0 || tokens[i] > kMaxChain)
                refuse(field, i, std::to_string(tokens[i]) + " is outside 0 to " + std::to_string(kMaxChain));
    }
}

Match Simulation::serve(int32_t user, CountedView history, double now) {
    const int32_t loaded_from = bring(user, history, now);
    const int32_t cached = encode(user, history, now);
    const int32_t from_host = loaded_from < 0 ? 0 : std::max(0, cached - loaded_from);
    return {cached - from_host, from_host};
}

// Loads what the host has of the history. Returns the tokens that were on the GPU before, -1 when nothing was loaded.
int32_t Simulation::bring(int32_t user, CountedView history, double now) {
    int32_t loaded_from = -1;
    for (int loads = 0; loads < kMaxLoads; ++loads) {
        const Presence present = index_.presence(user, history);
        if (present.host_tokens <= present.gpu_tokens) break;
        const auto load = index_.begin_load(user, history, now);
        if (!load.ticket) break;
        index_.end_load(load.ticket, true);
        if (loaded_from < 0) loaded_from = present.gpu_tokens;
        ++stats_.loads;
        stats_.loaded_pages += static_cast<int64_t>(load.gpu_pages.size());
    }
    return loaded_from;
}

// A batch of the user alone, and the write-back of what it made. Returns the tokens that the batch found on the GPU.
int32_t Simulation::encode(int32_t user, CountedView history, double now) {
    int32_t cached = 0, stored = 0;
    batch_[0] = {user, history};
    const Ticket ticket = index_.begin_batch(batch_, {&cached, &stored, nullptr, INT32_MAX}, now);
    index_.end_batch(ticket, true);
    save(user, now);
    return cached;
}

void Simulation::save(int32_t user, double now) {
    const auto store = index_.begin_store(user, true, now);
    if (!store.ticket) return;
    index_.end_store(store.ticket, true);
    ++stats_.stores;
    stats_.stored_pages += static_cast<int64_t>(store.gpu_pages.size());
}

SimulationStats Simulation::stats() const {
    SimulationStats stats = stats_;
    stats.index = index_.stats();
    return stats;
}

}  // namespace mtserve
