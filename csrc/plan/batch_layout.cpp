#include "batch_layout.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "../cache/errors.h"
#include "crew.h"

namespace mtserve {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 24;  // of a slot's prefix, and rows of a batch
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int32_t kGroupC = 3;  // after U, S, R
constexpr int64_t kMaxParts = 64;

std::string entry(const char* field, size_t index) { return std::string(field) + "[" + std::to_string(index) + "]"; }

int64_t aligned(int64_t bytes) { return (bytes + kSectionAlignment - 1) / kSectionAlignment * kSectionAlignment; }

void count_up(int32_t* to, int64_t count, int64_t first, int64_t step = 1) {
    const int32_t base = static_cast<int32_t>(first), stride = static_cast<int32_t>(step);
    for (int32_t i = 0; i < static_cast<int32_t>(count); ++i) to[i] = base + i * stride;
}

int64_t time_of(const uint8_t* row) {
    int64_t time_ms;
    std::memcpy(&time_ms, row, sizeof time_ms);
    return time_ms;
}

// How many tokens and bytes a batch has; refuses what it could not be laid out from.
class Extent {
public:
    Extent(const LayoutModel& model, const BatchRequest& request) : first_token(model.users + 3, 0), model_(model) {
        check_lists(request);
        size_t job = 0;
        for (size_t b = 0; b < request.slots.size(); ++b) {
            check_slot(request, b);
            add_tokens(request.slots[b]);
            for (int32_t i = 0; i < request.slots[b].jobs; ++i) first_token.back() += request.jobs[job++].candidates.rows;
            width = std::max<int64_t>(width, (request.slots[b].stored + model.page_tokens - 1) / model.page_tokens);
        }
        for (size_t kind = 1; kind < first_token.size(); ++kind) {
            tiles += (first_token[kind] + model.tile_tokens - 1) / model.tile_tokens;
            first_token[kind] += first_token[kind - 1];
        }
        if (rows() > kMaxTokens) throw invalid_argument("spans", std::to_string(rows()) + " rows; a batch has at most 2^24");
        has_users = first_token[model.users] > 0;
        if (has_users) check_features(request);
        place_sections(request);
    }

    int64_t rows() const { return first_token.back(); }

    std::vector<int64_t> first_token;  // [kinds + 1]; while counting, tokens of kind k are entry k + 1
    int64_t tiles = 0, width = 0;
    bool has_users = false;  // whether any U token is new
    int64_t behaviours_at = 0, candidates_at = 0, raw_bytes = 0;

private:
    void check_lists(const BatchRequest& request) {
        const size_t slots = request.slots.size();
        if (request.kept.size() != slots) throw invalid_argument("kept", "needs one array a slot: " + std::to_string(slots));
        if (request.page_table.data && request.page_table.rows != static_cast<int64_t>(slots))
            throw invalid_argument("page_table", "needs one row a slot: " + std::to_string(slots));
        int64_t jobs = 0;
        for (const SlotSpan& slot : request.slots) {
            if (slot.jobs < 0) throw invalid_argument("spans", "a slot has fewer than no jobs");
            jobs += slot.jobs;
        }
        if (jobs != static_cast<int64_t>(request.jobs.size()))
            throw invalid_argument("candidates", "needs one array a job: " + std::to_string(jobs));
    }

    void check_slot(const BatchRequest& request, size_t b) {
        const SlotSpan& slot = request.slots[b];
        if (slot.cached < 0 || slot.cached > slot.encode_to || slot.encode_to > kMaxTokens)
            throw invalid_argument(entry("spans", b), "needs 0 <= cached <= encode_to <= 2^24");
        if (slot.frozen < model_.users || slot.frozen > kMaxTokens)
            throw invalid_argument(entry("spans", b), "needs U features <= frozen <= 2^24");
        if (slot.stored < 0 || slot.stored > slot.encode_to)
            throw invalid_argument(entry("spans", b), "needs 0 <= stored <= encode_to");
        if (request.kept[b].rows < slot.encode_to - model_.users)
            throw invalid_argument(entry("kept", b), "has fewer behaviours than are to be encoded");
        check_pages(request, b);
    }

    void check_pages(const BatchRequest& request, size_t b) {
        const SlotSpan& slot = request.slots[b];
        const int64_t pages = (slot.stored + model_.page_tokens - 1) / model_.page_tokens;
        if (pages == 0) return;
        if (pages > request.page_table.columns)
            throw invalid_argument("page_table", "has no room for the " + std::to_string(pages) + " pages of slot " + std::to_string(b));
        const int32_t* table = request.page_table.data + static_cast<int64_t>(b) * request.page_table.columns;
        const int64_t most = kMaxInt32 / model_.page_tokens - 1;
        for (int64_t page = slot.cached / model_.page_tokens; page < pages; ++page)
            if (table[page] < 0 || table[page] > most)
                throw invalid_argument(entry("page_table", b), "page " + std::to_string(page) + " is no page id");
    }

