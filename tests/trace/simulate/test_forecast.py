from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mtserve.config import EngineConfig
from mtserve.model.presets import preset
from mtserve.restore.choice import Need, user_work
from mtserve.restore.costs import Costs
from mtserve.restore.gpus import gpu_figures
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.schema import Trace
from mtserve.trace.simulate.demand import demand_of
from mtserve.trace.simulate.forecast import Asked, Forecast, forecast, spread
from mtserve.trace.simulate.machine import Machine
from mtserve.transfer.cuda_mover import split_course

MODEL = preset("hstu-512")
COSTS = Costs(link=((1, 1e9), (2, 1e9)), load_s=1e-3, batch_s=1e-3, layer_s=0.0, row_s=1e-6, pair_s=0.0, unpack_s=0.0)
AMPLE = 10**6


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate(GeneratorConfig(users=50, requests=1000, candidates_mean=20.0))


def _machine(engine: EngineConfig | None = None, costs: Costs = COSTS) -> Machine:
    return Machine.of(MODEL, engine or EngineConfig(), torch.bfloat16, costs)


def _forecast(
    trace: Trace, share: float, *, host: bool = False, pages: int = AMPLE, machine: Machine | None = None
) -> Forecast:
    """Of requests that find `share` of their prefix on the GPU, and the rest on the host where `host`."""
    demand = demand_of(trace, MODEL, 3)
    asked, prefix = Asked.of(demand, EngineConfig()), demand.tokens
    gpu = (share * prefix).astype(np.int32)
    rest = (prefix - 1 - gpu if host else np.zeros_like(prefix)).astype(np.int32)
    return forecast(machine or _machine(), asked, pages, gpu, rest)


def test_blocks_lie_evenly_and_none_is_taken_twice() -> None:
    assert spread(10, 3, 2).tolist() == [0, 1, 2, 7, 8, 9]
    assert spread(10, 3, 100).tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert spread(5, 5, 9).tolist() == [0, 1, 2, 3, 4]
    assert len(np.unique(spread(100_000, 64, 32))) == 64 * 32


def test_one_request_takes_what_its_rows_take() -> None:
    machine = _machine()
    work = user_work(100, 150, 20)
    assert machine.batch_s([], [work]) == pytest.approx(1e-3 + MODEL.layers * 70e-6)
    assert machine.batch_s([], [work, work]) == pytest.approx(1e-3 + MODEL.layers * 140e-6)
    # 2 pages of 1 MiB take 2.1 ms over 1 GB/s, later than 148 rows of 8 layers.
    need = Need(128, 0, 128, 20)
    encoded, loaded = (machine.batch_s([need], [], way) for way in ("recompute", "load"))
    assert encoded == pytest.approx(1e-3 + MODEL.layers * 148e-6)
    assert loaded == pytest.approx(1e-3 + 2 * (1 << 20) / 1e9, abs=MODEL.layers * 20e-6)
    assert machine.batch_s([need], []) <= min(encoded, loaded)
    for way, seconds in (("recompute", encoded), ("load", loaded)):
        assert _machine(EngineConfig(restore=way)).batch_s([need], []) == seconds


def test_a_gpus_figures_know_what_each_request_of_a_batch_takes() -> None:
    figures = gpu_figures("h200")
    machine = Machine.of(MODEL, EngineConfig(), torch.bfloat16, figures)
    assert machine.request_s == figures.request_s
    lone, pair = (machine.batch_s([], [user_work(0, 1, 1)] * users) for users in (1, 2))
    assert pair - lone > figures.request_s


def test_packed_pages_cross_the_link_smaller() -> None:
    plain, packed = (_machine(EngineConfig(host_format=each)) for each in ("kv", "x8"))
    assert plain.link_page_bytes == 1 << 20
    assert packed.link_page_bytes < plain.link_page_bytes / 3


@pytest.mark.parametrize(("unpacked", "parts"), [(False, 1), (True, 3)])
def test_loads_come_as_the_engines_mover_brings_them(unpacked: bool, parts: int) -> None:
    # Of 64 pages of 1 MiB the last 16 come in four groups of layers; of 8, below 16 MiB, all do, in one.
    assert split_course(8, 64, 1 << 20, unpacked=unpacked) == ((0, 2, 4, 6), 16, parts)
    assert split_course(8, 8, 1 << 20, unpacked=unpacked) == ((0,), 8, 1)


def test_most_of_a_long_load_comes_before_the_device_may_begin() -> None:
    costs = replace(COSTS, row_s=0.0, layer_s=2e-3, load_s=0.0)
    need, machine = Need(4096, 0, 4096, 20), _machine(costs=costs)
    begins_s, group_s = 48 * (1 << 20) / 1e9, 16 * (1 << 20) / 1e9 / 4
    # Its 16 ms of layers lie behind the last pages' first group, and end no sooner than two layers after the last.
    assert machine.batch_s([need], [], "load") == pytest.approx(begins_s + max(group_s + 16e-3, 4 * group_s + 4e-3))


def test_who_finds_more_is_served_sooner(trace: Trace) -> None:
    cold, half, warm = (_forecast(trace, share) for share in (0.0, 0.5, 1.0))
    assert cold.requests_per_s < half.requests_per_s < warm.requests_per_s
    assert cold.p50_ms > half.p50_ms > warm.p50_ms
    assert warm.p50_ms <= warm.p99_ms


def test_the_host_is_never_worse_than_encoding_again(trace: Trace) -> None:
    fast = Costs(
        link=((1, 1e12), (2, 1e12)), load_s=0.0, batch_s=1e-3, layer_s=0.0, row_s=1e-6, pair_s=0.0, unpack_s=0.0
    )
    cold, slow = _forecast(trace, 0.0), _forecast(trace, 0.0, host=True)
    assert slow.p99_ms <= cold.p99_ms and slow.requests_per_s >= cold.requests_per_s
    loaded = _forecast(trace, 0.0, host=True, machine=_machine(costs=fast))
    assert loaded.requests_per_s > 2 * cold.requests_per_s


def test_a_tier_with_room_for_few_users_has_small_batches(trace: Trace) -> None:
    ample, little = _forecast(trace, 1.0), _forecast(trace, 1.0, pages=40)
    assert little.requests_per_s < 0.7 * ample.requests_per_s
    assert little.p50_ms == ample.p50_ms


def test_a_request_is_forecast_with_the_mask_of_its_model(trace: Trace) -> None:
    model = preset("mtgr-small")
    asked = Asked.of(demand_of(trace, model, 3), EngineConfig(max_batch_requests=16))
    assert asked.block == 16
    assert (asked.prefix >= asked.frozen).all() and asked.frozen.max() > 3
    assert (asked.prefix - asked.frozen).max() <= model.max_realtime
    assert (Asked.of(demand_of(trace, MODEL, 3), EngineConfig()).frozen == 0).all()
