#include "course.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mtserve {

namespace {

// Keys that prefix tokens [first, last) see in all: all `frozen` ones, and behind those each up to itself.
int64_t keys_seen(int64_t first, int64_t last, int64_t frozen) {
    const int64_t inside = std::max<int64_t>(0, std::min(last, frozen) - first) * frozen;
    const int64_t begin = std::max(first, frozen), end = std::max(last, frozen);
    return inside + (end * (end + 1) - begin * (begin + 1)) / 2;
}

class Course {
public:
    Course(const RestoreCosts& costs, const RestoreLayout& layout, const std::vector<RestoreNeed>& needs, int64_t rows,
           int64_t pairs, double link_busy_s)
        : costs_(costs), layout_(layout), ends_(layout.groups.begin() + 1, layout.groups.end()), link_from_(link_busy_s + costs.load_s) {
        int64_t absent_rows = 0, absent_pairs = 0, pages = 0;
        for (const RestoreNeed& need : needs) {
            absent_rows += need.host - need.cached;
            absent_pairs += keys_seen(need.cached, need.host, need.frozen);
            rows += need.prefix - need.host + need.candidates;
            pairs += keys_seen(need.host, need.prefix, need.frozen) + need.candidates * (need.prefix + 1);
            // Whole pages, that of the last cached token among them where it is not full.
            pages += (need.host + layout.page_tokens - 1) / layout.page_tokens - need.cached / layout.page_tokens;
        }
        ends_.push_back(layout.layers);
        grouped_pages_ = static_cast<double>(pages) * layout.grouped;
        bulk_pages_ = static_cast<double>(pages) - grouped_pages_;
        new_rows_ = rows;
        all_rows_ = rows + absent_rows;
        whole_s_ = costs.compute_s(all_rows_, pairs + absent_pairs);
        const double unpack_s = costs.unpack_s * layout.page_tokens;
        bulk_unpack_s_ = bulk_pages_ * unpack_s;
        loaded_s_ = costs.compute_s(rows, pairs) + grouped_pages_ * unpack_s;
        after_.resize(ends_.size());
        for (size_t group = ends_.size() - 1; group > 0; --group) after_[group - 1] = rest(group, ends_[group] - layout.groups[group]);
    }

    double end_s(int32_t first_layer) const {
        const int64_t first_rows = first_layer ? all_rows_ : new_rows_;
        const double encoded = costs_.batch_s + static_cast<double>(first_rows) * costs_.plan_row_s + first_layer * whole_s_;
        if (first_layer == layout_.layers) return encoded;
        const size_t group = static_cast<size_t>(
            std::upper_bound(layout_.groups.begin(), layout_.groups.end(), first_layer) - layout_.groups.begin() - 1);
        const Rest left = rest(group, ends_[group] - first_layer);
        const int32_t layers = layout_.layers - first_layer;
        const double bulk = bulk_s(layers), unpack = layers * bulk_unpack_s_;
        // Of the parts, that which decides is the first, behind which all is unpacked, or the last.
        const double first_part = bulk / layout_.parts + unpack, last_part = bulk + unpack / layout_.parts;
        const double begins = std::max({encoded + unpack, link_from_ + first_part, link_from_ + last_part});
        return std::max(begins + left.device_s, link_from_ + bulk + left.link_s);
    }

private:
    // Of what comes after a moment: seconds to the end from the device's being done with all before, and from the link's.
    struct Rest {
        double device_s = 0, link_s = 0;
    };

    // From before the last `layers` of `group` on. The later of the two ways decides the end.
    Rest rest(size_t group, int32_t layers) const {
        const double arrival = arrival_s(layers), work = layers * loaded_s_;
        const Rest& after = after_[group];
        return {work + after.device_s, arrival + std::max(work + after.device_s, after.link_s)};
    }

    // In which the link brings so many layers of the pages that come by groups. Behind whole pages come few, too few for runs.
    double arrival_s(int32_t layers) const {
        if (costs_.link.empty()) return 0;
        const double width = static_cast<double>(layers) * static_cast<double>(layout_.layer_bytes);
        const double run_pages = layout_.grouped == 1 ? layout_.run_pages : 1;
        return grouped_pages_ * width / costs_.bytes_per_s(static_cast<int64_t>(width * run_pages));
    }

    // In which it brings so many of those before them.
    double bulk_s(int32_t layers) const {
        if (bulk_pages_ == 0 || costs_.link.empty()) return 0;
        const double width = static_cast<double>(layers) * static_cast<double>(layout_.layer_bytes);
        return bulk_pages_ * width / costs_.bytes_per_s(static_cast<int64_t>(width * layout_.run_pages));
    }

    const RestoreCosts& costs_;
    const RestoreLayout& layout_;
    std::vector<int32_t> ends_;  // of the groups
    double link_from_, grouped_pages_, bulk_pages_, whole_s_, bulk_unpack_s_, loaded_s_;
    int64_t new_rows_, all_rows_;
    std::vector<Rest> after_;  // each group
};

}  // namespace

double RestoreCosts::bytes_per_s(int64_t piece) const {
    const auto above = std::upper_bound(link.begin(), link.end(), std::pair{piece, std::numeric_limits<double>::infinity()});
    if (above == link.begin()) return above->second * static_cast<double>(piece) / static_cast<double>(above->first);
    const auto& [low, low_rate] = *(above - 1);
    if (above == link.end()) return low_rate;
    const auto& [high, high_rate] = *above;
    const double ratio = static_cast<double>(piece) / static_cast<double>(low);
    const double share = std::log(ratio) / std::log(static_cast<double>(high) / static_cast<double>(low));
    return low_rate + share * (high_rate - low_rate);
}

std::vector<double> restore_ends(const RestoreCosts& costs, const RestoreLayout& layout, const std::vector<RestoreNeed>& needs,
                                 int64_t rows, int64_t pairs, double link_busy_s) {
    const Course course(costs, layout, needs, rows, pairs, link_busy_s);
    std::vector<double> ends;
    for (int32_t layer = 0; layer <= layout.layers; ++layer) ends.push_back(course.end_s(layer));
    return ends;
}

}  // namespace mtserve
