// What an engine's tiers would have held of each request's prefix: the engine's index over counts instead of states.
//
// Each request is over before the next comes: the onload that it waits for, its batch, the write-back of what the batch
// made, and, where what was appended after it began a new generation, the encoding of that in the background. So does
// an engine with restore = "load" and write_back_idle_ms = 0 in a closed loop of one request, whose prefixes are encoded
// in one batch each. Copies never fail. The engine's window then is the one user served, who is busy whenever anybody is
// evicted, so none is set here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../cache/counted.h"
#include "../cache/index.h"

namespace mtserve {

using CountedIndex = BasicIndex<Counted>;

// One request an entry, all of one length. `after`: what the user's history has become when the request is over.
struct RequestColumns {
    int64_t size;
    const int32_t* users;
    const double* t_s;  // never decreases
    const int32_t* tokens;
    const int32_t* generations;
    const int32_t* tokens_after;
    const int32_t* generations_after;
};

struct SimulationStats {
    int64_t requests = 0, rebuilt = 0;  // new generations encoded in the background
    int64_t loads = 0, loaded_pages = 0, stores = 0, stored_pages = 0;
    IndexStats index;
};

class Simulation {
public:
    // `keys`: by which the policies know each user, 0 or one a user; those of an engine are hashes of the user ids.
    Simulation(int64_t page_tokens, int64_t gpu_pages, int64_t host_pages, const std::string& policy, int64_t users,
               std::vector<uint64_t> keys);

    // Goes on with these requests: prefix tokens that each tier had of each, to gpu_tokens and host_tokens [size].
    void run(const RequestColumns& requests, int32_t* gpu_tokens, int32_t* host_tokens);

    SimulationStats stats() const;
    void check() const { index_.check(); }

private:
    void check_requests(const RequestColumns& requests) const;
    Match serve(int32_t user, CountedView history, double now);
    int32_t bring(int32_t user, CountedView history, double now);
    int32_t encode(int32_t user, CountedView history, double now);
    void save(int32_t user, double now);

    CountedIndex index_;
    int64_t users_;
    double now_;
    SimulationStats stats_;
    std::vector<CountedIndex::BatchItem> batch_;
};

}  // namespace mtserve
