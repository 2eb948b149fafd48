// Token chains: chain[t] = xxh64(row t, seed = chain[t - 1]), so equal entries mean equal prefixes 0..t.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "xxh64.h"

namespace mtserve {

constexpr int64_t kMaxChain = int64_t{1} << 24;

struct ChainView {
    const uint64_t* data = nullptr;
    int32_t size = 0;
};

inline void extend_chain(uint64_t* out, const uint8_t* rows, size_t count, size_t row_bytes, uint64_t seed) {
    for (size_t t = 0; t < count; ++t) out[t] = seed = xxh64(rows + t * row_bytes, row_bytes, seed);
}

// Length of the longest common prefix. One comparison when one chain continues the other,
// else a binary search: beyond the first difference no two entries are equal.
inline int32_t common_prefix(ChainView a, ChainView b) {
    const int32_t shorter = std::min(a.size, b.size);
    if (shorter == 0 || a.data[shorter - 1] == b.data[shorter - 1]) return shorter;
    int32_t equal = 0, unequal = shorter - 1;  // entries before `equal` match, entry `unequal` does not
    while (equal < unequal) {
        const int32_t middle = equal + (unequal - equal) / 2;
        if (a.data[middle] == b.data[middle]) equal = middle + 1;
        else unequal = middle;
    }
    return equal;
}

// The chain of what is cached, which grows by what batches add and shrinks by what is evicted or void.
class HashChain {
public:
    using View = ChainView;
    // What batches in flight are to append, one after the other.
    using Tails = std::vector<uint64_t>;
    struct Tail {
        size_t begin, end;
    };

    View view() const { return {entries_.data(), size()}; }
    int32_t size() const { return static_cast<int32_t>(entries_.size()); }

    void fit(int32_t tokens) {
        entries_.resize(tokens);
        if (entries_.capacity() > 2 * entries_.size() + 64) entries_.shrink_to_fit();
    }

    // Keeps entries [size, stored) of `chain`, which continues this one.
    Tail keep(View chain, int32_t stored, Tails& tails) const {
        const size_t begin = tails.size();
        if (stored > size()) tails.insert(tails.end(), chain.data + size(), chain.data + stored);
        return {begin, tails.size()};
    }
    void append(const Tails& tails, Tail tail) {
        entries_.insert(entries_.end(), tails.begin() + tail.begin, tails.begin() + tail.end);
    }

private:
    std::vector<uint64_t> entries_;
};

}  // namespace mtserve
