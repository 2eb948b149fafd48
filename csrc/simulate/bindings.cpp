// Python's view of the simulation. Signatures are documented in mtserve/_core.pyi.
#include "bindings.h"

#include <nanobind/stl/string.h>

#include "../cache/buffers.h"
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

void run(Simulation& simulation, nb::handle users, nb::handle t_s, nb::handle tokens, nb::handle generations,
         nb::handle tokens_after, nb::handle generations_after, nb::handle gpu_tokens, nb::handle host_tokens) {
    constexpr int kOut = PyBUF_FORMAT | PyBUF_WRITABLE;
    const Buffer user(users, "users", PyBUF_FORMAT), time(t_s, "t_s", PyBUF_FORMAT), token(tokens, "tokens", PyBUF_FORMAT),
        generation(generations, "generations", PyBUF_FORMAT), token_after(tokens_after, "tokens_after", PyBUF_FORMAT),
        generation_after(generations_after, "generations_after", PyBUF_FORMAT), gpu(gpu_tokens, "gpu_tokens", kOut),
        host(host_tokens, "host_tokens", kOut);
    const int64_t size = user.rank() == 1 ? user.extent(0) : 0;
    const RequestColumns requests{size,
                                  column<int32_t>(user, "users", size),
                                  column<double>(time, "t_s", size),
                                  column<int32_t>(token, "tokens", size),
                                  column<int32_t>(generation, "generations", size),
                                  column<int32_t>(token_after, "tokens_after", size),
                                  column<int32_t>(generation_after, "generations_after", size)};
    int32_t *const gpu_out = column<int32_t>(gpu, "gpu_tokens", size), *const host_out = column<int32_t>(host, "host_tokens", size);
    nb::gil_scoped_release unlocked;
    simulation.run(requests, gpu_out, host_out);
}

nb::tuple tier(const TierStats& from) { return nb::make_tuple(from.total, from.used, from.users, from.evicted_pages, from.evicted_users); }

// Tuples in the order of the named tuples that `mtserve.trace.simulation` makes of them.
nb::tuple stats(const Simulation& simulation) {
    const SimulationStats from = simulation.stats();
    return nb::make_tuple(tier(from.index.tier[kGpu]), tier(from.index.tier[kHost]), from.requests, from.rebuilt, from.loads,
                          from.loaded_pages, from.stores, from.stored_pages, from.index.unsaved_pages);
}

}  // namespace

void bind_simulation(nb::module_& module) {
    nb::class_<Simulation>(module, "_Simulation")
        .def("__init__",
             [](Simulation* simulation, int64_t page_tokens, int64_t gpu_pages, int64_t host_pages, const std::string& policy,
                int64_t users, nb::object keys) {
                 new (simulation) Simulation(page_tokens, gpu_pages, host_pages, policy, users, keys_of(keys));
             },
             "page_tokens"_a, "gpu_pages"_a, "host_pages"_a, "policy"_a, "users"_a, "keys"_a = nb::none())
        .def("run", &run, "users"_a, "t_s"_a, "tokens"_a, "generations"_a, "tokens_after"_a, "generations_after"_a,
             "gpu_tokens"_a, "host_tokens"_a)
        .def("stats", &stats)
        .def("check", &Simulation::check);
}

}  // namespace mtserve
