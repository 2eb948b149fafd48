#include "attention_work.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "../cache/errors.h"

namespace mtserve {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 24;  // of a slot's prefix, and rows of a batch
constexpr int32_t kGroup = 64;                    // rows of a warpgroup

// Microseconds of one key block of 64 for a tile of which 1 .. 3 warpgroups have rows, of an item beside
// its blocks, fitted to an H200 (benchmarks/bench_attention.py prints what they predict). Only ratios
// matter: a wrong constant makes a plan slower, never wrong.
struct Costs {
    int32_t tile_rows;
    double block[3];
    double item;
};

constexpr Costs kTiles128{128, {0.45, 0.66, 0.66}, 10.0};
constexpr Costs kTiles192{192, {0.60, 0.80, 1.05}, 11.0};
constexpr Costs kTiles128Wide{128, {1.00, 1.28, 1.28}, 17.0};  // head dim 256
// Head dims below 128 spend their time on SiLU, not on products, and so save less than they are smaller.
constexpr double kNarrow[2] = {0.70, 0.80};                     // 32, 64
// Partial sums are written and read once more, largely through L2: bytes a microsecond.
constexpr double kPartialBytes = 6e6;
// Tiles of a slot that are cut alike run side by side and read K and V through L2 once. Cut apart, each reads
// them from memory (bytes a microsecond) where all slots' do not fit L2; other work hides all but a share.
constexpr double kMemoryBytes = 3.5e6;
// Every item reads its own key blocks through L2; when all multiprocessors do, this bounds a block's time.
constexpr double kL2Rate = 5.5e6;
constexpr double kL2Bytes = 40e6;
constexpr double kExposedShare = 0.35;

// A deterministic sum is made of chunks of blocks, about so many of them a slot, none shorter than this: a compromise
// between a lone slot, which wants its tiles cut, and a full chip, where each chunk's end costs an addition in L2.
constexpr int32_t kLeastChunk = 6;
constexpr int32_t kChunks = 10, kChunksWide = 4;       // wide: head dim 256
constexpr double kCloseChunk = 0.5, kCloseWide = 3.0;  // microseconds
constexpr double kNoLimit = 1e300;
// How much longer an order may take that shares L2 better.
constexpr double kBalanceLoss = 1.02;
// Runs shorter than this are not worth an item of their own.
constexpr int32_t kMinRun = 3;

struct Tile {
    int32_t slot, row, rows, blocks;
    int32_t chunk, half;  // blocks of a chunk, and of the slot's first half of chunks; 0: sums end where runs do
    double block_cost;
    double cost() const { return blocks * block_cost; }
};

struct Run {
    int32_t tile, begin, end, split;
    double cost;
};

// Whether a run has chunks of both halves, and so makes two partial sums.
bool crosses(const Tile& tile, const Run& run) { return run.begin < tile.half && run.end > tile.half; }

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// The least and the most of `count` limits, and 0.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx2", "default")))
#endif
void bounds(const int32_t* limits, int32_t count, int32_t& least, int32_t& most) {
    int32_t low = 0, high = 0;
    for (int32_t i = 0; i < count; ++i) {
        low = limits[i] < low ? limits[i] : low;
        high = limits[i] > high ? limits[i] : high;
    }
    least = low;
    most = high;
}

// What the rows of a batch see at most, 64 by 64: slot b's are [first[b], first[b + 1]). Read once, for all tiles.
struct Groups {
    std::vector<size_t> first;
    std::vector<int32_t> most;
};

Groups check(const WorkRequest& r) {
    if (r.heads < 1 || r.heads > 1024) throw invalid_argument("heads", std::to_string(r.heads) + " is not in 1..1024");
    if (r.head_dim != 32 && r.head_dim != 64 && r.head_dim != 128 && r.head_dim != 256)
        throw invalid_argument("head_dim", std::to_string(r.head_dim) + " is not one of 32, 64, 128, 256");
    if (r.sms < 1 || r.sms > 4096) throw invalid_argument("sms", std::to_string(r.sms) + " is not in 1..4096");
    if (r.pieces < 0 || r.pieces > kMaxSplits)
        throw invalid_argument("pieces", std::to_string(r.pieces) + " is not in 0.." + std::to_string(kMaxSplits));
    if (r.deterministic && r.pieces > 1) throw invalid_argument("pieces", "a deterministic plan is cut by itself, or with 1 not at all");
    if (r.tile_rows != 0 && r.tile_rows != 128 && (r.tile_rows != 192 || r.head_dim == 256))
        throw invalid_argument("tile_rows", std::to_string(r.tile_rows) + " is not 128, or 192 with head dims up to 128");
    if (r.rows > kMaxTokens) throw invalid_argument("limits", "more than 2^24 rows");
    Groups groups{{0}, {}};
    int64_t next = 0;
    for (int64_t b = 0; b < r.slot_count; ++b) {
        const int32_t* slot = r.slots + 4 * b;
        const auto refuse = [b](const char* why) { throw invalid_argument("slots[" + std::to_string(b) + "]", why); };
        if (slot[0] < 0 || slot[1] < 0 || int64_t{slot[0]} + slot[1] > kMaxTokens)
            refuse("cached and delta must be >= 0 and together at most 2^24");
        if (slot[3] < slot[1]) refuse("has fewer rows than new tokens");
        if (slot[2] != next) refuse("first_row is not where the rows of the slot before end");
        next += slot[3];
        if (next > r.rows) break;
        for (int64_t row = slot[2]; row < next; row += kGroup) {
            int32_t least, most;
            bounds(r.limits + row, static_cast<int32_t>(std::min<int64_t>(kGroup, next - row)), least, most);
            if (least < 0 || most > slot[0] + slot[1])
                throw invalid_argument("limits", "a row of slots[" + std::to_string(b) + "] sees more than its prefix, or less than nothing");
            groups.most.push_back(most);
        }
        groups.first.push_back(groups.most.size());
    }
    if (next != r.rows) throw invalid_argument("limits", "needs one limit a row of the slots");
    return groups;
}

class Planner {
public:
    // `bound`: the estimate to beat; nothing is kept that does not.
    Planner(const WorkRequest& request, const Groups& groups, const Costs& costs, double bound = kNoLimit)
        : request_(request), groups_(groups), costs_(costs), best_(bound) {
        const double narrow = request.head_dim == 32 ? kNarrow[0] : request.head_dim == 64 ? kNarrow[1] : 1.0;
        for (int64_t b = 0; b < request.slot_count; ++b) add_tiles(static_cast<int32_t>(b), narrow);
        // All heads of an item run side by side, so that sms / heads items are under way at a time.
        lanes_ = std::max(1, request.sms / request.heads);
        total_ = std::accumulate(tiles_.begin(), tiles_.end(), 0.0, [](double sum, const Tile& t) { return sum + t.cost(); });
    }

