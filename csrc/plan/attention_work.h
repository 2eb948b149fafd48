// The work list of one attention launch: which thread block computes which rows over which keys.
//
// Rows of a slot are cut into tiles of `tile_rows` from the slot's first row; a tile's visible key
// blocks (64 tokens; the cached ones first, then the new ones) into runs. Each (tile, run) is an item,
// each row's runs are numbered 0 .. splits - 1, and together they cover its visible blocks once.
//
// A deterministic plan cuts nowhere but between chunks of blocks, which follow from the slot's lengths alone; only
// a row's first run may take several, and the kernel closes a sum at each chunk's end. So a row's sums are the same,
// added in the same order, whatever the plan makes of the batch around it.
#pragma once

#include <cstdint>

namespace mtserve {

constexpr int32_t kBlockTokens = 64;
constexpr int32_t kItemWords = 8;  // slot, row, rows, begin block, end block, split, chunk, 0
constexpr int32_t kMaxSplits = 16;

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
    int32_t* splits;        // [splits_size]; 0 behind the last row
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
