// How often keys were used of late, about: a count-min sketch of 4-bit counters that are halved now and then.
// Cormode and Muthukrishnan, "An Improved Data Stream Summary", 2005; halving as in the TinyLFU paper (wtinylfu.h).
//
// A key's four counters lie in one block of a cache line, each in a quarter of it of its own. 4 to 8 bytes a page.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace mtserve {

class Sketch {
public:
    explicit Sketch(int64_t pages) : blocks_(1) { fit(pages); }

    // Room for the keys of a tier of so many pages. What was counted stays: a key's block is found in the copy, too.
    void fit(int64_t pages) {
        while (static_cast<int64_t>(blocks_.size()) * kPagesPerBlock < pages) {
            const size_t half = blocks_.size();
            blocks_.resize(2 * half);
            std::copy_n(blocks_.begin(), half, blocks_.begin() + half);
        }
    }

    void count(uint64_t key) {
        const Places places = find(key);
        for (int row = 0; row < kRows; ++row)
            if (read(places, row) < kMost) word(places, row) += uint64_t{1} << places.shift[row];
    }

    int estimate(uint64_t key) const {
        const Places places = find(key);
        int least = kMost;
        for (int row = 0; row < kRows; ++row) least = std::min(least, read(places, row));
        return least;
    }

    void halve() {
        for (Block& block : blocks_)
            for (uint64_t& word : block.words) word = (word >> 1) & 0x7777777777777777u;
    }

private:
    static constexpr int kRows = 4, kMost = 15;
    static constexpr int64_t kPagesPerBlock = 16;  // 8 counters a page: two for each of a user of one page in each row
    struct alignas(64) Block {
        std::array<uint64_t, 2 * kRows> words{};  // two a row
    };
    struct Places {
        size_t block;
        int word[kRows], shift[kRows];
    };

    Places find(uint64_t key) const {
        uint64_t mixed = key * 0x9E3779B97F4A7C15u;
        mixed ^= mixed >> 32;
        Places places;
        places.block = mixed & (blocks_.size() - 1);
        const uint64_t bits = mixed * 0xC2B2AE3D27D4EB4Fu >> 44;
        for (int row = 0; row < kRows; ++row) {
            const int counter = bits >> (5 * row) & 31;
            places.word[row] = 2 * row + (counter >> 4);
            places.shift[row] = (counter & 15) * 4;
        }
        return places;
    }

    int read(const Places& places, int row) const {
        return blocks_[places.block].words[places.word[row]] >> places.shift[row] & 15;
    }
    uint64_t& word(const Places& places, int row) { return blocks_[places.block].words[places.word[row]]; }

    std::vector<Block> blocks_;  // a power of two
};

}  // namespace mtserve
