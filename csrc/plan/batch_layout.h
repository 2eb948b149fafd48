// Where every token of one batch lies: its row, its feature row, what it sees, where its states go.
//
// Two orders. Rows: slot after slot, a slot's new prefix tokens and then its candidates. Tokens: sorted by
// kind (each U feature, behaviours, candidates), inside a kind as the rows are.
#pragma once

#include <cstdint>
#include <vector>

#include "gap_buckets.h"

namespace mtserve {

constexpr int32_t kTileWords = 4;          // kind, first token, tokens, 0
constexpr int64_t kSectionAlignment = 16;  // of the sections of `raw`, in bytes

// What does not change from batch to batch.
struct LayoutModel {
    int32_t users;  // U features, one token each
    int64_t user_bytes, behaviour_bytes, candidate_bytes;  // of a feature row; the last two start with int64 time_ms
    int32_t page_tokens;
    int32_t tile_tokens;
    bool full_attention;  // U and S see all of U and S
    bool plain_norm;      // one group for all rows
    GapBuckets gaps;      // of gaps in ms
    int64_t rows_of_part;  // large batches are cut into parts of about so many rows, for several threads
};

// Prefix tokens [cached, encode_to) are new, [0, frozen) are U and S, [0, stored) have a page.
struct SlotSpan {
    int32_t cached, encode_to, frozen, stored, jobs;
};

struct FeatureRows {
    const uint8_t* data;
    int64_t rows;
};

struct JobRows {
    FeatureRows candidates;
    const int32_t* limits;   // [candidates]
    const int32_t* recency;  // [candidates] buckets
};

struct Int32s {
    int32_t* data;
    int64_t rows;
    int64_t columns;  // 1 for a vector
};

struct BatchRequest {
    std::vector<SlotSpan> slots;
    std::vector<FeatureRows> features;  // one row a slot; may be empty where no U token is new
    std::vector<FeatureRows> kept;      // a slot's behaviours from its generation's first
    std::vector<JobRows> jobs;          // slot after slot
    Int32s page_table;                  // [slots, pages]; without data: no slot has any
};

// As documented in mtserve/engine/forward/batch.py; capacities may exceed the batch.
struct BatchOut {
    Int32s slots, page_table, limit, group, target, tiles, row, source, position, bucket;
    uint8_t* raw;
    int64_t raw_bytes;
};

struct BatchCounts {
    int64_t tiles;
    std::vector<int64_t> first_token;  // [kinds + 1]
};

class BatchLayout {
public:
    // Throws InvalidArgument naming what is out of bounds.
    explicit BatchLayout(LayoutModel model);
    // Throws InvalidArgument naming what is out of bounds or too small, before anything is written.
    BatchCounts plan(const BatchRequest& request, const BatchOut& out) const;

    const LayoutModel& model() const { return model_; }

private:
    LayoutModel model_;
};

}  // namespace mtserve
