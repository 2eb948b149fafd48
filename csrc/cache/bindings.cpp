// Python's view of the cache core: mtserve._core. Signatures are documented in mtserve/_core.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "../plan/bindings.h"
#include "../simulate/bindings.h"
#include "../restore/bindings.h"
#include "../transfer/bindings.h"
#include "allocator.h"
#include "buffers.h"
#include "chain.h"
#include "index.h"
#include "policies/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mtserve {
namespace {

std::string_view user_view(nb::handle user, const char* field) {
    Py_ssize_t length = 0;
    const char* text = PyUnicode_Check(user.ptr()) ? PyUnicode_AsUTF8AndSize(user.ptr(), &length) : nullptr;
    if (!text) {
        PyErr_Clear();
        throw invalid_argument(field, "a user id is a str that UTF-8 can encode");
    }
    return {text, static_cast<size_t>(length)};
}

Tier parse_tier(const std::string& name) {
    for (Tier tier : kTiers)
        if (name == kTierNames[tier]) return tier;
    throw invalid_argument("tier", "'" + name + "' is not one of gpu, host");
}

// int32 bytes; the Python side gives them their dtype.
nb::bytes page_bytes(const std::vector<int32_t>& pages) { return nb::bytes(pages.data(), pages.size() * sizeof(int32_t)); }

int32_t* plan_array(const Buffer& buffer, const char* field, int rank, int64_t rows) {
    if (buffer.rank() != rank || !buffer.holds(4, "il") || buffer.extent(0) != rows)
        throw invalid_argument(field, "needs an int32 array [" + std::to_string(rows) + (rank == 2 ? ", pages]" : "]"));
    return buffer.data<int32_t>();
}

// A sequence's items without a call each.
class Items {
public:
    Items(nb::handle sequence, const char* field) : fast_(nb::steal(PySequence_Fast(sequence.ptr(), field))) {
        if (!fast_.is_valid()) throw nb::python_error();
    }
    Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(fast_.ptr()); }
    nb::handle operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(fast_.ptr(), i); }

private:
    nb::object fast_;
};

// User ids and what keeps them: some sequences make their items only when asked for them.
class UserViews {
public:
    explicit UserViews(nb::sequence users) : items_(users, "users") {
        views_.reserve(static_cast<size_t>(items_.size()));
        for (Py_ssize_t i = 0; i < items_.size(); ++i) views_.push_back(user_view(items_[i], "users"));
    }
    const std::vector<std::string_view>& all() const { return views_; }

private:
    const Items items_;
    std::vector<std::string_view> views_;
};

Error one_chain_a_user(Py_ssize_t users) {
    return invalid_argument("chains", "needs one chain a user: " + std::to_string(users));
}

Ticket begin_batch(Index& index, nb::sequence users, nb::sequence chains, nb::handle cached, nb::handle stored,
                   nb::handle page_table, nb::sequence again, double now) {
    const Items user_items(users, "users"), chain_items(chains, "chains"), again_items(again, "again");
    const Py_ssize_t rows = user_items.size();
    if (chain_items.size() != rows) throw one_chain_a_user(rows);
    if (again_items.size() != rows && again_items.size() != 0)
        throw invalid_argument("again", "needs one bool a user, or none: " + std::to_string(rows));
    const Buffer cached_out(cached, "cached", PyBUF_FORMAT | PyBUF_WRITABLE);
    const Buffer stored_out(stored, "stored", PyBUF_FORMAT | PyBUF_WRITABLE);
    const Buffer table_out(page_table, "page_table", PyBUF_FORMAT | PyBUF_WRITABLE);
    BatchPlan plan{plan_array(cached_out, "cached", 1, rows), plan_array(stored_out, "stored", 1, rows),
                   plan_array(table_out, "page_table", 2, rows), 0};
    plan.width = static_cast<int32_t>(std::min<int64_t>(table_out.extent(1), kMaxChain));
    if (table_out.extent(1) != plan.width) throw invalid_argument("page_table", "rows of more than 2^24 pages");
    std::deque<Buffer> held;  // a deque, for views must not move
    std::vector<Index::BatchItem> items(static_cast<size_t>(rows));
    for (Py_ssize_t i = 0; i < rows; ++i) {
        held.emplace_back(chain_items[i], "chains", PyBUF_FORMAT);
        items[i] = {user_view(user_items[i], "users"), chain_view(held.back(), "chains")};
        if (again_items.size() && !nb::try_cast(again_items[i], items[i].again))
            throw invalid_argument("again", "needs bools");
    }
    return index.begin_batch(items, plan, now);
}

