// The work list of one attention launch: which thread block computes which rows over which keys.
//
// Rows of a slot are cut into tiles of `tile_rows` from the slot's first row; a tile's visible key
// blocks (64 tokens; the cached ones first, then the new ones) into runs. Each (tile, run) is an item,
// each row's runs are numbered 0 .. splits - 1, and together they cover its visible blocks once.
//
// A deterministic plan cuts nowhere but between chunks of blocks, which follow from the slot's lengths alone, as do two
// halves of them. A row's sum is that of the first half's chunks, added in order, plus that of the second half's. The
// first run of a half may take several chunks, one run the whole tile (of which the kernel makes two partial sums):
// the kernel closes a sum at each chunk's end. So the result is the same whatever the plan makes of the batch around.
#pragma once

#include <cstdint>

namespace mtserve {

constexpr int32_t kBlockTokens = 64;
constexpr int32_t kItemWords = 8;  // slot, row, rows, begin block, end block, split, chunk, half
constexpr int32_t kMaxSplits = 16;
constexpr int32_t kFirstHalfShift = 16;

struct WorkRequest {
    const int32_t* slots;   // [slot_count, 4]: cached, delta, first_row, rows
    int64_t slot_count;
    const int32_t* limits;  // [rows]
    int64_t rows;
    int32_t heads;
    int32_t head_dim;
    int32_t sms;
    bool deterministic;     // runs of whole chunks only
    int32_t pieces;         // runs of every tile, where it has as many blocks (deterministic: 1 only); 0: choose
    int32_t tile_rows;      // 128 or 192; 0: choose
};

struct WorkOut {
    int32_t* work;          // [capacity, kItemWords]
    int64_t capacity;
    int32_t* splits;        // [splits_size]: how many, deterministic ones with those of the first half << 16; 0 behind the last row
    int64_t splits_size;
};

struct WorkPlan {
    int64_t items;
    int32_t max_splits;
    int32_t tile_rows;
};

// Throws InvalidArgument naming what is out of bounds, before anything is written.
WorkPlan plan_attention_work(const WorkRequest& request, const WorkOut& out);

}  // namespace mtserve
