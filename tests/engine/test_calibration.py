"""Calibration: a machine whose figures are known is measured right, and no batch or copy goes beyond what there is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_models import BARE_SCHEMA, CAUSAL, SCHEMA, small_model

from mtserve.cache.index import PageIds
from mtserve.config import EngineConfig
from mtserve.engine import calibration
from mtserve.engine.calibration import calibrate, cost_key
from mtserve.engine.forward.batch import BatchPlan
from mtserve.engine.forward.planner import Planner
from mtserve.engine.forward.runner import BatchRunner, Runner
from mtserve.engine.request.sequence import SequenceBuilder
from mtserve.kernels.backend import load_kernels
from mtserve.model.ranking import RankingModel
from mtserve.restore.cache import CostCache, CostKey
from mtserve.restore.costs import Costs
from mtserve.transfer.mover import SyncMover

PAGE_TOKENS = 4
CONFIG = EngineConfig(device="cpu", page_tokens=PAGE_TOKENS, gpu_cache="1MiB", host_cache="1MiB")
# pair_s so that the largest batch's keys weigh as much as its rows
TRUE = Costs(((1, 1.0),), load_s=1e-4, batch_s=3e-4, layer_s=2e-5, row_s=1e-6, pair_s=1e-7, unpack_s=5e-8)
BYTES_PER_S = {"small": 1e8, "large": 4e8}


@dataclass
class Machine:
    """A clock that only work moves, at the pace of TRUE. Copies of less than a page come at a fourth of the rate."""

    model: RankingModel
    page_bytes: int
    now: float = 0.0
    plans: list[BatchPlan] = field(default_factory=list)
    copied: list[tuple[npt.NDArray[np.int64], int]] = field(default_factory=list)
    unpacked: list[int] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def copies(self, offsets: npt.NDArray[np.int64], size: int) -> None:
        self.copied.append((offsets, size))
        rate = BYTES_PER_S["small" if size < self.page_bytes else "large"]
        self.now += TRUE.load_s + len(offsets) * size / rate


class TimedRunner(Runner):
    """The plain runner, whose batches take what the machine's figures say."""

    def __init__(self, machine: Machine, pool: torch.Tensor, overlaps: bool) -> None:
        super().__init__(machine.model, load_kernels("eager"), pool)
        self._machine, self.overlaps = machine, overlaps

    def start(self, plan: BatchPlan, *rest: Any) -> Any:
        done = super().start(plan, *rest)
        self._machine.plans.append(plan)
        self._machine.now += TRUE.batch_s
        pairs = int(plan.layout.limit.sum()) + plan.candidates
        layers_s = self._machine.model.config.layers * TRUE.compute_s(plan.rows, pairs)
        if not self.overlaps:
            self._machine.now += layers_s
            return done
        return LateResult(self._machine, layers_s, done.result())


@dataclass(frozen=True)
class LateResult:
    machine: Machine
    layers_s: float
    logits: npt.NDArray[np.float32]

    def result(self) -> npt.NDArray[np.float32]:
        self.machine.now += self.layers_s
        return self.logits

    def waited(self) -> dict[int, float]:
        return {}


class TimedUnpacker:
    def __init__(self, machine: Machine, states: torch.Tensor) -> None:
        self.states, self._machine = states, machine

    def unpack(self, pages: PageIds, first: int, last: int, stream: int) -> None:
        assert 0 <= first < last <= self.states.shape[1]
        assert len(np.unique(pages)) == len(pages) and pages.max() < len(self.states)
        self._machine.unpacked.append(len(pages))
        self._machine.now += 1e-5 + TRUE.unpack_s * len(pages) * PAGE_TOKENS * (last - first)


