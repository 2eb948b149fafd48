// Pages on their way between the tiers: which copies bring them, and what is made of them once they are there.
//
// Of a load some layers may come before others, and some pages before others, each with an event of its own; what comes
// packed is unpacked by a kernel on a second stream, which waits for it. All that is done once a page or a run of pages is
// done here, by the thread that makes the calls.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "driver_calls.h"

namespace mtserve {

// Pools of equal pages, `layers` of `layer_bytes` each side by side, at two addresses.
struct PageLink {
    int64_t pool, pool_pages, arena, arena_pages, layers, layer_bytes;
    int64_t chunk_pages;    // no copy crosses a multiple of so many pages of the arena; 0: any may
    int64_t strided_bytes;  // of a run, in the mean, from which on layers are copied by strides

    int64_t page_bytes() const { return layers * layer_bytes; }
};

// A kernel that works on listed pages and a range of layers. One of its parameters is a struct with int32 fields for the
// first layer, the last, the number of pages, and `most_pages` page ids; `at_...` are their offsets in bytes. It takes
// `column_tiles` blocks for each layer and `tile_pages` pages, but no more than `most_blocks` (0: any number).
struct PageKernel {
    uintptr_t function;
    uint32_t threads, shared_bytes;
    std::vector<std::string> parameters;
    size_t paged;
    int64_t at_first, at_last, at_count, at_pages, most_pages;
    int64_t tile_pages, column_tiles, most_blocks;

    DriverFailure launch(const DriverFunctions& driver, const int32_t* pages, int64_t count, int64_t first, int64_t last,
                         uintptr_t stream) const;
};

// Copy layers [first, last) of pages [begin, end) of the list; then `copied`, if any, marks where their stream stands. Where
// there is a `made`, the second stream waits for that, the kernel runs on it over the same layers of pages [make_begin,
// make_end), and `made` marks where it stands. Events are addresses, 0: none.
struct MoveStep {
    int64_t begin, end, first, last;
    uintptr_t copied;
    int64_t make_begin, make_end;
    uintptr_t made;
};

// One submission: pages of the pool and their twins of the arena, and what is done with them.
struct PageMove {
    PageLink link;
    bool to_pool;
    std::vector<int32_t> pool_pages, arena_pages;
    std::vector<MoveStep> steps;
    uintptr_t stream, make_stream;
    PageKernel kernel;  // of moves of which something is made

    // Throws InvalidArgument for pages, layers and steps that there are not.
    void check() const;
    // Makes the calls. After a failure, also one `first` has from before, copies and launches are left out; events are
    // recorded and waited for all the same. Notes the first failure; ends early once `stopping`.
    void run(const DriverFunctions& driver, const std::atomic<bool>& stopping, DriverFailure& first) const;

private:
    DriverFailure copy(const DriverFunctions& driver, const MoveStep& step) const;
};

}  // namespace mtserve
