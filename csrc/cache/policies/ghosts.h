// Users that were evicted, oldest to newest, found by key. Each weighs the pages that it had, so a bound on pages
// bounds their number. 24 bytes a ghost, and 8 to 16 of the table that finds them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../errors.h"

namespace mtserve {

class Ghosts {
public:
    // Forgets the user. Returns the pages it weighed, 0 when it was not known.
    int32_t take(uint64_t key) {
        if (size_ == 0) return 0;
        const size_t at = find(key);
        if (table_[at] == kNone) return 0;
        const int32_t pages = nodes_[table_[at]].pages;
        forget(at);
        return pages;
    }

    void push(uint64_t key, int32_t pages) {
        take(key);  // of two users with one key only the later is remembered
        if (2 * (size_ + 1) > table_.size()) rehash();
        uint32_t index = free_;
        if (index == kNone) {
            index = static_cast<uint32_t>(nodes_.size());
            nodes_.emplace_back();
        } else {
            free_ = nodes_[index].newer;
        }
        nodes_[index] = {key, newest_, kNone, pages};
        (newest_ == kNone ? oldest_ : nodes_[newest_].newer) = index;
        newest_ = index;
        table_[find(key)] = index;
        pages_ += pages;
        ++size_;
    }

    // Forgets the oldest until no more than `pages` are left.
    void trim(int64_t pages) {
        while (size_ > 0 && pages_ > pages) forget(find(nodes_[oldest_].key));
    }

    int64_t pages() const { return pages_; }

    void check() const {
        size_t walked = 0;
        int64_t pages = 0;
        uint32_t older = kNone;
        for (uint32_t index = oldest_; index != kNone; older = index, index = nodes_[index].newer) {
            const Node& node = nodes_[index];
            if (node.older != older || node.pages < 1 || ++walked > size_ || table_[find(node.key)] != index)
                throw corrupt_state("policy", "ghosts are broken at number " + std::to_string(walked));
            pages += node.pages;
        }
        if (walked != size_ || pages != pages_ || newest_ != older)
            throw corrupt_state("policy", std::to_string(walked) + " of " + std::to_string(size_) + " ghosts, " +
                                              std::to_string(pages) + " of " + std::to_string(pages_) + " pages");
    }

private:
    static constexpr uint32_t kNone = ~uint32_t{0};
    struct Node {
        uint64_t key = 0;
        uint32_t older = kNone, newer = kNone;
        int32_t pages = 0;
    };

    size_t home(uint64_t key) const { return (key * 0x9E3779B97F4A7C15u >> 32) & (table_.size() - 1); }

    // Where the key is in the table, or the empty place where it belongs.
    size_t find(uint64_t key) const {
        size_t at = home(key);
        while (table_[at] != kNone && nodes_[table_[at]].key != key) at = (at + 1) & (table_.size() - 1);
        return at;
    }

    void forget(size_t at) {
        const uint32_t index = table_[at];
        Node& node = nodes_[index];
        (node.older == kNone ? oldest_ : nodes_[node.older].newer) = node.newer;
        (node.newer == kNone ? newest_ : nodes_[node.newer].older) = node.older;
        pages_ -= node.pages;
        --size_;
        node.newer = free_;
        free_ = index;
        close_gap(at);
    }

    // Moves what a search would otherwise miss behind the emptied place, so that no marks of deleted ones pile up.
    void close_gap(size_t gap) {
        const size_t mask = table_.size() - 1;
        table_[gap] = kNone;
        for (size_t at = (gap + 1) & mask; table_[at] != kNone; at = (at + 1) & mask) {
            const size_t way = (at - home(nodes_[table_[at]].key)) & mask;
            if (way < ((at - gap) & mask)) continue;
            table_[gap] = table_[at];
            table_[at] = kNone;
            gap = at;
        }
    }

    void rehash() {
        table_.assign(table_.empty() ? 16 : 2 * table_.size(), kNone);
        for (uint32_t index = oldest_; index != kNone; index = nodes_[index].newer) table_[find(nodes_[index].key)] = index;
    }

    std::vector<Node> nodes_;
    std::vector<uint32_t> table_;  // numbers of nodes, linear probing, at most half full
    uint32_t oldest_ = kNone, newest_ = kNone, free_ = kNone;
    size_t size_ = 0;
    int64_t pages_ = 0;
};

}  // namespace mtserve
