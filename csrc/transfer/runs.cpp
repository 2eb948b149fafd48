#include "runs.h"

#include <cstddef>

namespace mtserve {

namespace {

bool begins_run(const int32_t* left, const int32_t* right, int64_t i, int64_t boundary) {
    return i == 0 || left[i] != left[i - 1] + 1 || right[i] != right[i - 1] + 1 || (boundary && right[i] % boundary == 0);
}

}  // namespace

int64_t count_runs(const int32_t* left, const int32_t* right, int64_t count, int64_t boundary) {
    int64_t runs = 0;
    for (int64_t i = 0; i < count; ++i) runs += begins_run(left, right, i, boundary);
    return runs;
}

std::vector<int64_t> find_runs(const int32_t* left, const int32_t* right, int64_t count, int64_t boundary) {
    std::vector<int64_t> begins;
    for (int64_t i = 0; i < count; ++i)
        if (begins_run(left, right, i, boundary)) begins.push_back(i);
    const std::size_t runs = begins.size();
    std::vector<int64_t> found(3 * runs);
    for (std::size_t run = 0; run < runs; ++run) {
        const int64_t begin = begins[run], end = run + 1 < runs ? begins[run + 1] : count;
        found[run] = left[begin];
        found[runs + run] = right[begin];
        found[2 * runs + run] = end - begin;
    }
    return found;
}

}  // namespace mtserve