    // Keeps the fastest of a few ways to cut, by estimate.
    void choose() {
        consider(uniform(1), 0.0);
        if (tiles_.size() > static_cast<size_t>(2 * lanes_)) return;
        const double reread = rereading();
        for (double slack : {1.0, 1.05, 1.12}) consider(even_shares(slack), reread);
        for (int rounds : {1, 2, 3})
            if (tiles_.size() <= static_cast<size_t>(rounds * lanes_)) consider(by_rounds(rounds), 0.0);
    }
    void choose_uniform(int32_t pieces) { consider(uniform(pieces), 0.0); }
    // Chunks are fixed, but the first run of each half may take any number of them, and one run the whole tile.
    void choose_chunks() {
        choose_whole();
        consider(by_chunks(kNoLimit), 0.0);
        for (int rounds : {1, 2, 3}) consider(by_chunks(std::max(1.0, total_ / (lanes_ * rounds))), 0.0);
    }
    void choose_whole() {
        runs_.clear();
        for (size_t t = 0; t < tiles_.size(); ++t) add_run(t, 0, tiles_[t].blocks, 0);
        consider(runs_, 0.0);
    }

    double estimate() const { return best_; }
    const std::vector<Run>& runs() const { return kept_; }
    const std::vector<Tile>& tiles() const { return tiles_; }
    int32_t tile_rows() const { return costs_.tile_rows; }
    // Key blocks that the 64 rows of `tile` from its row `at` on see.
    int32_t blocks_of(const Tile& tile, int32_t at) const {
        const int32_t* slot = request_.slots + 4 * tile.slot;
        return blocks_seen(slot, groups_.most[groups_.first[tile.slot] + (tile.row + at - slot[2]) / kGroup]);
    }

private:
    // Key blocks that a row with limit `limit` sees.
    static int32_t blocks_seen(const int32_t* slot, int32_t limit) {
        const int32_t pages = ceil_div(slot[0], kBlockTokens);
        return limit <= slot[0] ? ceil_div(limit, kBlockTokens) : pages + ceil_div(limit - slot[0], kBlockTokens);
    }
    bool wide() const { return request_.head_dim == 256; }
    double close_cost() const { return wide() ? kCloseWide : kCloseChunk; }