@dataclass
class Bench:
    """One model with memory and what calibration needs of an engine."""

    config: EngineConfig = CONFIG
    pool_pages: int = 200
    arena_pages: int = 200
    model: RankingModel = field(default_factory=small_model)
    chunk_pages: int = 0

    def __post_init__(self) -> None:
        shape = self.model.config
        sizes = (shape.layers, 2, self.config.page_tokens, shape.heads, shape.head_dim)
        self.pool = torch.zeros(self.pool_pages, *sizes)
        self.mover = SyncMover(self.pool, torch.ones(self.arena_pages, *sizes), chunk_pages=self.chunk_pages)
        self.machine = Machine(self.model, self.pool[:1].nbytes)

    def timed(self, monkeypatch: pytest.MonkeyPatch, *, overlaps: bool = False, **options: Any) -> Costs:
        """What is found of a machine as TRUE has it."""
        monkeypatch.setattr(calibration, "_copies", lambda mover: self.machine.copies)
        return self.calibrate(TimedRunner(self.machine, self.pool, overlaps), clock=self.machine, **options)

    def calibrate(self, runner: BatchRunner | None = None, **options: Any) -> Costs:
        model = self.model
        runner = Runner(model, load_kernels("eager"), self.pool) if runner is None else runner
        planner = Planner(model, self.config.page_tokens)
        builder = SequenceBuilder(model.config, model.schema, "model")
        options = {"host_pages": len(self.mover.arena), **options}
        return calibrate(runner, planner, builder, self.mover, model, self.config, **options)


@pytest.mark.parametrize("overlaps", [False, True])
def test_known_figures_are_found(monkeypatch: pytest.MonkeyPatch, overlaps: bool) -> None:
    bench = Bench()
    bench.mover.unpacker = TimedUnpacker(bench.machine, bench.pool)
    costs = bench.timed(monkeypatch, overlaps=overlaps)
    layers = bench.model.config.layers
    assert costs.row_s == pytest.approx(TRUE.row_s, rel=1e-3)
    assert costs.pair_s == pytest.approx(TRUE.pair_s, rel=1e-3)
    fixed_s = costs.batch_s + layers * costs.layer_s
    assert costs.plan_row_s == 0  # planning takes no time of this machine
    assert fixed_s == pytest.approx(TRUE.batch_s + layers * TRUE.layer_s, rel=1e-3)
    # What is begun before a batch's first layer is known where starting returns before its end.
    assert costs.batch_s == pytest.approx(TRUE.batch_s if overlaps else 0, rel=1e-3)
    assert costs.unpack_s == pytest.approx(TRUE.unpack_s, rel=1e-3)
    page, layer = bench.machine.page_bytes, bench.machine.page_bytes // layers
    assert costs.load_s == pytest.approx(TRUE.load_s + layer / BYTES_PER_S["small"])
    assert [size for size, _ in costs.link] == [layer, page, 4 * page, 16 * page]
    rates = [BYTES_PER_S["small"], *[BYTES_PER_S["large"]] * 3]
    assert [rate for _, rate in costs.link] == pytest.approx(rates, rel=0.2)  # the smallest copy's bytes count twice


