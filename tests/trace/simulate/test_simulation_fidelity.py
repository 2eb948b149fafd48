"""A simulation says of each request what an engine answers: same tiers, same policy, one request after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from engine_world import World
from small_models import small_model

from mtserve._core import policy_names
from mtserve.config import EngineConfig
from mtserve.model.ranking import RankingModel
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.replay.features import TraceRows
from mtserve.trace.schema import Trace
from mtserve.trace.simulate.demand import Demand, demand_of
from mtserve.trace.simulate.pins import Pins
from mtserve.trace.simulate.run import DEFAULT_LIMITS, BatchLimits, SimulatedRun, simulate
from mtserve.types import Request

PAGE_TOKENS = 8
ENGINE = {"page_tokens": PAGE_TOKENS, "restore": "load", "write_back_idle_ms": 0, "poison_pages": False}
TINY = {"layers": 1, "d": 8, "heads": 1, "head_dim": 8, "max_history": 200}
MODELS = {
    "mtgr": {**TINY, "max_realtime": 24},
    "hstu": {**TINY, "max_realtime": 200, "static_history": False, "static_attention": "causal"},
}
# Percent of the working set on the GPU and on the host. With 2, some users are larger than the tier.
SOME = [(2, 30), (25, 100), (60, 30)]
MORE = [(2, 0), (5, 0), (5, 30), (5, 100), (25, 0), (25, 2), (100, 0), (100, 100)]


def make_trace(seed: int = 5, users: int = 60, requests: int = 400) -> Trace:
    """Users take turns at random, some often; three clicks a request, so that histories pass both limits of a cut."""
    config = GeneratorConfig(
        seed=seed, users=users, requests=requests, history_median=60, history_sigma=1.2, history_max=300,
        candidates_mean=4, clicks_mean=3, items=500,
    )  # fmt: skip
    trace = generate(config)
    user = np.random.default_rng(seed).permutation(trace.user)
    return replace(trace, user=user, session=np.zeros_like(trace.session))


def through_engine(world: World, trace: Trace) -> npt.NDArray[np.int32]:
    """int32 [3, N]: prefix tokens of each request, and those found on the GPU and on the host."""
    rows, engine = TraceRows(trace, world.schema), world.engine
    for user in np.unique(trace.user).tolist():
        engine.put_user(trace.user_ids[user], rows.user(user), rows.history(user))
    found = np.empty((3, trace.requests), dtype=np.int32)
    for request in trace.iter_requests():
        world.clock.now = request.t_ms / 1000
        future = engine.submit(Request(request.user, rows.candidates(request)))
        while engine.step():
            pass
        result = future.result(timeout=0)
        found[:, request.number] = result.prefix_tokens, result.gpu_tokens, result.host_tokens
        if len(request.clicked):
            engine.append(request.user, rows.clicked(request))
            while engine.step():
                pass
    return found


def assert_same(world: World, demand: Demand, run: SimulatedRun, found: npt.NDArray[np.int32]) -> None:
    np.testing.assert_array_equal(demand.tokens, found[0])
    np.testing.assert_array_equal(run.gpu_tokens, found[1])
    np.testing.assert_array_equal(run.host_tokens, found[2])
    stats, counters = world.tiers.index.stats(), run.counters
    for there, here in ((stats.gpu, counters.gpu), (stats.host, counters.host)):
        assert (there.total, there.used, there.users) == here[:3]
        assert (there.evicted_pages, there.evicted_users, there.pinned_users, there.pinned_pages) == here[3:]
    assert world.value("batches_total") == counters.batches
    assert world.value("loads_total") == counters.loads
    assert world.value("stores_total") == counters.stores
    assert stats.unsaved_pages == counters.unsaved_pages


def model_of(shape: str) -> RankingModel:
    return small_model(**MODELS[shape])


def compare(
    shape: str, policy: str, shares: tuple[int, int], trace: Trace, limits: BatchLimits = DEFAULT_LIMITS,
    pin: Sequence[str] = (), pin_budget: float = EngineConfig.pin_budget, gpu_format: str = "native",
) -> SimulatedRun:  # fmt: skip
    model = model_of(shape)
    demand = demand_of(trace, model.config, len(model.schema.user))
    if pin:
        demand = replace(demand, pins=Pins.of(trace.user_ids, pin, pin_budget))
    whole = demand.working_set_pages(PAGE_TOKENS)
    gpu_pages, host_pages = (-(-whole * share // 100) for share in shares)
    world = World(
        model, gpu_pages=gpu_pages, host_pages=host_pages, policy=policy, pin_budget=pin_budget, gpu_format=gpu_format,
        **limits._asdict(), **ENGINE,
    )  # fmt: skip
    try:
        world.engine.pin(pin)
        found = through_engine(world, trace)
        run = simulate(
            demand, policy=policy, gpu_pages=gpu_pages, host_pages=host_pages, page_tokens=PAGE_TOKENS, limits=limits
        )
        assert_same(world, demand, run, found)
        world.engine.check()
    finally:
        world.engine.close()
    return run


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("shares", SOME)
def test_every_request_finds_what_it_finds_in_an_engine(policy: str, shares: tuple[int, int]) -> None:
    run = compare("mtgr", policy, shares, make_trace())
    assert run.counters.rebuilt > 10
    assert run.gpu_tokens.any()
    assert run.host_tokens.any() == (run.counters.loads > 0)
    assert run.counters.loads > 20 or shares[0] > shares[1]


@pytest.mark.parametrize("shares", MORE)
def test_at_every_capacity(shares: tuple[int, int]) -> None:
    run = compare("mtgr", "lru", shares, make_trace())
    assert run.gpu_tokens.any()
    assert (run.counters.host.pages == 0) == (shares[1] == 0)


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("shape", MODELS)
def test_long_prefixes_are_encoded_in_the_same_parts(shape: str, policy: str) -> None:
    trace = make_trace(seed=7)
    run = compare(shape, policy, (25, 30), trace, BatchLimits(max_batch_tokens=90, cold_batch_tokens=40, cold_after=30))
    assert run.counters.batches > trace.requests + run.counters.rebuilt + 10


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize(("shares", "pin_budget"), [((10, 30), 0.5), ((10, 0), 0.3), ((25, 100), 0.2)])
def test_pinned_users_keep_what_they_keep_in_an_engine(policy: str, shares: tuple[int, int], pin_budget: float) -> None:
    trace = make_trace(seed=11)
    pin = ["nobody", *trace.user_ids[::5]]
    run = compare("mtgr", policy, shares, trace, pin=pin, pin_budget=pin_budget)
    assert run.counters.gpu.pinned_pages <= pin_budget * run.counters.gpu.pages
    without = compare("mtgr", policy, shares, trace)
    assert without.counters.gpu.pinned_users == 0
    assert not np.array_equal(without.gpu_tokens, run.gpu_tokens)


def test_pins_of_all_and_a_budget_of_nothing() -> None:
    trace = make_trace(seed=13)
    everybody = compare("hstu", "lru", (25, 30), trace, pin=trace.user_ids, pin_budget=0.5)
    assert everybody.counters.gpu.pinned_users > 0
    nothing = compare("hstu", "lru", (25, 30), trace, pin=trace.user_ids, pin_budget=0.0)
    assert nothing.counters == compare("hstu", "lru", (25, 30), trace).counters


def test_states_in_a_byte_a_value_are_found_alike() -> None:
    trace = make_trace(seed=17)
    run = compare("mtgr", "s3fifo", (25, 60), trace, pin=trace.user_ids[:6], pin_budget=0.3, gpu_format="fp8")
    assert run.counters.loads > 20