    void add_tiles(int32_t index, double narrow) {
        const int32_t* slot = request_.slots + 4 * index;
        const int32_t pages = ceil_div(slot[0], kBlockTokens);
        const int32_t most_blocks = pages + ceil_div(slot[1], kBlockTokens);
        const int32_t chunk = request_.deterministic ? std::max(kLeastChunk, ceil_div(most_blocks, wide() ? kChunksWide : kChunks)) : 0;
        const int32_t half = chunk ? chunk * ceil_div(ceil_div(most_blocks, chunk), 2) : 0;
        for (int32_t at = 0; at < slot[3]; at += costs_.tile_rows) {
            const int32_t row = slot[2] + at, rows = std::min(costs_.tile_rows, slot[3] - at);
            const int32_t* most_of = groups_.most.data() + groups_.first[index] + at / kGroup;
            const int32_t most = *std::max_element(most_of, most_of + ceil_div(rows, kGroup));
            const int32_t blocks = blocks_seen(slot, most);
            tiles_.push_back({index, row, rows, blocks, chunk, half, narrow * costs_.block[ceil_div(rows, kBlockTokens) - 1]});
        }
    }

    double run_cost(size_t tile, int32_t blocks, double block_cost) const {
        const int32_t chunk = tiles_[tile].chunk;
        const double closes = chunk && blocks > chunk ? close_cost() * (ceil_div(blocks, chunk) - 1) : 0.0;
        return costs_.item + blocks * block_cost + closes;
    }
    void add_run(size_t tile, int32_t begin, int32_t end, int32_t split) {
        runs_.push_back({static_cast<int32_t>(tile), begin, end, split, run_cost(tile, end - begin, tiles_[tile].block_cost)});
    }
    // First runs of a half of as many chunks as take about `target` microseconds, one at least; single ones behind them.
    const std::vector<Run>& by_chunks(double target) {
        runs_.clear();
        for (size_t t = 0; t < tiles_.size(); ++t) {
            const Tile& tile = tiles_[t];
            const double fit = std::min(1e6, (target - costs_.item) / (tile.chunk * tile.block_cost + close_cost()));
            const int32_t first = tile.chunk * std::max(1, static_cast<int32_t>(fit));
            int32_t at = 0, split = 0;
            for (const int32_t end : {std::min(tile.half, tile.blocks), tile.blocks})
                for (int32_t take = first; at < end || split == 0; take = tile.chunk) {
                    const int32_t to = std::min(at + take, end);
                    add_run(t, at, to, split++);
                    at = to;
                }
        }
        return runs_;
    }
    void cut(size_t tile, int32_t pieces) {
        const int64_t blocks = tiles_[tile].blocks;
        pieces = std::clamp<int32_t>(pieces, 1, std::clamp<int32_t>(tiles_[tile].blocks, 1, kMaxSplits));
        for (int32_t i = 0; i < pieces; ++i)
            add_run(tile, static_cast<int32_t>(blocks * i / pieces), static_cast<int32_t>(blocks * (i + 1) / pieces), i);
    }
    const std::vector<Run>& uniform(int32_t pieces) {
        runs_.clear();
        for (size_t t = 0; t < tiles_.size(); ++t) cut(t, pieces);
        return runs_;
    }
    // Runs as short as `rounds` of them for each lane allow.
    const std::vector<Run>& by_rounds(int rounds) {
        const auto pieces = [this](const Tile& tile, double chunk) {
            return std::clamp<int64_t>(static_cast<int64_t>(tile.cost() / chunk + 0.999), 1, kMaxSplits);
        };
        double chunk = std::max(1.0, total_ / (lanes_ * rounds));
        for (;; chunk *= 1.06) {
            int64_t items = 0;
            for (const Tile& tile : tiles_) items += pieces(tile, chunk);
            if (items <= int64_t{rounds} * lanes_) break;  // at last one a tile, which fits
        }
        runs_.clear();
        for (size_t t = 0; t < tiles_.size(); ++t) cut(t, static_cast<int32_t>(pieces(tiles_[t], chunk)));
        return runs_;
    }
    // Every lane gets the same share of the whole, laid out tile after tile, whose cuts fall where a share is full.
    const std::vector<Run>& even_shares(double slack) {
        const double items = static_cast<double>(std::max<size_t>(tiles_.size(), lanes_)) + lanes_ / 2.0;
        const double share = slack * (total_ + costs_.item * items) / lanes_;
        double room = share;
        runs_.clear();
        for (size_t t = 0; t < tiles_.size(); ++t) {
            const Tile& tile = tiles_[t];
            int32_t at = 0, split = 0;
            do {
                if (room < costs_.item + kMinRun * tile.block_cost) room = share;
                int32_t take = std::min(tile.blocks - at, std::max<int32_t>(kMinRun, (room - costs_.item) / tile.block_cost));
                if (tile.blocks - at - take < kMinRun || split == kMaxSplits - 1) take = tile.blocks - at;
                add_run(t, at, at + take, split++);
                room -= runs_.back().cost;
                at += take;
            } while (at < tile.blocks);
        }
        return runs_;
    }

