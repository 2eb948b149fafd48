#include "page_move.h"

#include <algorithm>
#include <cstring>

#include "../cache/errors.h"
#include "runs.h"

namespace mtserve {

namespace {

void check_ids(const std::vector<int32_t>& ids, int64_t pages, const char* field) {
    for (const int32_t id : ids)
        if (id < 0 || id >= pages)
            throw invalid_argument(field, "page " + std::to_string(id) + " is not within 0.." + std::to_string(pages - 1));
}

void put(std::string& parameter, int64_t at, const int32_t* values, int64_t count) {
    std::memcpy(parameter.data() + at, values, static_cast<size_t>(count) * sizeof *values);
}

void put(std::string& parameter, int64_t at, int64_t value) {
    const int32_t narrow = static_cast<int32_t>(value);
    put(parameter, at, &narrow, 1);
}

}  // namespace

DriverFailure PageKernel::launch(const DriverFunctions& driver, const int32_t* pages, int64_t count, int64_t first,
                                 int64_t last, uintptr_t stream) const {
    std::vector<std::string> values = parameters;
    std::string& fields = values[paged];
    put(fields, at_first, first);
    put(fields, at_last, last);
    for (int64_t begin = 0; begin < count; begin += most_pages) {
        const int64_t some = std::min(most_pages, count - begin);
        put(fields, at_count, some);
        put(fields, at_pages, pages + begin, some);
        const int64_t tiles = (last - first) * ((some + tile_pages - 1) / tile_pages) * column_tiles;
        const int64_t blocks = most_blocks ? std::min(most_blocks, tiles) : tiles;
        const DriverFailure failed =
            driver.queue_launch(function, static_cast<uint32_t>(blocks), threads, shared_bytes, stream, values);
        if (failed.function) return failed;
    }
    return {};
}

void PageMove::check() const {
    if (pool_pages.size() != arena_pages.size()) throw invalid_argument("host_pages", "needs as many pages as gpu_pages");
    check_ids(pool_pages, link.pool_pages, "gpu_pages");
    check_ids(arena_pages, link.arena_pages, "host_pages");
    const int64_t count = static_cast<int64_t>(pool_pages.size());
    for (const MoveStep& step : steps) {
        if (step.begin < 0 || step.begin > step.end || step.end > count || step.make_begin < 0 ||
            step.make_begin > step.make_end || step.make_end > count)
            throw invalid_argument("steps", "pages outside 0.." + std::to_string(count));
        if (step.first < 0 || step.first > step.last || step.last > link.layers)
            throw invalid_argument("steps", "layers outside 0.." + std::to_string(link.layers));
        if (step.made && !step.copied) throw invalid_argument("steps", "what is made waits for an event of the copies");
        if (step.made && step.make_begin < step.make_end && kernel.parameters.empty())
            throw invalid_argument("kernel", "is needed for what is to be made");
    }
}

void PageMove::run(const DriverFunctions& driver, const std::atomic<bool>& stopping, DriverFailure& first) const {
    for (const MoveStep& step : steps) {
        if (stopping) return;
        if (!first.function && step.begin < step.end && step.first < step.last) first.note(copy(driver, step));
        if (stopping) return;
        if (step.copied) first.note(driver.queue_record(step.copied, stream));
        if (!step.made) continue;
        if (stopping) return;
        first.note(driver.queue_wait(make_stream, step.copied));
        if (stopping) return;
        const int64_t count = step.make_end - step.make_begin;
        if (!first.function && count && step.first < step.last)
            first.note(kernel.launch(driver, pool_pages.data() + step.make_begin, count, step.first, step.last, make_stream));
        if (stopping) return;
        first.note(driver.queue_record(step.made, make_stream));
    }
}

DriverFailure PageMove::copy(const DriverFunctions& driver, const MoveStep& step) const {
    const size_t begin = static_cast<size_t>(step.begin), count = static_cast<size_t>(step.end - step.begin);
    const std::vector<int64_t> found =
        find_runs(pool_pages.data() + begin, arena_pages.data() + begin, static_cast<int64_t>(count), link.chunk_pages);
    const size_t runs = found.size() / 3;
    const int64_t page = link.page_bytes(), offset = step.first * link.layer_bytes;
    const int64_t width = (step.last - step.first) * link.layer_bytes;
    const bool whole = width == page, strided = static_cast<int64_t>(count) * width >= link.strided_bytes * static_cast<int64_t>(runs);
    std::vector<int64_t> to, source, sizes;
    const auto add = [&](int64_t pool_page, int64_t arena_page, int64_t size) {
        const int64_t inside = link.pool + pool_page * page + offset, outside = link.arena + arena_page * page + offset;
        to.push_back(to_pool ? inside : outside);
        source.push_back(to_pool ? outside : inside);
        sizes.push_back(size);
    };
    for (size_t run = 0; run < runs; ++run) {
        const int64_t inside = found[run], outside = found[runs + run], pages = found[2 * runs + run];
        if (whole) add(inside, outside, pages * page);
        else if (strided) add(inside, outside, pages);
        else for (int64_t at = 0; at < pages; ++at) add(inside + at, outside + at, width);
    }
    if (!whole && strided) return driver.queue_strided(to, source, sizes, width, page, stream);
    return driver.queue_batch(to, source, sizes, stream);
}

}  // namespace mtserve
