// What the engine's index is made of: users by their ids, histories as hash chains, pages by their ids.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "allocator.h"
#include "chain.h"
#include "errors.h"

namespace mtserve {

// Entries found by user id.
template <typename Entry>
class NamedUsers {
public:
    static bool admits(std::string_view user) { return !user.empty() && user.size() <= kMaxBytes; }
    static Error refusal(std::string field, std::string_view user) {
        return invalid_argument(std::move(field), std::to_string(user.size()) + " bytes; a user id has 1 to 256");
    }
    static std::string text(std::string_view user) { return std::string(user); }
    uint64_t key(std::string_view user) const { return xxh64(user.data(), user.size(), 0); }

    Entry* find(std::string_view user) const {
        const auto at = table_.find(user);
        return at == table_.end() ? nullptr : at->second;
    }
    void add(Entry& entry) { table_.emplace(entry.user, &entry); }
    void remove(const Entry& entry) { table_.erase(entry.user); }
    size_t size() const { return table_.size(); }

private:
    static constexpr size_t kMaxBytes = 256;
    std::unordered_map<std::string_view, Entry*> table_;  // keys point into the entries
};

struct PageIds {
    using List = std::vector<int32_t>;
    using Allocator = PageAllocator;

    static void release_behind(List& pages, size_t kept, Allocator& allocator) {
        allocator.release_behind(pages, kept);
    }
    static List cut(const List& pages, int32_t first, int32_t last) { return List(pages.begin() + first, pages.begin() + last); }
    // The first `count` ids to `row`, then -1 as far as `width`.
    static void write(const List& pages, int32_t count, int32_t* row, int32_t width) {
        std::fill(std::copy_n(pages.begin(), count, row), row + width, -1);
    }

    // Counts the pages that are held, and finds those held twice, free, or outside the tier.
    class Census {
    public:
        explicit Census(const Allocator& allocator) : allocator_(allocator), held_(allocator.total(), false) {}
        // Returns what is wrong with them, empty when nothing is.
        std::string add(const List& pages) {
            for (const int32_t page : pages) {
                if (page < 0 || page >= allocator_.total()) return "page outside the tier";
                if (held_[page]) return "page " + std::to_string(page) + " is in two places";
                if (allocator_.is_free(page)) return "page " + std::to_string(page) + " is held and free";
                held_[page] = true;
            }
            return {};
        }
        int64_t held() const { return std::count(held_.begin(), held_.end(), true); }

    private:
        const Allocator& allocator_;
        std::vector<bool> held_;
    };
};

struct Hashed {
    using UserView = std::string_view;
    using User = std::string;
    using Chain = HashChain;
    using Pages = PageIds;
    template <typename Entry>
    using Users = NamedUsers<Entry>;
};

}  // namespace mtserve
