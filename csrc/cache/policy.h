// Which entry of one tier loses its states first. One instance a tier; time is an argument.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace mtserve {

using Slot = uint32_t;
constexpr Slot kNoSlot = ~Slot{0};

// What a policy may know of an entry. `key` outlives the entry, so a policy can remember users that left.
struct Facts {
    uint64_t key;
    int32_t pages;
    double cost = 1;  // of bringing a page back, above 0, in any unit that all share
};

class Policy {
public:
    // Says which entries may be taken now; pinned and held ones may not.
    class Evictable {
    public:
        virtual bool operator()(Slot slot) const = 0;

    protected:
        ~Evictable() = default;
    };

    virtual ~Policy() = default;
    virtual void insert(Slot slot, const Facts& facts, double now) = 0;
    virtual void access(Slot slot, double now) = 0;   // another request of the user
    virtual void refresh(Slot slot, double now) = 0;  // a request that is counted elsewhere: recent, but no more frequent
    virtual void resize(Slot slot, int32_t pages) = 0;
    // `evicted`: to make room, so that the user's return would tell something; else its states are void.
    virtual void remove(Slot slot, bool evicted) = 0;
    // The entry stays as it is, used and counted like others, but `victim` will be told that it may not be taken until
    // `release`: however many are held, a policy may put them out of the way of its search. One that does not still
    // chooses rightly. A removed entry is held no more.
    virtual void hold(Slot) {}
    virtual void release(Slot) {}
    // Whether a newcomer, who is not listed, is worth more than `victim`, who would have to leave for it.
    virtual bool admits(const Facts&, Slot, double) const { return true; }
    virtual void decline(const Facts&, double) {}  // a request of a user who is not let in
    // The entry to take from next, still listed; kNoSlot when every entry is pinned.
    virtual Slot victim(const Evictable& evictable, double now) = 0;
    virtual void grow(int64_t pages) = 0;  // the tier has so many more
    virtual bool contains(Slot slot) const = 0;
    virtual size_t size() const = 0;
    virtual int64_t pages() const = 0;  // of all listed entries
    virtual void check() const = 0;
};

class Oracle;

// Those that can serve, and those that need an oracle.
std::vector<std::string> policy_names();
std::vector<std::string> oracle_policy_names();

// For a tier of `capacity_pages` pages. `oracle` outlives the policy. Throws InvalidArgument for other names than those
// above, and where a policy needs an oracle and there is none.
std::unique_ptr<Policy> make_policy(const std::string& name, int64_t capacity_pages, const Oracle* oracle = nullptr);

}  // namespace mtserve
