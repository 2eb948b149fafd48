// Python's view of the policies by themselves. Signatures are documented in mtserve/_core.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <unordered_set>

#include "buffers.h"
#include "policies/bindings.h"
#include "policies/solo.h"

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

int64_t replay(Solo& solo, nb::handle users, nb::handle pages, int64_t recent) {
    const Buffer user_ids(users, "users", PyBUF_FORMAT), sizes(pages, "pages", PyBUF_FORMAT);
    const int32_t *ids = numbers(user_ids, "users"), *each = numbers(sizes, "pages");
    const int64_t requests = user_ids.extent(0), known = sizes.extent(0);
    if (recent < 0 || recent > 1024) throw invalid_argument("recent", std::to_string(recent) + " is outside 0 to 1024");
    if (!std::all_of(ids, ids + requests, [known](int32_t user) { return user >= 0 && user < known; }))
        throw invalid_argument("users", "each is a number below " + std::to_string(known) + ", the users of pages");
    if (!std::all_of(each, each + known, [](int32_t count) { return count > 0; }))
        throw invalid_argument("pages", "a user has at least 1");
    return solo.replay(ids, requests, each, known, recent);
}

}  // namespace

void bind_policy(nb::module_& module) {
    module.def("policy_names", &policy_names);
    nb::class_<Solo>(module, "_Policy")
        .def(nb::init<const std::string&, int64_t>(), "name"_a, "capacity_pages"_a)
        .def("insert", &Solo::insert, "slot"_a, "key"_a, "pages"_a)
        .def("access", &Solo::access, "slot"_a)
        .def("refresh", &Solo::refresh, "slot"_a)
        .def("resize", &Solo::resize, "slot"_a, "pages"_a)
        .def("remove", &Solo::remove, "slot"_a, "evicted"_a)
        .def("hold", &Solo::hold, "slot"_a)
        .def("release", &Solo::release, "slot"_a)
        .def("admits", &Solo::admits, "key"_a, "pages"_a, "victim"_a)
        .def("decline", &Solo::decline, "key"_a, "pages"_a)
        .def_prop_ro("looks", &Solo::looks)
        .def("victim",
             [](Solo& solo, nb::sequence pinned) -> std::optional<Slot> {
                 const Slot slot = solo.victim(slot_set(pinned, "pinned"));
                 return slot == kNoSlot ? std::nullopt : std::optional<Slot>(slot);
             },
             "pinned"_a = nb::make_tuple())
        .def("grow", &Solo::grow, "pages"_a)
        .def("replay", &replay, "users"_a, "pages"_a, "recent"_a = 0)
        .def("contains", [](const Solo& solo, Slot slot) { return solo.policy().contains(slot); }, "slot"_a)
        .def("__len__", [](const Solo& solo) { return solo.policy().size(); })
        .def_prop_ro("pages", [](const Solo& solo) { return solo.policy().pages(); })
        .def("check", [](const Solo& solo) { solo.policy().check(); });
}

}  // namespace mtserve