    // Microseconds of the launch when items are taken in this order, each by the lane that is free first.
    double makespan(const std::vector<Run>& runs) {
        const size_t lanes = std::min(runs.size(), static_cast<size_t>(lanes_));
        lane_ends_.clear();
        for (size_t i = 0; i < lanes; ++i) lane_ends_.push_back(runs[i].cost);
        std::make_heap(lane_ends_.begin(), lane_ends_.end(), std::greater<>());
        for (size_t i = lanes; i < runs.size(); ++i) {
            std::pop_heap(lane_ends_.begin(), lane_ends_.end(), std::greater<>());
            lane_ends_.back() += runs[i].cost;
            std::push_heap(lane_ends_.begin(), lane_ends_.end(), std::greater<>());
        }
        return lanes ? *std::max_element(lane_ends_.begin(), lane_ends_.end()) : 0.0;
    }

    // Microseconds for what goes through memory: fp32 partial sums, or a direct output of 2 bytes, written and read.
    double traffic(const std::vector<Run>& runs) const {
        double rows = 0.0;
        bool split = false;
        for (const Run& run : runs) {
            const Tile& tile = tiles_[run.tile];
            rows += crosses(tile, run) ? 2 * tile.rows : tile.rows;
            split = split || tile.chunk || run.split > 0;
        }
        return rows * request_.heads * request_.head_dim * (split ? 8.0 : 4.0) / kPartialBytes;
    }

    // Microseconds that tiles of a slot lose when they do not share what they read.
    double rereading() const {
        const double token_bytes = 4.0 * request_.heads * request_.head_dim;
        double once = 0.0, again = 0.0;
        for (size_t t = 0; t < tiles_.size(); ++t) {
            const bool first = t == 0 || tiles_[t].slot != tiles_[t - 1].slot;
            (first ? once : again) += token_bytes * kBlockTokens * tiles_[t].blocks;
        }
        return once > kL2Bytes ? kExposedShare * again / kMemoryBytes : 0.0;
    }

    // What the runs cost when as many of them as there are multiprocessors read at once.
    void contend() {
        const double busy = std::min<double>(request_.sms, static_cast<double>(runs_.size()) * request_.heads);
        const double block = 4.0 * kBlockTokens * request_.head_dim * busy / kL2Rate;
        for (Run& run : runs_)
            run.cost = run_cost(run.tile, run.end - run.begin, std::max(block, tiles_[run.tile].block_cost));
    }

