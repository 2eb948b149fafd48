// Python's view of the simulation. Signatures are documented in mtserve/_core.pyi.
#include "bindings.h"

#include <nanobind/stl/string.h>

#include <deque>
#include <iterator>
#include <optional>

#include "../cache/buffers.h"
#include "../cache/policies/trace_oracle.h"
#include "simulation.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mtserve {
namespace {

// One column of the requests, of 4 or 8 bytes a value.
template <typename T>
T* column(const Buffer& buffer, const char* field, int64_t size) {
    const bool typed = sizeof(T) == 4 ? buffer.holds(4, "il") : buffer.holds(8, "d");
    if (buffer.rank() != 1 || !typed || buffer.extent(0) != size)
        throw invalid_argument(field, std::string("needs ") + (sizeof(T) == 4 ? "an int32" : "a float64") + " array [" +
                                          std::to_string(size) + "]");
    return buffer.data<T>();
}

std::vector<uint64_t> keys_of(nb::handle keys) {
    if (keys.is_none()) return {};
    const Buffer buffer(keys, "keys", PyBUF_FORMAT);
    if (buffer.rank() != 1 || !buffer.holds(8, "LQ")) throw invalid_argument("keys", "needs a uint64 array [users]");
    return std::vector<uint64_t>(buffer.data<uint64_t>(), buffer.data<uint64_t>() + buffer.extent(0));
}

int64_t pin(Simulation& simulation, nb::handle users) {
    const Buffer buffer(users, "users", PyBUF_FORMAT);
    const int32_t* numbers = column<int32_t>(buffer, "users", buffer.rank() == 1 ? buffer.extent(0) : 0);
    return simulation.pin(std::vector<int32_t>(numbers, numbers + buffer.extent(0)));
}

// Names, in order, of the columns that are not times.
constexpr const char* kCounts[] = {"users",  "candidates",   "tokens",            "generations",
                                   "frozen", "tokens_after", "generations_after", "frozen_after"};

void run(Simulation& simulation, nb::handle t_s, nb::sequence columns, nb::handle gpu_tokens, nb::handle host_tokens,
         nb::handle next_s) {
    const Buffer time(t_s, "t_s", PyBUF_FORMAT), gpu(gpu_tokens, "gpu_tokens", PyBUF_FORMAT | PyBUF_WRITABLE),
        host(host_tokens, "host_tokens", PyBUF_FORMAT | PyBUF_WRITABLE);
    const int64_t size = time.rank() == 1 ? time.extent(0) : 0;
    if (nb::len(columns) != std::size(kCounts))
        throw invalid_argument("columns", "needs " + std::to_string(std::size(kCounts)) + " columns");
    std::deque<Buffer> held;  // a deque, for views must not move
    const int32_t* counts[std::size(kCounts)];
    for (size_t i = 0; i < std::size(kCounts); ++i) {
        held.emplace_back(nb::object(columns[i]), kCounts[i], PyBUF_FORMAT);
        counts[i] = column<int32_t>(held.back(), kCounts[i], size);
    }
    std::optional<Buffer> next;
    if (!next_s.is_none()) next.emplace(next_s, "next_s", PyBUF_FORMAT);
    const RequestColumns requests{size,      counts[0], column<double>(time, "t_s", size),
                                  counts[1], counts[2], counts[3],
                                  counts[4], counts[5], counts[6],
                                  counts[7], next ? column<double>(*next, "next_s", size) : nullptr};
    int32_t *const gpu_out = column<int32_t>(gpu, "gpu_tokens", size), *const host_out = column<int32_t>(host, "host_tokens", size);
    nb::gil_scoped_release unlocked;
    simulation.run(requests, gpu_out, host_out);
}

nb::tuple tier(const TierStats& from) {
    return nb::make_tuple(from.total, from.used, from.users, from.evicted_pages, from.evicted_users,
                          from.pinned_users, from.pinned_pages);
}

// Tuples in the order of the named tuples that `mtserve.trace.simulate.run` makes of them.
nb::tuple stats(const Simulation& simulation) {
    const SimulationStats from = simulation.stats();
    return nb::make_tuple(tier(from.index.tier[kGpu]), tier(from.index.tier[kHost]), from.requests, from.batches, from.rebuilt, from.loads,
                          from.loaded_pages, from.stores, from.stored_pages, from.index.unsaved_pages);
}

}  // namespace

void bind_simulation(nb::module_& module) {
    nb::class_<Simulation>(module, "_Simulation")
        .def("__init__",
             [](Simulation* simulation, int64_t page_tokens, int64_t gpu_pages, int64_t host_pages, const std::string& policy,
                int64_t batch_tokens, int64_t cold_batch_tokens, int64_t cold_after, double pin_budget, int64_t users,
                nb::object keys, const TraceOracle* habits) {
                 const BatchLimits limits{batch_tokens, cold_batch_tokens, cold_after};
                 new (simulation) Simulation(page_tokens, gpu_pages, host_pages, policy, limits, pin_budget, users, keys_of(keys), habits);
             },
             "page_tokens"_a, "gpu_pages"_a, "host_pages"_a, "policy"_a, "batch_tokens"_a, "cold_batch_tokens"_a,
             "cold_after"_a, "pin_budget"_a, "users"_a, "keys"_a.none(), "habits"_a.none(), nb::keep_alive<1, 12>())
        .def("pin", &pin, "users"_a)
        .def("run", &run, "t_s"_a, "columns"_a, "gpu_tokens"_a, "host_tokens"_a, "next_s"_a.none())
        .def("stats", &stats)
        .def("check", &Simulation::check);
}

}  // namespace mtserve
