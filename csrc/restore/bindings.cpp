// Python's view of what restoring costs in mtserve._core. Signatures are documented in mtserve/_core.pyi.
#include "bindings.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "../cache/errors.h"
#include "course.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mtserve {
namespace {

constexpr size_t kNeedWords = 5;
constexpr int64_t kMostTokens = int64_t{1} << 30;  // of a prefix: what is seen of it fits 64 bits

void require(bool so, const char* field, const char* wanted) {
    if (!so) throw invalid_argument(field, wanted);
}

std::vector<RestoreNeed> needs_of(const std::vector<int64_t>& words) {
    require(words.size() % kNeedWords == 0, "needs", "needs 5 numbers each");
    std::vector<RestoreNeed> needs;
    for (size_t at = 0; at < words.size(); at += kNeedWords) {
        const RestoreNeed need{words[at], words[at + 1], words[at + 2], words[at + 3], words[at + 4]};
        require(0 <= need.cached && need.cached < need.host && need.host <= need.prefix && need.prefix <= kMostTokens, "needs",
                "needs 0 <= cached < host <= prefix <= 2^30");
        require(need.candidates >= 0 && need.candidates <= kMostTokens && need.frozen >= 0 && need.frozen <= kMostTokens, "needs",
                "needs candidates and frozen tokens from 0 to 2^30");
        needs.push_back(need);
    }
    return needs;
}

RestoreLayout layout_of(int32_t layers, int32_t page_tokens, int64_t layer_bytes, std::vector<int32_t> groups, double run_pages,
                        double grouped, int32_t parts) {
    require(layers >= 1 && page_tokens >= 1 && layer_bytes >= 1 && run_pages >= 1 && parts >= 1, "layout", "needs sizes from 1 on");
    require(grouped >= 0 && grouped <= 1, "grouped", "needs a share from 0 to 1");
    require(!groups.empty() && groups.front() == 0 && groups.back() < layers, "groups", "needs layers from 0 on");
    for (size_t at = 1; at < groups.size(); ++at) require(groups[at - 1] < groups[at], "groups", "needs rising layers");
    return {layers, page_tokens, layer_bytes, std::move(groups), run_pages, grouped, parts};
}

}  // namespace

void bind_restore(nb::module_& module) {
    nb::class_<RestoreCosts>(module, "_RestoreCosts")
        .def("__init__",
             [](RestoreCosts* self, std::vector<std::pair<int64_t, double>> link, double load_s, double batch_s, double layer_s,
                double row_s, double pair_s, double unpack_s, double plan_row_s) {
                 new (self) RestoreCosts{std::move(link), load_s, batch_s, layer_s, row_s, pair_s, unpack_s, plan_row_s};
             },
             "link"_a, "load_s"_a, "batch_s"_a, "layer_s"_a, "row_s"_a, "pair_s"_a, "unpack_s"_a, "plan_row_s"_a)
        .def("compute_s", &RestoreCosts::compute_s, "rows"_a, "pairs"_a)
        .def("bytes_per_s", [](const RestoreCosts& costs, int64_t piece) {
            require(!costs.link.empty(), "link", "is not known");
            require(piece >= 1, "piece", "needs bytes from 1 on");
            return costs.bytes_per_s(piece);
        }, "piece"_a);
    module.def("_restore_ends",
               [](const RestoreCosts& costs, int32_t layers, int32_t page_tokens, int64_t layer_bytes, std::vector<int32_t> groups,
                  double run_pages, double grouped, int32_t parts, const std::vector<int64_t>& needs, int64_t rows, int64_t pairs,
                  double link_busy_s) {
                   return restore_ends(costs, layout_of(layers, page_tokens, layer_bytes, std::move(groups), run_pages, grouped, parts),
                                       needs_of(needs), rows, pairs, link_busy_s);
               },
               "costs"_a, "layers"_a, "page_tokens"_a, "layer_bytes"_a, "groups"_a, "run_pages"_a, "grouped"_a, "parts"_a,
               "needs"_a, "rows"_a, "pairs"_a, "link_busy_s"_a);
}

}  // namespace mtserve