    void add_tokens(const SlotSpan& slot) {
        const int32_t users = model_.users;
        for (int32_t token = slot.cached; token < std::min(slot.encode_to, users); ++token) ++first_token[token + 1];
        first_token[users + 1] += std::max(slot.encode_to, users) - std::max(slot.cached, users);
    }

    void check_features(const BatchRequest& request) {
        if (request.features.size() != request.slots.size())
            throw invalid_argument("features", "needs one array a slot: " + std::to_string(request.slots.size()));
        for (size_t b = 0; b < request.features.size(); ++b)
            if (request.features[b].rows != 1) throw invalid_argument(entry("features", b), "needs one row");
    }

    void place_sections(const BatchRequest& request) {
        const int64_t behaviours = first_token[model_.users + 1] - first_token[model_.users];
        const int64_t candidates = rows() - first_token[model_.users + 1];
        behaviours_at = aligned(has_users ? static_cast<int64_t>(request.slots.size()) * model_.user_bytes : 0);
        candidates_at = aligned(behaviours_at + behaviours * model_.behaviour_bytes);
        raw_bytes = candidates_at + candidates * model_.candidate_bytes;
        if (raw_bytes > kMaxInt32)
            throw invalid_argument("raw", std::to_string(raw_bytes) + " bytes of feature rows; a batch has at most 2^31 - 1");
    }

    const LayoutModel& model_;
};

void check_room(const Int32s& array, const char* field, int64_t rows, int64_t columns = 1) {
    if (array.rows < rows || array.columns < columns)
        throw invalid_argument(field, "has no room for " + std::to_string(rows) + " by " + std::to_string(columns));
}

void check_out(const BatchOut& out, const Extent& extent, int64_t slots) {
    check_room(out.slots, "slots", slots, 4);
    check_room(out.page_table, "page_table", slots, extent.width);
    for (const auto& [array, field] : {std::pair{&out.limit, "limit"}, {&out.group, "group"}, {&out.target, "target"},
                                       {&out.row, "row"}, {&out.source, "source"}, {&out.position, "position"},
                                       {&out.bucket, "bucket"}})
        check_room(*array, field, extent.rows());
    check_room(out.tiles, "tiles", extent.tiles, kTileWords);
    if (out.raw_bytes < extent.raw_bytes)
        throw invalid_argument("raw", "has no room for " + std::to_string(extent.raw_bytes) + " bytes");
}

// Where a slot's rows, tokens and jobs begin.
struct Place {
    size_t slot = 0, job = 0;
    int64_t row = 0;
    std::vector<int64_t> next;  // token of each kind
};

// Writes some slots, one behind the other, of a batch that has been checked: nothing here fails.
class SlotWriter {
public:
    SlotWriter(const LayoutModel& model, const BatchRequest& request, const BatchOut& out, const Extent& extent, Place place)
        : model_(model), request_(request), out_(out), extent_(extent), next_(std::move(place.next)), first_(place.row),
          slot_(place.slot), job_(place.job) {}

    void write(size_t end) {
        for (; slot_ < end; ++slot_) write_slot(slot_);
    }

private:
    void write_slot(size_t b) {
        const SlotSpan& slot = request_.slots[b];
        const int32_t* table = request_.page_table.data + static_cast<int64_t>(b) * request_.page_table.columns;
        int32_t* pages = out_.page_table.data + static_cast<int64_t>(b) * out_.page_table.columns;
        std::copy_n(table, extent_.width, pages);
        write_prefix_rows(slot, table);
        write_user_tokens(slot, b);
        write_behaviours(slot, request_.kept[b].data);
        const int64_t start = first_;
        first_ += slot.encode_to - slot.cached;
        for (int32_t i = 0; i < slot.jobs; ++i) write_candidates(request_.jobs[job_++]);
        const int32_t line[4] = {slot.cached, slot.encode_to - slot.cached, static_cast<int32_t>(start),
                                 static_cast<int32_t>(first_ - start)};
        std::memcpy(out_.slots.data + 4 * b, line, sizeof line);
    }