nb::object copy_tuple(const Index::CopyPlan& plan) {
    if (!plan.ticket) return nb::none();
    return nb::make_tuple(plan.ticket, page_bytes(plan.gpu_pages), page_bytes(plan.host_pages), plan.first_token, plan.tokens);
}

Match lookup(const Index& index, nb::handle user, nb::handle chain) {
    const Buffer buffer(chain, "chain", PyBUF_FORMAT);
    return index.lookup(user_view(user, "user"), chain_view(buffer, "chain"));
}

nb::list begin_loads(Index& index, nb::sequence users, nb::sequence chains, double now) {
    const UserViews views(users);
    const Items chain_items(chains, "chains");
    const std::vector<std::string_view>& names = views.all();
    if (chain_items.size() != static_cast<Py_ssize_t>(names.size())) throw one_chain_a_user(static_cast<Py_ssize_t>(names.size()));
    std::deque<Buffer> held;  // a deque, for views must not move
    std::vector<ChainView> asked;
    // Refuses what is no user id and no chain before anything is begun.
    for (size_t i = 0; i < names.size(); ++i) {
        std::as_const(index).find(names[i]);
        held.emplace_back(chain_items[static_cast<Py_ssize_t>(i)], "chains", PyBUF_FORMAT);
        asked.push_back(chain_view(held.back(), "chains"));
    }
    nb::list plans;
    for (size_t i = 0; i < names.size(); ++i) plans.append(copy_tuple(index.begin_load(names[i], asked[i], now)));
    return plans;
}

// Stops before the first user that comes after `pages` or more were planned.
nb::list begin_stores(Index& index, nb::sequence users, bool tail, int64_t pages, double now) {
    const UserViews views(users);
    const std::vector<std::string_view>& names = views.all();
    // Refuses what is no user id before anything is begun.
    for (const std::string_view name : names) std::as_const(index).find(name);
    nb::list plans;
    for (size_t i = 0; i < names.size() && pages > 0; ++i) {
        const Index::CopyPlan plan = index.begin_store(names[i], tail, now);
        pages -= static_cast<int64_t>(plan.gpu_pages.size());
        plans.append(copy_tuple(plan));
    }
    return plans;
}

nb::tuple busy(const Index& index, nb::handle user) {
    const Index::Entry* entry = index.find(user_view(user, "user"));
    return nb::make_tuple(entry && entry->load, entry && entry->store, entry && entry->batch);
}

nb::list survey(const Index& index, nb::sequence users, nb::sequence chains) {
    const Items user_items(users, "users"), chain_items(chains, "chains");
    if (chain_items.size() != user_items.size()) throw one_chain_a_user(user_items.size());
    nb::list found;
    for (Py_ssize_t i = 0; i < user_items.size(); ++i) {
        const Buffer chain(chain_items[i], "chains", PyBUF_FORMAT);
        found.append(index.presence(user_view(user_items[i], "users"), chain_view(chain, "chains")));
    }
    return found;
}

nb::list users(const Index& index) {
    nb::list rows;
    for (const Index::Entry* entry : index.live_entries())
        rows.append(nb::make_tuple(entry->user, entry->on[kGpu].tokens, entry->on[kHost].tokens));
    return rows;
}

nb::tuple tier_stats(const TierStats& from) {
    return nb::make_tuple(from.total, from.free, from.used, from.in_flight, from.users, from.evicted_pages, from.evicted_users,
                          from.pinned_users, from.pinned_pages);
}

