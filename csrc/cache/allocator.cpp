#include "allocator.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "errors.h"

namespace mtserve {

namespace {

constexpr int64_t kMaxPages = (int64_t{1} << 31) - 1;
constexpr int32_t kNone = -1;
constexpr int32_t kShortestRoom = 2;  // pages

int lowest_bit(uint32_t mask) { return __builtin_ctz(mask); }

// `length` set bits from `first` on.
uint32_t bits(int32_t first, int32_t length) { return ((uint32_t{1} << length) - 1) << first; }

int32_t longest_run(uint32_t mask) {
    int32_t length = 0;
    for (; mask; mask &= mask >> 1) ++length;
    return length;
}

// Where the first of the longest runs begins.
int32_t longest_run_begin(uint32_t mask) {
    uint32_t begins = mask;
    for (; mask; mask &= mask >> 1) begins = mask;
    return lowest_bit(begins);
}

std::string text(int64_t value) { return std::to_string(value); }

void require(bool holds, const char* broken, int64_t where) {
    if (!holds) throw corrupt_state("allocator", std::string(broken) + " (" + text(where) + ")");
}

}  // namespace

PageAllocator::PageAllocator(int64_t pages, bool track_freed) : track_freed_(track_freed) {
    bins_.fill({kNone, kNone});
    grow(pages);
}

void PageAllocator::grow(int64_t pages) {
    if (pages < 0 || pages > kMaxPages - total_)
        throw invalid_argument("pages", text(pages) + " is outside 0 to " + text(kMaxPages - total_));
    const int64_t total = total_ + pages;
    const size_t blocks = blocks_.size();
    if (track_freed_) freed_listed_.resize(total);
    blocks_.resize((total + kRunPages - 1) / kRunPages, {0, kNone, kNone});
    for (size_t block = blocks; block < blocks_.size(); ++block) link(static_cast<int32_t>(block));
    for (int64_t page = total_; page < total;) {
        const int32_t block = static_cast<int32_t>(page / kRunPages), bit = static_cast<int32_t>(page % kRunPages);
        const int32_t added = static_cast<int32_t>(std::min<int64_t>(kRunPages - bit, total - page));
        set_mask(block, blocks_[block].mask | bits(bit, added));
        page += added;
    }
    total_ = static_cast<int32_t>(total);
    free_ += static_cast<int32_t>(pages);
}

bool PageAllocator::is_free(int32_t page) const {
    if (page < 0 || page >= total_)
        throw invalid_argument("page", text(page) + " is outside 0 to " + text(total_ - 1));
    return blocks_[page / kRunPages].mask >> page % kRunPages & 1;
}

void PageAllocator::take(int64_t count, std::vector<int32_t>& owned) {
    const int64_t room = static_cast<int64_t>(owned.size());
    int64_t left = std::min<int64_t>(count, free_);
    if (!owned.empty()) left -= take_run(int64_t{owned.back()} + 1, left, owned);
    while (left > 0) left -= take_run(find_room(left, room), left, owned);
}

// The first page of the shortest run of at least max(count, room) pages (a whole block counts as any length),
// else of the shortest that has `count`, else of the longest. Growth does not go for the longest at once: that
// is often a block about to become whole. Nor for single pages before all others: it would lie in pieces.
int64_t PageAllocator::find_room(int64_t count, int64_t room) const {
    int32_t length = shortest_run(std::max(count, room));
    if (length == 0) length = shortest_run(std::max(count, std::min<int64_t>(room, kShortestRoom)));
    if (length == 0) {
        length = kRunPages;
        while (bins_[length].first == kNone) --length;
    }
    const int64_t block = bins_[length].first;
    return block * kRunPages + longest_run_begin(blocks_[block].mask);
}

// The lowest bin in use from this length up, 0 when all are empty.
int32_t PageAllocator::shortest_run(int64_t at_least) const {
    for (int32_t length = static_cast<int32_t>(std::min<int64_t>(at_least, kRunPages)); length <= kRunPages; ++length)
        if (bins_[length].first != kNone) return length;
    return 0;
}

// Takes free pages from `first` on until one is not free, at most `count`. Returns how many.
int64_t PageAllocator::take_run(int64_t first, int64_t count, std::vector<int32_t>& owned) {
    int64_t page = first;
    const int64_t end = first + count;
    while (page < end && page >= 0 && page < total_) {
        const int32_t block = static_cast<int32_t>(page / kRunPages), bit = static_cast<int32_t>(page % kRunPages);
        const uint32_t mask = blocks_[block].mask;
        const int32_t free = lowest_bit(~(mask >> bit));
        const int32_t taken = static_cast<int32_t>(std::min<int64_t>(free, end - page));
        owned.resize(owned.size() + taken);
        std::iota(owned.end() - taken, owned.end(), static_cast<int32_t>(page));
        set_mask(block, mask & ~bits(bit, taken));
        free_ -= taken;
        page += taken;
        if (bit + taken < kRunPages) break;
    }
    return page - first;
}

void PageAllocator::release(int32_t page) {
    std::vector<int32_t> owned{page};
    release_behind(owned, 0);
}

// Block by block: a run's pages become free at once.
void PageAllocator::release_behind(std::vector<int32_t>& owned, size_t kept) {
    while (owned.size() > kept) {
        const int32_t block = owned.back() / kRunPages;
        uint32_t freed = 0;
        for (; owned.size() > kept && owned.back() / kRunPages == block; owned.pop_back()) {
            const int32_t page = owned.back();
            const uint32_t bit = bits(page % kRunPages, 1);
            if (is_free(page) || freed & bit) throw corrupt_state("page", "page " + text(page) + " is released but already free");
            freed |= bit;
            if (track_freed_) list_freed(page);
        }
        free_ += __builtin_popcount(freed);
        set_mask(block, blocks_[block].mask | freed);
    }
}

void PageAllocator::list_freed(int32_t page) {
    if (freed_listed_[page]) return;
    freed_listed_[page] = true;
    freed_.push_back(page);
}

std::vector<int32_t> PageAllocator::drain_freed() {
    for (int32_t page : freed_) freed_listed_[page] = false;
    std::vector<int32_t> drained;
    drained.swap(freed_);
    return drained;
}

void PageAllocator::set_mask(int32_t block, uint32_t mask) {
    const bool moves = longest_run(mask) != longest_run(blocks_[block].mask);
    if (moves) unlink(block);
    blocks_[block].mask = mask;
    if (moves) link(block);
}

void PageAllocator::link(int32_t block) {
    Block& linked = blocks_[block];
    Bin& bin = bins_[longest_run(linked.mask)];
    linked.previous = bin.last;
    linked.next = kNone;
    (bin.last == kNone ? bin.first : blocks_[bin.last].next) = block;
    bin.last = block;
}

void PageAllocator::unlink(int32_t block) {
    const Block& linked = blocks_[block];
    Bin& bin = bins_[longest_run(linked.mask)];
    (linked.previous == kNone ? bin.first : blocks_[linked.previous].next) = linked.next;
    (linked.next == kNone ? bin.last : blocks_[linked.next].previous) = linked.previous;
}

void PageAllocator::check() const {
    const int64_t blocks = static_cast<int64_t>(blocks_.size());
    require(blocks == (int64_t{total_} + kRunPages - 1) / kRunPages, "blocks and pages disagree", blocks);
    const int32_t rest = total_ % kRunPages;
    require(rest == 0 || blocks_.back().mask >> rest == 0, "free beyond the last page", total_);
    int64_t binned = 0, free = 0, listed = 0;
    for (int32_t length = 0; length <= kRunPages; ++length) binned += check_bin(length);
    require(binned == blocks, "bins do not have all blocks", binned);
    for (const Block& block : blocks_) free += __builtin_popcount(block.mask);
    require(free == free_, "pages counted free and masks disagree", free);
    for (const bool each : freed_listed_) listed += each;
    require(listed == static_cast<int64_t>(freed_.size()), "freed pages and their marks disagree", listed);
    for (const int32_t page : freed_) require(freed_listed_[page], "freed page without its mark", page);
}

// How many blocks are in the bin. None is in two, as the block before it must be its previous one.
int64_t PageAllocator::check_bin(int32_t length) const {
    int64_t count = 0;
    int32_t previous = kNone;
    for (int32_t block = bins_[length].first; block != kNone; block = blocks_[block].next, ++count) {
        require(block >= 0 && block < static_cast<int64_t>(blocks_.size()), "a bin lists no block of ours", block);
        require(blocks_[block].previous == previous, "block linked wrongly", block);
        require(longest_run(blocks_[block].mask) == length, "block in the wrong bin", block);
        previous = block;
    }
    require(bins_[length].last == previous, "a bin ends elsewhere", length);
    return count;
}

}  // namespace mtserve
