#include "simulation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace mtserve {

namespace {

constexpr int kMaxLoads = 2;  // as mtserve.engine.tiers.onload.MAX_LOADS
constexpr int64_t kMaxUsers = INT32_MAX;

int64_t checked_users(int64_t users) {
    if (users < 0 || users > kMaxUsers)
        throw invalid_argument("users", std::to_string(users) + " is outside 0 to " + std::to_string(kMaxUsers));
    return users;
}

NumberedUsers<CountedIndex::Entry> numbered(int64_t users, std::vector<uint64_t> keys, bool oracle) {
    if (oracle) {
        if (!keys.empty()) throw invalid_argument("keys", "an oracle knows users by their numbers");
        keys.resize(static_cast<size_t>(users));
        std::iota(keys.begin(), keys.end(), uint64_t{0});
    }
    if (!keys.empty() && static_cast<int64_t>(keys.size()) != users)
        throw invalid_argument("keys", std::to_string(keys.size()) + " keys for " + std::to_string(users) + " users");
    return NumberedUsers<CountedIndex::Entry>(static_cast<int32_t>(users), std::move(keys));
}

CountedIndex::TierParts tier(int64_t pages, const std::string& policy, double pin_budget, const Oracle* oracle) {
    return {PageCounter(pages), make_policy(policy, pages, oracle), pin_budget};
}

BatchLimits checked(const BatchLimits& limits) {
    for (const auto& [field, tokens] : {std::pair{"batch_tokens", limits.batch_tokens},
                                        std::pair{"cold_batch_tokens", limits.cold_batch_tokens},
                                        std::pair{"cold_after", limits.cold_after}})
        if (tokens < 1) throw invalid_argument(field, std::to_string(tokens) + " is less than 1");
    return limits;
}

void refuse(const char* field, int64_t row, const std::string& why) {
    throw invalid_argument(std::string(field) + "[" + std::to_string(row) + "]", why);
}

}  // namespace

Simulation::Simulation(int64_t page_tokens, int64_t gpu_pages, int64_t host_pages, const std::string& policy,
                       const BatchLimits& limits, double pin_budget, int64_t users, std::vector<uint64_t> keys, const Oracle* habits)
    : oracle_(habits ? std::make_unique<DemandOracle>(*habits, checked_users(users)) : nullptr),
      index_(page_tokens, tier(gpu_pages, policy, pin_budget, oracle_.get()), tier(host_pages, policy, pin_budget, oracle_.get()),
             numbered(checked_users(users), std::move(keys), habits != nullptr)),
      limits_(checked(limits)),
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
        if (oracle_) oracle_->expect(user, requests.next_s[i]);
        const Match found = serve({user, before, requests.frozen[i], requests.candidates[i], false}, now_);
        gpu_tokens[i] = found.gpu_tokens;
        host_tokens[i] = found.host_tokens;
        if (after.generation == before.generation) continue;
        const Match held = index_.lookup(user, before);
        if (held.gpu_tokens == 0 && held.host_tokens == 0) continue;  // nobody encodes for users who are not kept
        serve({user, after, requests.frozen_after[i], 0, true}, now_);
        ++stats_.rebuilt;
    }
    stats_.requests += requests.size;
    index_.drain_returns();
}

// Everything is looked at before anything changes.
void Simulation::check_requests(const RequestColumns& requests) const {
    const std::pair<const char*, const int32_t*> counts[] = {
        {"candidates", requests.candidates}, {"tokens", requests.tokens},           {"frozen", requests.frozen},
        {"tokens_after", requests.tokens_after}, {"frozen_after", requests.frozen_after}};
    if (oracle_ && !requests.next_s) throw invalid_argument("next_s", "an oracle needs to know what comes");
    double last = now_;
    for (int64_t i = 0; i < requests.size; ++i) {
        if (requests.users[i] < 0 || requests.users[i] >= users_)
            refuse("users", i, std::to_string(requests.users[i]) + " is outside 0 to " + std::to_string(users_ - 1));
        if (!(requests.t_s[i] >= last) || std::isinf(requests.t_s[i])) refuse("t_s", i, "is before the previous request, or not finite");
        last = requests.t_s[i];
        if (requests.next_s && !(requests.next_s[i] >= last)) refuse("next_s", i, "is before the request");
        for (const auto& [field, column] : counts)
            if (column[i] < 0 || column[i] > kMaxChain)
                refuse(field, i, std::to_string(column[i]) + " is outside 0 to " + std::to_string(kMaxChain));
    }
}

// One batch after the other until the whole prefix was encoded; each is written back before the next. Returns what the
// first of them found.
Match Simulation::serve(const Job& job, double now) {
    Match found;
    int loads = 0;
    int32_t loaded_from = -1;
    for (bool first = true;; first = false) {
        int32_t cached = bring(job, loads, loaded_from, now), stored = 0;
        const int32_t end = part_end(job, cached);
        batch_[0] = {job.user, {job.history.generation, end}, !first};
        index_.end_batch(index_.begin_batch(batch_, {&cached, &stored, nullptr, INT32_MAX}, now), true);
        ++stats_.batches;
        const int32_t from_host = loaded_from < 0 ? 0 : std::max(0, cached - loaded_from);
        if (first) found = {cached - from_host, from_host};
        save(job.user, now);
        if (end == job.history.size || stored < end) return found;  // a part without room is widened to the rest
    }
}

// Loads what the host has of the history. Returns the tokens that are on the GPU then. `loaded_from`: those there before
// the first load of the job.
int32_t Simulation::bring(const Job& job, int& loads, int32_t& loaded_from, double now) {
    for (;;) {
        const Presence present = index_.presence(job.user, job.history);
        if (present.host_tokens <= present.gpu_tokens || loads >= kMaxLoads) return present.gpu_tokens;
        const auto load = index_.begin_load(job.user, job.history, now);
        if (!load.ticket) {
            loads = kMaxLoads;
            return present.gpu_tokens;
        }
        index_.end_load(load.ticket, true);
        if (loads++ == 0) loaded_from = present.gpu_tokens;
        ++stats_.loads;
        stats_.loaded_pages += static_cast<int64_t>(load.gpu_pages.size());
    }
}

// How far the next batch encodes: as mtserve.engine.queue.scheduler decides for a batch of this job alone.
int32_t Simulation::part_end(const Job& job, int32_t cached) const {
    const int32_t whole = job.history.size;
    const bool cold = job.prefetch || whole - cached > limits_.cold_after;
    const int64_t budget = std::min(limits_.batch_tokens, limits_.cold_batch_tokens);
    if (!cold || int64_t{whole} - cached + job.candidates <= budget) return whole;
    const int64_t end = std::min(cached + budget, int64_t{whole} - 1);  // one token at least comes with the candidates
    return end <= cached || end < job.frozen ? whole : static_cast<int32_t>(end);
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
