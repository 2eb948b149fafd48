// Which entry of one tier loses its states first. One instance a tier; time is an argument.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace mtserve {

using Slot = uint32_t;
constexpr Slot kNoSlot = ~Slot{0};

// What a policy may know of an entry. `key` outlives the entry, so a policy can remember users that left.
struct Facts {
    uint64_t key;
    int32_t pages;
};

class Policy {
public:
    // Says which entries may be taken now; pinned ones may not.
    class Evictable {
    public:
        virtual bool operator()(Slot slot) const = 0;

    protected:
        ~Evictable() = default;
    };

    virtual ~Policy() = default;
    virtual void insert(Slot slot, const Facts& facts, double now) = 0;
    virtual void access(Slot slot, const Facts& facts, double now) = 0;
    virtual void remove(Slot slot) = 0;
    // The entry to take from next, still listed; kNoSlot when every entry is pinned.
    virtual Slot victim(const Evictable& evictable, double now) = 0;
    virtual bool contains(Slot slot) const = 0;
    virtual size_t size() const = 0;
    virtual void check() const = 0;
};

// "lru". Throws InvalidArgument for other names.
std::unique_ptr<Policy> make_policy(const std::string& name);

}  // namespace mtserve
