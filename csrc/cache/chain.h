// Token chains: chain[t] = xxh64(row t, seed = chain[t - 1]), so equal entries mean equal prefixes 0..t.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

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

}  // namespace mtserve