    void write_prefix_rows(const SlotSpan& slot, const int32_t* table) {
        const int64_t delta = slot.encode_to - slot.cached;
        int32_t* limit = out_.limit.data + first_;
        count_up(limit, delta, slot.cached + 1);
        if (model_.full_attention) std::fill(limit, limit + std::clamp<int64_t>(slot.frozen - slot.cached, 0, delta), slot.frozen);
        int32_t* group = out_.group.data + first_;
        std::fill(group, group + delta, 0);
        if (!model_.plain_norm)
            for (int32_t begin : {model_.users, slot.frozen})
                for (int64_t i = std::clamp<int64_t>(begin - slot.cached, 0, delta); i < delta; ++i) ++group[i];
        int32_t* target = out_.target.data + first_;
        int32_t token = slot.cached;
        while (token < slot.stored) {
            const int32_t page = token / model_.page_tokens, begin = page * model_.page_tokens;
            const int32_t end = std::min(begin + model_.page_tokens, slot.stored);
            count_up(target + (token - slot.cached), end - token, table[page] * model_.page_tokens + (token - begin));
            token = end;
        }
        std::fill(target + (token - slot.cached), target + delta, -1);
    }

    void write_user_tokens(const SlotSpan& slot, size_t b) {
        if (!extent_.has_users) return;
        const int64_t at = static_cast<int64_t>(b) * model_.user_bytes;
        std::memcpy(out_.raw + at, request_.features[b].data, static_cast<size_t>(model_.user_bytes));
        for (int32_t kind = slot.cached; kind < std::min(slot.encode_to, model_.users); ++kind) {
            const int64_t token = next_[kind]++;
            out_.row.data[token] = static_cast<int32_t>(first_ + kind - slot.cached);
            out_.source.data[token] = static_cast<int32_t>(at);
            out_.position.data[token] = out_.bucket.data[token] = 0;
        }
    }

    void write_behaviours(const SlotSpan& slot, const uint8_t* kept) {
        const int32_t users = model_.users, begin = std::max(slot.cached, users) - users;
        const int64_t count = std::max(slot.encode_to, users) - users - begin;
        if (count == 0) return;
        const int64_t token = next_[users], bytes = model_.behaviour_bytes;
        const int64_t at = extent_.behaviours_at + (token - extent_.first_token[users]) * bytes;
        std::memcpy(out_.raw + at, kept + begin * bytes, static_cast<size_t>(count * bytes));
        count_up(out_.row.data + token, count, first_ + users + begin - slot.cached);
        count_up(out_.source.data + token, count, at, bytes);
        count_up(out_.position.data + token, count, begin);
        // A generation's first behaviour follows nothing.
        int64_t before = time_of(kept + std::max(begin - 1, 0) * bytes);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t time = time_of(kept + (begin + i) * bytes);
            out_.bucket.data[token + i] = gap_bucket(before, time);
            before = time;
        }
        next_[users] += count;
    }

    int32_t gap_bucket(int64_t before, int64_t time) const {
        // Unsigned: times far apart wrap as they do elsewhere, and break no rule of the language.
        return model_.gaps.of(static_cast<int64_t>(static_cast<uint64_t>(time) - static_cast<uint64_t>(before)));
    }

    void write_candidates(const JobRows& job) {
        const int64_t count = job.candidates.rows;
        if (count == 0) return;
        const int32_t kind = model_.users + 1;
        const int64_t token = next_[kind], bytes = model_.candidate_bytes;
        const int64_t at = extent_.candidates_at + (token - extent_.first_token[kind]) * bytes;
        const size_t words = static_cast<size_t>(count) * sizeof(int32_t);
        std::memcpy(out_.raw + at, job.candidates.data, static_cast<size_t>(count * bytes));
        std::memcpy(out_.limit.data + first_, job.limits, words);
        std::fill_n(out_.group.data + first_, count, model_.plain_norm ? 0 : kGroupC);
        std::fill_n(out_.target.data + first_, count, -1);
        count_up(out_.row.data + token, count, first_);
        count_up(out_.source.data + token, count, at, bytes);
        std::fill_n(out_.position.data + token, count, 0);
        std::memcpy(out_.bucket.data + token, job.recency, words);
        next_[kind] += count;
        first_ += count;
    }

    const LayoutModel& model_;
    const BatchRequest& request_;
    const BatchOut& out_;
    const Extent& extent_;
    std::vector<int64_t> next_;  // the next token of each kind
    int64_t first_;              // the next row
    size_t slot_, job_;
};

// Writes a batch that has been checked. Large ones in parts, by several threads: the rows are copied out of as many histories, at the
// memory's pace, and the device waits for them.
class Writer {
public:
    Writer(const LayoutModel& model, const BatchRequest& request, const BatchOut& out, const Extent& extent)
        : model_(model), request_(request), out_(out), extent_(extent) {}