def test_batches_tell_rows_from_keys() -> None:
    """What is measured spans rows and keys a row, or the fit would have to guess."""
    bench = Bench(model=small_model(max_history=400, max_realtime=100))
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench.timed(monkeypatch)
    seen = {(plan.rows, int(plan.layout.limit.sum()) // plan.rows) for plan in bench.machine.plans}
    rows, keys = zip(*seen, strict=True)
    assert max(rows) >= 32 * min(rows)
    assert max(keys) >= 30 * min(keys)
    assert len(bench.machine.plans) == len(seen) * (calibration.WARM_UP + calibration.RUNS) <= 42


LIMITS: list[dict[str, Any]] = [
    {}, {"max_batch_tokens": 1}, {"max_batch_tokens": 9}, {"max_batch_requests": 1}, {"max_candidates": 1},
    {"max_batch_tokens": 40, "max_batch_requests": 3},
]  # fmt: skip


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("pool_pages", [1, 2, 7, 200])
@pytest.mark.parametrize("schema", [SCHEMA, BARE_SCHEMA])
def test_batches_keep_to_every_limit(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], pool_pages: int, schema: Any
) -> None:
    config = replace(CONFIG, **limits)
    bench = Bench(config, pool_pages, arena_pages=3, model=small_model(schema=schema, **CAUSAL))
    costs = bench.timed(monkeypatch)
    assert costs.compute_s(1, 1) > 0
    longest = len(schema.user) + bench.model.config.max_history
    for plan in bench.machine.plans:
        assert plan.rows <= config.max_batch_tokens or plan.slots == 1
        assert plan.rows <= max(config.max_batch_tokens, longest + config.max_candidates)
        assert plan.slots <= config.max_batch_requests
        assert plan.candidates <= plan.slots * config.max_candidates
        pages = plan.layout.page_table
        assert pages.min() >= 0 and pages.max() < pool_pages
        assert len(np.unique(pages)) == pages.size  # no slot writes what another reads
        assert 0 <= plan.layout.target.max() < pool_pages * PAGE_TOKENS


@pytest.mark.parametrize(("host_pages", "chunk_pages"), [(1, 0), (5, 0), (200, 0), (200, 16), (200, 3)])
def test_copies_stay_inside_what_is_ready(monkeypatch: pytest.MonkeyPatch, host_pages: int, chunk_pages: int) -> None:
    bench = Bench(pool_pages=40, chunk_pages=chunk_pages)
    costs = bench.timed(monkeypatch, host_pages=host_pages)
    ready = min(host_pages, 40, chunk_pages or host_pages) * bench.machine.page_bytes
    for offsets, size in bench.machine.copied:
        assert offsets.min() >= 0 and offsets.max() + size <= ready
        assert len(np.unique(offsets // size)) == len(offsets) and not (offsets % size).any()
    assert costs.link[-1][0] <= ready


def test_without_host_pages_nothing_is_known_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(arena_pages=0)
    costs = bench.timed(monkeypatch)
    assert (costs.link, costs.load_s) == ((), 0.0)
    assert costs.row_s > 0


def test_one_page_is_unpacked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(pool_pages=1)
    bench.mover.unpacker = TimedUnpacker(bench.machine, bench.pool)
    costs = bench.timed(monkeypatch)
    assert set(bench.machine.unpacked) == {1}
    assert costs.unpack_s == pytest.approx(TRUE.unpack_s + 1e-5 / (PAGE_TOKENS * bench.model.config.layers))


@pytest.mark.parametrize("schema", [SCHEMA, BARE_SCHEMA])
def test_a_real_machine_is_measured(schema: Any) -> None:
    bench = Bench(model=small_model(schema=schema))
    costs = bench.calibrate()
    assert len(costs.link) == 4 and min(rate for _, rate in costs.link) > 0
    assert costs.compute_s(100, 1000) > 0
    assert costs.load_s > 0 and costs.unpack_s == 0 and 0 < costs.batch_s < 1e-2 and costs.plan_row_s < 1e-5
    assert (bench.pool == 1).any()  # the arena's bytes
    assert bool((bench.mover.arena == 1).all())


def test_pages_are_poisoned_again() -> None:
    bench = Bench(replace(CONFIG, poison_pages=True))
    bench.calibrate()
    assert bool(bench.pool.isnan().all())


def key_of(kernels: str = "eager", host_pages: int | None = None, **bench: Any) -> CostKey:
    made = Bench(**bench)
    model, host_pages = made.model, len(made.mover.arena) if host_pages is None else host_pages
    builder = SequenceBuilder(model.config, model.schema, "model")
    return cost_key(builder, made.mover, model, made.config, kernels, host_pages=host_pages)


def test_costs_are_kept_by_what_they_depend_on(tmp_path: Path) -> None:
    cache = CostCache(tmp_path / "costs.json")
    cache.put(key_of(), TRUE)
    assert cache.get(key_of(model=small_model(seed=1))) == TRUE
    others = [
        key_of(model=small_model(d=24)),
        key_of(model=small_model().double()),
        key_of(config=replace(CONFIG, page_tokens=8)),
        key_of(config=replace(CONFIG, graphs="off")),
        key_of("reference"),
        key_of(config=replace(CONFIG, host_format="x8")),
        key_of(config=replace(CONFIG, gpu_format="fp8")),
        key_of(host_pages=0),
    ]
    assert [cache.get(other) for other in others] == [None] * len(others)


@pytest.mark.parametrize(
    "narrow",
    [
        {"model": small_model(max_history=20, max_realtime=5)}, {"pool_pages": 7}, {"arena_pages": 3}, {"chunk_pages": 16},
        {"config": replace(CONFIG, max_batch_tokens=40)}, {"config": replace(CONFIG, max_batch_requests=2)},
    ],
)  # fmt: skip
def test_what_only_little_could_be_measured_of_is_measured_again_where_there_is_more(narrow: dict[str, Any]) -> None:
    assert key_of(**narrow) != key_of()
