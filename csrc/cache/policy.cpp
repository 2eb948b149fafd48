// The policies by name.
#include "policy.h"

#include <type_traits>
#include <utility>

#include "errors.h"
#include "policies/arc.h"
#include "policies/belady.h"
#include "policies/gap_oracle.h"
#include "policies/gdsf.h"
#include "policies/locality.h"
#include "policies/lru.h"
#include "policies/s3fifo.h"
#include "policies/sieve.h"
#include "policies/wtinylfu.h"

namespace mtserve {

namespace {

using Maker = std::unique_ptr<Policy> (*)(int64_t capacity_pages);
using OracleMaker = std::unique_ptr<Policy> (*)(const Oracle& oracle);

template <typename P>
std::unique_ptr<Policy> make(int64_t capacity_pages) {
    if constexpr (std::is_default_constructible_v<P>) return std::make_unique<P>();
    else return std::make_unique<P>(capacity_pages);
}

template <typename P>
std::unique_ptr<Policy> make_with(const Oracle& oracle) {
    return std::make_unique<P>(oracle);
}

constexpr std::pair<const char*, Maker> kPolicies[] = {
    {"lru", make<Lru>},   {"sieve", make<Sieve>},       {"s3fifo", make<S3Fifo>},     {"arc", make<Arc>},
    {"gdsf", make<Gdsf>}, {"wtinylfu", make<WTinyLfu>}, {"locality", make<Locality>},
};
constexpr std::pair<const char*, OracleMaker> kOraclePolicies[] = {
    {"gap-oracle", make_with<GapOracle>},
    {"belady", make_with<Belady>},
};

template <typename Policies>
std::vector<std::string> names_of(const Policies& policies) {
    std::vector<std::string> names;
    for (const auto& [name, maker] : policies) names.push_back(name);
    return names;
}

}  // namespace

std::vector<std::string> policy_names() { return names_of(kPolicies); }

std::vector<std::string> oracle_policy_names() { return names_of(kOraclePolicies); }

std::unique_ptr<Policy> make_policy(const std::string& name, int64_t capacity_pages, const Oracle* oracle) {
    for (const auto& [each, maker] : kPolicies)
        if (name == each) return maker(capacity_pages);
    for (const auto& [each, maker] : kOraclePolicies) {
        if (name != each) continue;
        if (!oracle) throw invalid_argument("policy", "'" + name + "' needs an oracle, which only a finished trace has");
        return maker(*oracle);
    }
    std::string names;
    for (const auto& each : policy_names()) names += (names.empty() ? "" : ", ") + each;
    throw invalid_argument("policy", "'" + name + "' is not one of " + names);
}

}  // namespace mtserve
