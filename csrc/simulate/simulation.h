// What an engine's tiers would have held of each request's prefix: the engine's index over counts instead of states.
//
// Each request is over before the next comes: the onload that it waits for, its batch, the write-back of what the batch
// made, and, where what was appended after it began a new generation, the encoding of that in the background. So does
// an engine with restore = "load" and write_back_idle_ms = 0 in a closed loop of one request. Copies never fail. The
// engine's window then is the one user served, who is busy whenever anybody is evicted, so none is set here.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../cache/counted.h"
#include "../cache/index.h"
#include "demand_oracle.h"

namespace mtserve {

using CountedIndex = BasicIndex<Counted>;

// One request an entry, all of one length. `after`: what the user's history has become when the request is over.
// `frozen`: tokens that one batch must encode together, being rows that see one another.
struct RequestColumns {
    int64_t size;
    const int32_t* users;
    const double* t_s;  // never decreases
    const int32_t* candidates;
    const int32_t* tokens;
    const int32_t* generations;
    const int32_t* frozen;
    const int32_t* tokens_after;
    const int32_t* generations_after;
    const int32_t* frozen_after;
    const double* next_s;  // the user's next request for the states that this one leaves; null where nobody may know
};

// What one batch takes, as in mtserve.config.EngineConfig: prefixes that lack more are encoded part by part.
struct BatchLimits {
    int64_t batch_tokens, cold_batch_tokens, cold_after;
};

struct SimulationStats {
    int64_t requests = 0, batches = 0, rebuilt = 0;  // new generations encoded in the background
    int64_t loads = 0, loaded_pages = 0, stores = 0, stored_pages = 0;
    IndexStats index;
};

class Simulation {
public:
    // `keys`: by which the policies know each user, 0 or one a user; those of an engine are hashes of the user ids.
    // `pin_budget`: share of each tier's pages that pinned users may keep from others.
    // `habits`: where the policy needs to know what comes, how users, by their numbers, come back; outlives this.
    Simulation(int64_t page_tokens, int64_t gpu_pages, int64_t host_pages, const std::string& policy, const BatchLimits& limits,
               double pin_budget, int64_t users, std::vector<uint64_t> keys, const Oracle* habits);

    // Keeps these users' states before others' from now on, as BasicIndex::pin_users; returns how many were not pinned.
    int64_t pin(const std::vector<int32_t>& users) { return index_.pin_users(users); }

    // Goes on with these requests: prefix tokens that each tier had of each, to gpu_tokens and host_tokens [size].
    void run(const RequestColumns& requests, int32_t* gpu_tokens, int32_t* host_tokens);

    SimulationStats stats() const;
    void check() const { index_.check(); }

private:
    // What the engine calls a job; without candidates it is a prefetch.
    struct Job {
        int32_t user;
        CountedView history;
        int32_t frozen, candidates;
        bool prefetch;
    };

    void check_requests(const RequestColumns& requests) const;
    Match serve(const Job& job, double now);
    int32_t bring(const Job& job, int& loads, int32_t& loaded_from, double now);
    int32_t part_end(const Job& job, int32_t cached) const;
    void save(int32_t user, double now);

    std::unique_ptr<DemandOracle> oracle_;  // before the index, whose policies ask it
    CountedIndex index_;
    BatchLimits limits_;
    int64_t users_;
    double now_;
    SimulationStats stats_;
    std::vector<CountedIndex::BatchItem> batch_;
};

}  // namespace mtserve
