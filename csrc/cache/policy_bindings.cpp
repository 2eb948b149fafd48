// Python's view of the policies by themselves. Signatures are documented in mtserve/_core.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <unordered_set>

#include "buffers.h"
#include "policies/bindings.h"
#include "policies/solo.h"
#include "policies/trace_oracle.h"
#include "policies/trace_replay.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mtserve {
namespace {

std::unordered_set<Slot> slot_set(nb::sequence slots, const char* field) {
    std::unordered_set<Slot> set;
    for (const nb::handle item : slots) {
        Slot slot = 0;
        if (!nb::try_cast(item, slot)) throw invalid_argument(field, "needs slots, 0 to 2^32 - 1");
        set.insert(slot);
    }
    return set;
}

const int32_t* numbers(const Buffer& buffer, const char* field) {
    if (buffer.rank() != 1 || !buffer.holds(4, "il")) throw invalid_argument(field, "needs a one-dimensional int32 array");
    return buffer.data<int32_t>();
}

// Seconds, finite and in order.
const double* times(const Buffer& buffer, int64_t requests) {
    if (buffer.rank() != 1 || !buffer.holds(8, "d") || buffer.extent(0) != requests)
        throw invalid_argument("t_s", "needs a float64 array of " + std::to_string(requests));
    const double* all = buffer.data<double>();
    if (!std::all_of(all, all + requests, [](double t) { return std::isfinite(t); }) || !std::is_sorted(all, all + requests))
        throw invalid_argument("t_s", "needs finite seconds in ascending order");
    return all;
}

void check_users(const int32_t* users, int64_t requests, int64_t known) {
    if (!std::all_of(users, users + requests, [known](int32_t user) { return user >= 0 && user < known; }))
        throw invalid_argument("users", "each is a number below " + std::to_string(known));
}

int64_t replay(Solo& solo, nb::handle users, nb::handle pages, int64_t recent, double start_s, double every_s) {
    const Buffer user_ids(users, "users", PyBUF_FORMAT), sizes(pages, "pages", PyBUF_FORMAT);
    const int32_t *ids = numbers(user_ids, "users"), *each = numbers(sizes, "pages");
    const int64_t requests = user_ids.extent(0), known = sizes.extent(0);
    if (recent < 0 || recent > 1024) throw invalid_argument("recent", std::to_string(recent) + " is outside 0 to 1024");
    if (!std::isfinite(start_s) || !(every_s >= 0 && every_s <= 1e6))
        throw invalid_argument("every_s", "needs 0 to 1e6 seconds, from a finite start_s on");
    check_users(ids, requests, known);
    if (!std::all_of(each, each + known, [](int32_t count) { return count > 0; }))
        throw invalid_argument("pages", "a user has at least 1");
    return solo.replay(ids, requests, each, known, recent, start_s, every_s);
}

// A trace in numpy's arrays, checked, while it is in use.
class TraceArrays {
public:
    TraceArrays(nb::handle users, nb::handle t_s, nb::handle tokens, nb::handle found, int64_t known, int64_t page_tokens)
        : users_(users, "users", PyBUF_FORMAT), times_(t_s, "t_s", PyBUF_FORMAT), tokens_(tokens, "tokens", PyBUF_FORMAT),
          found_(found, "found", PyBUF_FORMAT | PyBUF_WRITABLE) {
        numbers(found_, "found");
        if (known < 1 || known > kMostUsers)
            throw invalid_argument("known", std::to_string(known) + " is outside 1 to " + std::to_string(kMostUsers));
        if (page_tokens < 1 || page_tokens > 1024)
            throw invalid_argument("page_tokens", std::to_string(page_tokens) + " is outside 1 to 1024");
        const int64_t count = users_.extent(0);
        const int32_t *ids = numbers(users_, "users"), *wanted = numbers(tokens_, "tokens");
        if (tokens_.extent(0) != count || found_.extent(0) != count)
            throw invalid_argument("tokens", "needs a number for each of " + std::to_string(count) + " requests, as found does");
        if (!std::all_of(wanted, wanted + count, [](int32_t each) { return each >= 0 && each <= kMostTokens; }))
            throw invalid_argument("tokens", "a prefix has 0 to " + std::to_string(kMostTokens));
        check_users(ids, count, known);
        requests_ = {ids, times(times_, count), wanted, count, static_cast<int32_t>(known), static_cast<int32_t>(page_tokens)};
    }

