// How one batch would go that restores states from the host: when its last layer is done, for each layer from which on the
// link might bring them. As described in mtserve/restore/choice.py.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace mtserve {

// As documented in mtserve/restore/costs.py; seconds.
struct RestoreCosts {
    std::vector<std::pair<int64_t, double>> link;  // (bytes of a piece, bytes a second), sizes rising
    double load_s, batch_s, layer_s, row_s, pair_s, unpack_s, plan_row_s;

    double compute_s(int64_t rows, int64_t pairs) const {
        return layer_s + static_cast<double>(rows) * row_s + static_cast<double>(pairs) * pair_s;
    }
    // Of pieces of so many bytes, 1 or more; `link` is not empty.
    double bytes_per_s(int64_t piece) const;
};

// As documented in mtserve/restore/choice.py.
struct RestoreLayout {
    int32_t layers, page_tokens;
    int64_t layer_bytes;
    std::vector<int32_t> groups;  // first layer of each; the first of them 0
    double run_pages, grouped;
    int32_t parts;
};

struct RestoreNeed {
    int64_t prefix, cached, host, candidates, frozen;
};

// Seconds to the end of the last layer if layers from k on are loaded, for k from 0 to `layers`. `rows`, `pairs`: what
// every layer computes beside the needs.
std::vector<double> restore_ends(const RestoreCosts& costs, const RestoreLayout& layout, const std::vector<RestoreNeed>& needs,
                                 int64_t rows, int64_t pairs, double link_busy_s);

}  // namespace mtserve
