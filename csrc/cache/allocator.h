// Which page ids of one tier are free, given out so that an owner's pages come in runs of neighbours:
// the copy engine moves a run as one piece, and reaches its rate only with pieces of some MiB.
//
// The pages lie in blocks of kRunPages, each with a bit mask of its free pages, and the blocks in bins by the
// length of their longest free run. Small histories fill small holes, so that whole blocks stay whole for
// long ones; yet any owner may have any free page. A block's bin is all that is ever searched, so the cost
// depends on neither the number of pages nor how long the allocator has been in use.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace mtserve {

// With pages near 1 MiB a run is far beyond what the copy engine needs; larger blocks would seldom be wholly free.
constexpr int32_t kRunPages = 16;

class PageAllocator {
public:
    explicit PageAllocator(int64_t pages, bool track_freed = false);

    int32_t total() const { return total_; }
    int32_t free() const { return free_; }
    bool is_free(int32_t page) const;

    // Appends `count` free pages, or all there are if fewer, to the owner's pages, which are in the order of its
    // history. Neighbours of the last page come first; then runs with room for as many pages as the owner has,
    // up to a block, so that its runs lengthen as its history grows page by page.
    void take(int64_t count, std::vector<int32_t>& owned);

    // Throws CorruptState when the page is free already.
    void release(int32_t page);
    // All but the first `kept` of the owner's pages, the last first.
    void release_behind(std::vector<int32_t>& owned, size_t kept);

    // Adds so many free pages behind the last; at most 2^31 - 1 in all.
    void grow(int64_t pages);

    // Ids released since the last drain, each once, also when taken again meanwhile.
    // Always empty unless constructed with track_freed.
    std::vector<int32_t> drain_freed();

    void check() const;

private:
    struct Block {
        uint32_t mask;           // a bit a page, 1 = free
        int32_t previous, next;  // in its bin
    };
    struct Bin {
        int32_t first, last;
    };

    int64_t find_room(int64_t count, int64_t room) const;
    int32_t shortest_run(int64_t at_least) const;
    int64_t take_run(int64_t first, int64_t count, std::vector<int32_t>& owned);
    void list_freed(int32_t page);
    void set_mask(int32_t block, uint32_t mask);
    void link(int32_t block);
    void unlink(int32_t block);
    int64_t check_bin(int32_t length) const;

    int32_t total_ = 0;
    int32_t free_ = 0;
    std::vector<Block> blocks_;
    std::array<Bin, kRunPages + 1> bins_;  // by the length of the longest free run
    bool track_freed_;
    std::vector<int32_t> freed_;
    std::vector<bool> freed_listed_;
};

}  // namespace mtserve