    void consider(const std::vector<Run>& runs, double reread) {
        contend();
        double sum = 0.0, longest = 0.0;
        for (const Run& run : runs) {
            sum += run.cost;
            longest = std::max(longest, run.cost);
        }
        const double memory = traffic(runs) + reread;
        if (std::max(sum / lanes_, longest) + memory >= best_) return;

        // Longest first balances best. Slot by slot, longest first within each, keeps a slot's K and V in L2
        // while its tiles run, and is taken where it costs next to nothing.
        order_ = runs;
        std::stable_sort(order_.begin(), order_.end(), [](const Run& a, const Run& b) { return a.cost > b.cost; });
        double time = makespan(order_);
        by_slot_ = runs;
        std::stable_sort(by_slot_.begin(), by_slot_.end(), [this](const Run& a, const Run& b) {
            const int32_t slot_a = tiles_[a.tile].slot, slot_b = tiles_[b.tile].slot;
            return slot_a != slot_b ? slot_a < slot_b : a.cost > b.cost;
        });
        if (const double slots_time = makespan(by_slot_); slots_time <= kBalanceLoss * time) {
            time = slots_time;
            order_.swap(by_slot_);
        }
        if (time + memory >= best_) return;
        best_ = time + memory;
        kept_.swap(order_);
    }

    const WorkRequest& request_;
    const Groups& groups_;
    const Costs& costs_;
    std::vector<Tile> tiles_;
    std::vector<Run> runs_, order_, by_slot_, kept_;
    std::vector<double> lane_ends_;
    int32_t lanes_ = 1;
    double total_ = 0.0;
    double best_;
};

WorkPlan write(const Planner& planner, const WorkRequest& request, const WorkOut& out) {
    const int64_t items = static_cast<int64_t>(planner.runs().size());
    if (items > out.capacity)
        throw invalid_argument("out_work", std::to_string(items) + " items; there is room for " + std::to_string(out.capacity));
    struct Splits {
        int32_t first = 0, second = 0;  // partial sums of each half; all are of the first where there are no halves
        bool crossing = false;
    };
    std::vector<Splits> splits(planner.tiles().size());
    int32_t* word = out.work;
    for (const Run& run : planner.runs()) {
        const Tile& tile = planner.tiles()[run.tile];
        const bool both = crosses(tile, run);
        const int32_t item[kItemWords] = {tile.slot, tile.row, tile.rows, run.begin, run.end, run.split, tile.chunk, both ? tile.half : 0};
        word = std::copy(item, item + kItemWords, word);
        Splits& of = splits[run.tile];
        ++(tile.half && run.begin >= tile.half && run.begin ? of.second : of.first);
        if (both) of.crossing = true;
    }
    int32_t most = 1;
    for (size_t t = 0; t < splits.size(); ++t) {
        const Tile& tile = planner.tiles()[t];
        for (int32_t at = 0; at < tile.rows; at += kGroup) {
            // A warpgroup that sees nothing of the second half makes no second sum in a run that has both.
            const int32_t second = splits[t].crossing ? planner.blocks_of(tile, at) > tile.half : splits[t].second;
            const int32_t all = splits[t].first + second;
            const int32_t coded = request.deterministic ? all | splits[t].first << kFirstHalfShift : all;
            std::fill_n(out.splits + tile.row + at, std::min(kGroup, tile.rows - at), coded);
            most = std::max(most, all);
        }
    }
    std::fill(out.splits + request.rows, out.splits + out.splits_size, 0);
    return {items, most, planner.tile_rows()};
}

}  // namespace

WorkPlan plan_attention_work(const WorkRequest& request, const WorkOut& out) {
    const Groups groups = check(request);
    if (out.splits_size < request.rows) throw invalid_argument("out_splits", "needs one entry a row");
    const auto planned = [&](const Costs& costs, double bound = kNoLimit) {
        Planner planner(request, groups, costs, bound);
        if (request.deterministic && request.pieces == 1) planner.choose_whole();
        else if (request.deterministic) planner.choose_chunks();
        else if (request.pieces) planner.choose_uniform(request.pieces);
        else planner.choose();
        return planner;
    };
    if (request.head_dim == 256) return write(planned(kTiles128Wide), request, out);
    if (request.tile_rows == 128) return write(planned(kTiles128), request, out);
    const Planner tiles192 = planned(kTiles192);
    if (request.tile_rows == 192 || tiles192.tiles().empty()) return write(tiles192, request, out);
    const Planner tiles128 = planned(kTiles128, tiles192.estimate());
    return write(tiles128.runs().empty() ? tiles192 : tiles128, request, out);
}

}  // namespace mtserve