    const Requests& requests() const { return requests_; }
    int32_t* found() const { return found_.data<int32_t>(); }

private:
    static constexpr int64_t kMostUsers = 1 << 27;
    static constexpr int32_t kMostTokens = 1 << 24;
    const Buffer users_, times_, tokens_, found_;
    Requests requests_{};
};

int64_t checked_pages(int64_t pages) {
    if (pages < 0 || pages > INT32_MAX)
        throw invalid_argument("capacity_pages", std::to_string(pages) + " is outside 0 to " + std::to_string(INT32_MAX));
    return pages;
}

// Each user's key is that of its number.
std::unique_ptr<TraceOracle> oracle_of(const Requests& requests) {
    std::vector<uint64_t> keys(requests.count);
    std::transform(requests.users, requests.users + requests.count, keys.begin(), Requests::key);
    return std::make_unique<TraceOracle>(keys.data(), requests.t_s, requests.count);
}

void replay_trace(const std::string& name, int64_t capacity_pages, nb::handle users, nb::handle t_s, nb::handle tokens,
                  nb::handle found, int64_t known, int64_t page_tokens) {
    const TraceArrays arrays(users, t_s, tokens, found, known, page_tokens);
    const nb::gil_scoped_release unlocked;
    const Requests& requests = arrays.requests();
    const std::vector<std::string> clairvoyant = oracle_policy_names();
    const bool asks = std::find(clairvoyant.begin(), clairvoyant.end(), name) != clairvoyant.end();
    const std::unique_ptr<TraceOracle> oracle = asks ? oracle_of(requests) : nullptr;
    const std::unique_ptr<Policy> policy = make_policy(name, checked_pages(capacity_pages), oracle.get());
    TraceReplay replay(*policy, capacity_pages, requests);
    for (int64_t i = 0; i < requests.count; ++i) arrays.found()[i] = replay.serve(i);
    policy->check();
}

void find_optimum(int64_t capacity_pages, nb::handle users, nb::handle t_s, nb::handle tokens, nb::handle found, int64_t known,
                  int64_t page_tokens) {
    const TraceArrays arrays(users, t_s, tokens, found, known, page_tokens);
    const nb::gil_scoped_release unlocked;
    optimum(arrays.requests(), checked_pages(capacity_pages), arrays.found());
}

TraceOracle* new_oracle(nb::handle keys, nb::handle t_s) {
    const Buffer all(keys, "keys", PyBUF_FORMAT), seconds(t_s, "t_s", PyBUF_FORMAT);
    if (all.rank() != 1 || !all.holds(8, "LQ")) throw invalid_argument("keys", "needs a one-dimensional uint64 array");
    return new TraceOracle(all.data<uint64_t>(), times(seconds, all.extent(0)), all.extent(0));
}

std::optional<Slot> victim(Solo& solo, nb::sequence pinned, double now) {
    const Slot slot = solo.victim(slot_set(pinned, "pinned"), now);
    return slot == kNoSlot ? std::nullopt : std::optional<Slot>(slot);
}

}  // namespace

void bind_policy(nb::module_& module) {
    module.def("policy_names", &policy_names);
    module.def("oracle_policy_names", &oracle_policy_names);
    nb::class_<TraceOracle>(module, "_TraceOracle").def(nb::new_(&new_oracle), "keys"_a, "t_s"_a);
    nb::class_<Solo>(module, "_Policy")
        .def(nb::init<const std::string&, int64_t, const TraceOracle*>(), "name"_a, "capacity_pages"_a,
             "oracle"_a.none() = nb::none(), nb::keep_alive<1, 4>())
        .def("insert", &Solo::insert, "slot"_a, "key"_a, "pages"_a, "now"_a = 0.0, "cost"_a = 1.0)
        .def("access", &Solo::access, "slot"_a, "now"_a = 0.0)
        .def("refresh", &Solo::refresh, "slot"_a, "now"_a = 0.0)
        .def("resize", &Solo::resize, "slot"_a, "pages"_a)
        .def("remove", &Solo::remove, "slot"_a, "evicted"_a)
        .def("hold", &Solo::hold, "slot"_a)
        .def("release", &Solo::release, "slot"_a)
        .def("admits", &Solo::admits, "key"_a, "pages"_a, "victim"_a)
        .def("decline", &Solo::decline, "key"_a, "pages"_a)
        .def_prop_ro("looks", &Solo::looks)
        .def("victim", &victim, "pinned"_a = nb::make_tuple(), "now"_a = 0.0)
        .def("grow", &Solo::grow, "pages"_a)
        .def("replay", &replay, "users"_a, "pages"_a, "recent"_a = 0, "start_s"_a = 0.0, "every_s"_a = 0.0)
        .def("contains", [](const Solo& solo, Slot slot) { return solo.policy().contains(slot); }, "slot"_a)
        .def("__len__", [](const Solo& solo) { return solo.policy().size(); })
        .def_prop_ro("pages", [](const Solo& solo) { return solo.policy().pages(); })
        .def("check", [](const Solo& solo) { solo.policy().check(); });
    module.def("_replay_trace", &replay_trace, "name"_a, "capacity_pages"_a, "users"_a, "t_s"_a, "tokens"_a, "found"_a,
               "known"_a, "page_tokens"_a);
    module.def("_optimum", &find_optimum, "capacity_pages"_a, "users"_a, "t_s"_a, "tokens"_a, "found"_a, "known"_a,
               "page_tokens"_a);
}

}  // namespace mtserve
