// What a simulator's index is made of: users by number, histories as lengths within a generation, pages only counted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "xxh64.h"

namespace mtserve {

// A history that only grows, until a new generation makes all of it void.
struct CountedView {
    int32_t generation = 0;
    int32_t size = 0;  // tokens
};

inline int32_t common_prefix(CountedView a, CountedView b) {
    return a.generation == b.generation ? std::min(a.size, b.size) : 0;
}

class CountedChain {
public:
    using View = CountedView;
    struct Tails {};
    using Tail = View;

    View view() const { return chain_; }
    int32_t size() const { return chain_.size; }
    void fit(int32_t tokens) { chain_.size = tokens; }
    Tail keep(View chain, int32_t stored, Tails&) const { return {chain.generation, stored}; }
    void append(const Tails&, Tail tail) {
        if (tail.size > chain_.size) chain_ = tail;
    }

private:
    View chain_;
};

// Entries found by the user's number.
template <typename Entry>
class NumberedUsers {
public:
    // `keys`: by which the policies know each user; without any, hashes of the numbers.
    explicit NumberedUsers(int32_t users = 0, std::vector<uint64_t> keys = {})
        : entries_(static_cast<size_t>(users), nullptr), keys_(std::move(keys)) {}

    bool admits(int32_t user) const { return user >= 0 && static_cast<size_t>(user) < entries_.size(); }
    Error refusal(std::string field, int32_t user) const {
        return invalid_argument(std::move(field), std::to_string(user) + " is outside 0 to " + std::to_string(static_cast<int64_t>(entries_.size()) - 1));
    }
    static std::string text(int32_t user) { return std::to_string(user); }
    uint64_t key(int32_t user) const { return keys_.empty() ? xxh64(&user, sizeof user, 0) : keys_[user]; }

    Entry* find(int32_t user) const { return entries_[user]; }
    void add(Entry& entry) {
        entries_[entry.user] = &entry;
        ++size_;
    }
    void remove(const Entry& entry) {
        entries_[entry.user] = nullptr;
        --size_;
    }
    size_t size() const { return size_; }

private:
    std::vector<Entry*> entries_;  // by user
    std::vector<uint64_t> keys_;
    size_t size_ = 0;
};

class PageCounter;

// So many pages.
class PageCount {
public:
    size_t size() const { return static_cast<size_t>(count_); }
    bool empty() const { return count_ == 0; }

private:
    friend class PageCounter;
    friend struct PageCounts;
    int32_t count_ = 0;
};

// How many pages of one tier are free.
class PageCounter {
public:
    explicit PageCounter(int64_t pages) { grow(pages); }

    int32_t total() const { return total_; }
    int32_t free() const { return free_; }

    // Adds `count` free pages, or all there are if fewer.
    void take(int64_t count, PageCount& pages) {
        const int32_t taken = static_cast<int32_t>(std::clamp<int64_t>(count, 0, free_));
        pages.count_ += taken;
        free_ -= taken;
    }
    void release(int32_t count) { free_ += count; }
    void grow(int64_t pages) {
        if (pages < 0 || pages > INT32_MAX - total_)
            throw invalid_argument("pages", std::to_string(pages) + " is outside 0 to " + std::to_string(INT32_MAX - total_));
        total_ += static_cast<int32_t>(pages);
        free_ += static_cast<int32_t>(pages);
    }
    void check() const {
        if (free_ < 0 || free_ > total_)
            throw corrupt_state("allocator", std::to_string(free_) + " of " + std::to_string(total_) + " pages are free");
    }

private:
    int32_t total_ = 0, free_ = 0;
};

struct PageCounts {
    using List = PageCount;
    using Allocator = PageCounter;

    static void release_behind(List& pages, size_t kept, Allocator& allocator) {
        allocator.release(pages.count_ - static_cast<int32_t>(kept));
        pages.count_ = static_cast<int32_t>(kept);
    }
    static List cut(const List&, int32_t first, int32_t last) {
        List pages;
        pages.count_ = last - first;
        return pages;
    }
    static void write(const List&, int32_t, int32_t*, int32_t) {}

    class Census {
    public:
        explicit Census(const Allocator&) {}
        std::string add(const List& pages) {
            held_ += pages.count_;
            return pages.count_ < 0 ? "holds " + std::to_string(pages.count_) + " pages" : std::string();
        }
        int64_t held() const { return held_; }

    private:
        int64_t held_ = 0;
    };
};

struct Counted {
    using UserView = int32_t;
    using User = int32_t;
    using Chain = CountedChain;
    using Pages = PageCounts;
    template <typename Entry>
    using Users = NumberedUsers<Entry>;
};

}  // namespace mtserve