    void write() const {
        const std::vector<Place> places = cut();
        const size_t parts = places.size() - 1;
        const auto write = [&](size_t part) { part < parts ? write_part(places, part) : write_rest(); };
        if (parts > 1) return Crew::shared().run(parts + 1, write);
        write(0);
        write(1);
    }

private:
    // What lies behind the rows, and the tiles.
    void write_rest() const {
        const int64_t rows = extent_.rows();
        std::fill(out_.limit.data + rows, out_.limit.data + out_.limit.rows, 0);
        std::fill(out_.group.data + rows, out_.group.data + out_.group.rows, 0);
        std::fill(out_.target.data + rows, out_.target.data + out_.target.rows, -1);
        write_tiles();
    }

    void write_part(const std::vector<Place>& places, size_t part) const {
        SlotWriter(model_, request_, out_, extent_, places[part]).write(places[part + 1].slot);
    }

    // Where parts of about as many rows begin, and where the last ends.
    std::vector<Place> cut() const {
        const int64_t parts = std::clamp(extent_.rows() / model_.rows_of_part, int64_t{1}, kMaxParts);
        Place place;
        place.next = extent_.first_token;
        std::vector<Place> places{place};
        for (; place.slot < request_.slots.size(); pass(place))
            if (place.row * parts >= extent_.rows() * static_cast<int64_t>(places.size())) places.push_back(place);
        places.push_back(place);
        return places;
    }

    // From one slot to the next.
    void pass(Place& place) const {
        const SlotSpan& slot = request_.slots[place.slot++];
        const int32_t users = model_.users;
        for (int32_t kind = slot.cached; kind < std::min(slot.encode_to, users); ++kind) ++place.next[kind];
        place.next[users] += std::max(slot.encode_to, users) - std::max(slot.cached, users);
        place.row += slot.encode_to - slot.cached;
        for (int32_t i = 0; i < slot.jobs; ++i) {
            const int64_t candidates = request_.jobs[place.job++].candidates.rows;
            place.next[users + 1] += candidates;
            place.row += candidates;
        }
    }

    void write_tiles() const {
        int64_t tile = 0;
        const auto put = [&](int64_t kind, int64_t first, int64_t tokens) {
            const int32_t line[kTileWords] = {static_cast<int32_t>(kind), static_cast<int32_t>(first), static_cast<int32_t>(tokens), 0};
            std::memcpy(out_.tiles.data + kTileWords * tile++, line, sizeof line);
        };
        for (size_t kind = 0; kind + 1 < extent_.first_token.size(); ++kind) {
            const int64_t end = extent_.first_token[kind + 1];
            for (int64_t first = extent_.first_token[kind]; first < end; first += model_.tile_tokens)
                put(static_cast<int64_t>(kind), first, std::min<int64_t>(model_.tile_tokens, end - first));
        }
        while (tile < out_.tiles.rows) put(-1, 0, 0);
    }

    const LayoutModel& model_;
    const BatchRequest& request_;
    const BatchOut& out_;
    const Extent& extent_;
};

}  // namespace

BatchLayout::BatchLayout(LayoutModel model) : model_(std::move(model)) {
    const auto positive = [](int64_t value, const char* field) {
        if (value < 1 || value > kMaxTokens) throw invalid_argument(field, std::to_string(value) + " is not in 1..2^24");
    };
    if (model_.users < 0 || model_.users > kMaxTokens) throw invalid_argument("users", std::to_string(model_.users) + " is not in 0..2^24");
    if (model_.users > 0) positive(model_.user_bytes, "user_bytes");
    for (const auto& [bytes, field] : {std::pair{model_.behaviour_bytes, "behaviour_bytes"}, {model_.candidate_bytes, "candidate_bytes"}})
        if (bytes < 8 || bytes > kMaxInt32) throw invalid_argument(field, std::to_string(bytes) + " holds no int64 time_ms, or is above 2^31 - 1");
    positive(model_.page_tokens, "page_tokens");
    positive(model_.tile_tokens, "tile_tokens");
    positive(model_.rows_of_part, "rows_of_part");
}

BatchCounts BatchLayout::plan(const BatchRequest& request, const BatchOut& out) const {
    const Extent extent(model_, request);
    check_out(out, extent, static_cast<int64_t>(request.slots.size()));
    Writer(model_, request, out, extent).write();
    return {extent.tiles, extent.first_token};
}

}  // namespace mtserve
