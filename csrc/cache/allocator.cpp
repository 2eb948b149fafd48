#include "allocator.h"

#include <string>

#include "errors.h"

namespace mtserve {

namespace {

constexpr int64_t kMaxPages = (int64_t{1} << 31) - 1;

int lowest_bit(uint64_t word) { return __builtin_ctzll(word); }
int count_bits(uint64_t word) { return __builtin_popcountll(word); }

}  // namespace

PageAllocator::PageAllocator(int64_t pages, bool track_freed) : total_(0), free_(0), track_freed_(track_freed) {
    if (pages < 0 || pages > kMaxPages)
        throw invalid_argument("pages", std::to_string(pages) + " is outside 0 to " + std::to_string(kMaxPages));
    total_ = free_ = static_cast<int32_t>(pages);
    int64_t bits = pages;
    do {
        const int64_t words = (bits + 63) / 64;
        levels_.emplace_back(words, ~uint64_t{0});
        if (bits % 64) levels_.back().back() = (uint64_t{1} << (bits % 64)) - 1;
        bits = words;
    } while (bits > 1);
    if (track_freed_) freed_listed_.assign(pages, false);
}

bool PageAllocator::is_free(int32_t page) const {
    if (page < 0 || page >= total_)
        throw invalid_argument("page", std::to_string(page) + " is outside 0 to " + std::to_string(total_ - 1));
    return levels_[0][page >> 6] >> (page & 63) & 1;
}

int32_t PageAllocator::take(int32_t hint) {
    if (free_ == 0) return -1;
    int64_t page = hint > 0 && hint < total_ ? first_free(hint) : -1;
    if (page < 0) page = first_free(0);
    clear(page);
    --free_;
    return static_cast<int32_t>(page);
}

void PageAllocator::release(int32_t page) {
    if (is_free(page)) throw corrupt_state("page", "page " + std::to_string(page) + " is released but already free");
    set(page);
    ++free_;
    if (track_freed_ && !freed_listed_[page]) {
        freed_listed_[page] = true;
        freed_.push_back(page);
    }
}

std::vector<int32_t> PageAllocator::drain_freed() {
    for (int32_t page : freed_) freed_listed_[page] = false;
    std::vector<int32_t> drained;
    drained.swap(freed_);
    return drained;
}

// Climbs until a word has a bit at or after the position, then descends along lowest bits.
int64_t PageAllocator::first_free(int64_t from) const {
    int64_t position = from;
    for (size_t level = 0; level < levels_.size(); ++level) {
        const int64_t word = position >> 6;
        if (word >= static_cast<int64_t>(levels_[level].size())) return -1;
        const uint64_t rest = levels_[level][word] & (~uint64_t{0} << (position & 63));
        if (rest) {
            position = word * 64 + lowest_bit(rest);
            while (level-- > 0) position = position * 64 + lowest_bit(levels_[level][position]);
            return position;
        }
        position = word + 1;
    }
    return -1;
}

void PageAllocator::set(int64_t page) {
    for (auto& level : levels_) {
        uint64_t& word = level[page >> 6];
        const bool was_empty = word == 0;
        word |= uint64_t{1} << (page & 63);
        if (!was_empty) return;
        page >>= 6;
    }
}

void PageAllocator::clear(int64_t page) {
    for (auto& level : levels_) {
        uint64_t& word = level[page >> 6];
        word &= ~(uint64_t{1} << (page & 63));
        if (word) return;
        page >>= 6;
    }
}

void PageAllocator::check() const {
    int64_t counted = 0;
    for (uint64_t word : levels_[0]) counted += count_bits(word);
    if (counted != free_)
        throw corrupt_state("allocator", std::to_string(free_) + " pages counted free, bitmap has " + std::to_string(counted));
    for (size_t level = 1; level < levels_.size(); ++level)
        for (size_t word = 0; word < levels_[level - 1].size(); ++word)
            if ((levels_[level - 1][word] != 0) != (levels_[level][word >> 6] >> (word & 63) & 1))
                throw corrupt_state("allocator", "summary bit disagrees with word " + std::to_string(word));
}

}  // namespace mtserve