// Tuples in the order of the named tuples that `mtserve.cache.index` makes of them.
nb::tuple stats(const Index& index) {
    const IndexStats from = index.stats();
    return nb::make_tuple(tier_stats(from.tier[kGpu]), tier_stats(from.tier[kHost]), from.users, from.detached,
                          from.batches_in_flight, from.loads_in_flight, from.stores_in_flight, from.corrections,
                          from.invalidated, from.unsaved_pages, from.pinned, from.declined_stores);
}

constexpr int64_t kLongHash = 1 << 16;  // bytes

void extend(nb::handle out, nb::handle rows, uint64_t seed) {
    const Buffer to(out, "chain_out", PyBUF_FORMAT | PyBUF_WRITABLE);
    const Buffer from(rows, "rows");
    const ChainView chain = chain_view(to, "chain_out");
    if (from.rank() < 1 || from.extent(0) != chain.size)
        throw invalid_argument("rows", "needs one row for each of chain_out's " + std::to_string(chain.size) + " entries");
    const size_t row_bytes = chain.size ? static_cast<size_t>(from.bytes() / chain.size) : 0;
    // A few rows are hashed sooner than the interpreter's lock comes back, once other threads wait for it.
    std::optional<nb::gil_scoped_release> unlocked;
    if (from.bytes() > kLongHash) unlocked.emplace();
    extend_chain(to.data<uint64_t>(), from.data<uint8_t>(), static_cast<size_t>(chain.size), row_bytes, seed);
}

void raise_typed(const std::exception_ptr& thrown, void*) {
    try {
        std::rethrow_exception(thrown);
    } catch (const Error& error) {
        const nb::object type = nb::module_::import_("mtserve.errors").attr(error.kind);
        const nb::object raised = type(error.what(), "field"_a = error.field);
        PyErr_SetObject(type.ptr(), raised.ptr());
    }
}

void bind_index(nb::module_& module) {
    nb::class_<Match>(module, "Match")
        .def(nb::init<int32_t, int32_t>(), "gpu_tokens"_a, "host_tokens"_a)
        .def_ro("gpu_tokens", &Match::gpu_tokens)
        .def_ro("host_tokens", &Match::host_tokens)
        .def("__eq__",
             [](const Match& a, const Match& b) { return a.gpu_tokens == b.gpu_tokens && a.host_tokens == b.host_tokens; },
             nb::is_operator())
        .def("__hash__", [](const Match& m) { return int64_t{m.gpu_tokens} << 32 | m.host_tokens; })
        .def("__repr__", [](const Match& m) {
            return "Match(gpu_tokens=" + std::to_string(m.gpu_tokens) + ", host_tokens=" + std::to_string(m.host_tokens) + ")";
        });
    nb::class_<Presence>(module, "Presence")
        .def_ro("gpu_tokens", &Presence::gpu_tokens)
        .def_ro("host_tokens", &Presence::host_tokens)
        .def_ro("arriving_tokens", &Presence::arriving_tokens)
        .def_ro("loading", &Presence::loading)
        .def_ro("in_batch", &Presence::in_batch);
    nb::class_<Index>(module, "Index")
        .def("__init__",
             [](Index* index, int64_t page_tokens, int64_t gpu_pages, int64_t host_pages, const std::string& policy,
                bool track_freed, double pin_budget) {
                 const auto tier = [&](int64_t pages) {
                     return Index::TierParts{PageAllocator(pages, track_freed), make_policy(policy, pages), pin_budget};
                 };
                 new (index) Index(page_tokens, tier(gpu_pages), tier(host_pages));
             },
             "page_tokens"_a, "gpu_pages"_a, "host_pages"_a, "policy"_a, "track_freed"_a, "pin_budget"_a)
        .def_prop_ro("page_tokens", &Index::page_tokens)
        .def("lookup", &lookup, "user"_a, "chain"_a)
        .def("survey", &survey, "users"_a, "chains"_a)
        .def("_busy", &busy, "user"_a)
        .def("_begin_batch", &begin_batch, "users"_a, "chains"_a, "cached"_a, "stored"_a, "page_table"_a, "again"_a,
             "now"_a)
        .def("end_batch",
             [](Index& index, Ticket ticket, bool success) {
                 nb::list users;
                 for (const std::string& user : index.end_batch(ticket, success)) users.append(user);
                 return users;
             },
             "ticket"_a, "success"_a)
        .def("_begin_loads", &begin_loads, "users"_a, "chains"_a, "now"_a)
        .def("end_load", &Index::end_load, "ticket"_a, "success"_a)
        .def("_begin_stores", &begin_stores, "users"_a, "tail"_a, "pages"_a, "now"_a)
        .def("unsaved_tokens", [](const Index& index, nb::handle user) { return index.unsaved_tokens(user_view(user, "user")); },
             "user"_a)
        .def("grow_host", &Index::grow_host, "pages"_a)
        .def("end_store", &Index::end_store, "ticket"_a, "success"_a)
        .def("set_window", [](Index& index, nb::sequence users) { index.set_window(UserViews(users).all()); }, "users"_a)
        .def("pin", [](Index& index, nb::sequence users) { return index.pin_users(UserViews(users).all()); }, "users"_a)
        .def("unpin", [](Index& index, nb::sequence users) { return index.unpin_users(UserViews(users).all()); }, "users"_a)
        .def("invalidate", [](Index& index, nb::handle user) { return index.invalidate(user_view(user, "user")); }, "user"_a)
        .def("invalidate_all", &Index::invalidate_all)
        .def("users", &users)
        .def("_stats", &stats)
        .def("_drain_freed",
             [](Index& index, const std::string& tier) { return page_bytes(index.allocator(parse_tier(tier)).drain_freed()); }, "tier"_a)
        .def("drain_returns",
             [](Index& index) {
                 nb::list seconds;
                 for (const double each : index.drain_returns()) seconds.append(each);
                 return seconds;
             })
        .def("check", &Index::check)
        .def("_sabotage", &Index::sabotage, "what"_a);
}

