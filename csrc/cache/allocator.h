// Which page ids of one tier are free. A 64-ary tree of bitmaps: taking the first free id at or
// after a hint and giving one back both cost one step per level (four levels for 2^24 pages).
#pragma once

#include <cstdint>
#include <vector>

namespace mtserve {

class PageAllocator {
public:
    PageAllocator(int64_t pages, bool track_freed);

    int32_t total() const { return total_; }
    int32_t free() const { return free_; }
    bool is_free(int32_t page) const;

    // The first free page at or after `hint`, else the lowest free one. Passing the user's last
    // page + 1 makes neighbours in the history neighbours in memory. -1 when none is free.
    int32_t take(int32_t hint);
    void release(int32_t page);

    // Ids released since the last drain, each once, also when taken again meanwhile.
    // Always empty unless constructed with track_freed.
    std::vector<int32_t> drain_freed();

    void check() const;

private:
    int64_t first_free(int64_t from) const;
    void set(int64_t page);
    void clear(int64_t page);

    int32_t total_;
    int32_t free_;
    std::vector<std::vector<uint64_t>> levels_;  // levels_[0]: a bit a page, 1 = free; above: word not empty
    bool track_freed_;
    std::vector<int32_t> freed_;
    std::vector<bool> freed_listed_;
};

}  // namespace mtserve
