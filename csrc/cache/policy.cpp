// The policies by name.
#include "policy.h"

#include <type_traits>
#include <utility>

#include "errors.h"
#include "policies/arc.h"
#include "policies/gdsf.h"
#include "policies/lru.h"
#include "policies/s3fifo.h"
#include "policies/sieve.h"
#include "policies/wtinylfu.h"

namespace mtserve {

namespace {

using Maker = std::unique_ptr<Policy> (*)(int64_t capacity_pages);

template <typename P>
std::unique_ptr<Policy> make(int64_t capacity_pages) {
    if constexpr (std::is_default_constructible_v<P>) return std::make_unique<P>();
    else return std::make_unique<P>(capacity_pages);
}

constexpr std::pair<const char*, Maker> kPolicies[] = {
    {"lru", make<Lru>}, {"sieve", make<Sieve>}, {"s3fifo", make<S3Fifo>},
    {"arc", make<Arc>}, {"gdsf", make<Gdsf>},   {"wtinylfu", make<WTinyLfu>},
};

}  // namespace

std::vector<std::string> policy_names() {
    std::vector<std::string> names;
    for (const auto& [name, maker] : kPolicies) names.push_back(name);
    return names;
}

std::unique_ptr<Policy> make_policy(const std::string& name, int64_t capacity_pages) {
    std::string names;
    for (const auto& [each, maker] : kPolicies) {
        if (name == each) return maker(capacity_pages);
        names += (names.empty() ? "" : ", ") + std::string(each);
    }
    throw invalid_argument("policy", "'" + name + "' is not one of " + names);
}

}  // namespace mtserve