void bind_allocator(nb::module_& module) {
    nb::class_<PageAllocator>(module, "PageAllocator")
        .def(nb::init<int64_t, bool>(), "pages"_a, "track_freed"_a = false)
        .def_prop_ro("total", &PageAllocator::total)
        .def_prop_ro("free", &PageAllocator::free)
        .def("is_free", &PageAllocator::is_free, "page"_a)
        .def("take",
             [](PageAllocator& allocator, int64_t count, nb::sequence held) {
                 const Items items(held, "held");
                 std::vector<int32_t> owned(static_cast<size_t>(items.size()));
                 for (Py_ssize_t i = 0; i < items.size(); ++i)
                     if (!nb::try_cast(items[i], owned[i])) throw invalid_argument("held", "needs int32 page ids");
                 allocator.take(count, owned);
                 nb::list taken;
                 for (size_t i = static_cast<size_t>(items.size()); i < owned.size(); ++i) taken.append(owned[i]);
                 return taken;
             }, "count"_a, "held"_a = nb::make_tuple())
        .def("grow", &PageAllocator::grow, "pages"_a)
        .def("release", &PageAllocator::release, "page"_a)
        .def("_drain_freed", [](PageAllocator& allocator) { return page_bytes(allocator.drain_freed()); })
        .def("check", &PageAllocator::check);
}

}  // namespace
}  // namespace mtserve

NB_MODULE(_core, module) {
    using namespace mtserve;
    // An engine that lives until the interpreter's end is no leak worth a report on stderr.
    nb::set_leak_warnings(false);
    nb::register_exception_translator(&raise_typed);
    module.def("digest", [](nb::handle data, uint64_t seed) {
        const Buffer buffer(data, "data");
        return xxh64(buffer.data<uint8_t>(), static_cast<size_t>(buffer.bytes()), seed);
    }, "data"_a, "seed"_a = 0);
    module.def("extend_chain", &extend, "chain_out"_a, "rows"_a, "seed"_a);
    bind_allocator(module);
    bind_index(module);
    bind_policy(module);
    bind_simulation(module);
    bind_attention_work(module);
    bind_batch_layout(module);
    bind_transfer(module);
    bind_restore(module);
}
