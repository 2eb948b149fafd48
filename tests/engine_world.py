"""An engine beside a mirror of every history: each answer is held against a full recompute."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from small_models import START_MS, make_behaviours, make_candidates, make_features, small_model

from mtserve.cache.index import Copy
from mtserve.config import EngineConfig
from mtserve.engine.engine import Engine
from mtserve.engine.forward.batch import BatchArrays, BatchPlan, BatchSize, EarlyLayers
from mtserve.engine.forward.runner import BatchRunner
from mtserve.engine.forward.runner import Pending as PendingBatch
from mtserve.engine.queue.pace import Line
from mtserve.engine.served import Served
from mtserve.engine.setup import DTYPES, page_shape
from mtserve.engine.tiers.footprint import Footprint, packed_format
from mtserve.errors import TransferFailed
from mtserve.history.store import HistoryStore
from mtserve.model.ranking import RankingModel
from mtserve.model.reference import recompute
from mtserve.restore.choice import Choice
from mtserve.restore.costs import Costs
from mtserve.transfer.mover import LOAD, Arrivals, Fault, Finished, Mover, Pieces, SyncMover
from mtserve.types import History, Request, Rows, ScoreResult

TOLERANCE = 1e-5
NOISE = {"kv": 2**-23, "kv8": 2**-7, "x8": 2**-7, "x4": 2**-3}  # of a value that the host gives back, by `host_format`


class FakeClock:
    """Seconds that pass only when told to; starts after every behaviour the tests make."""

    def __init__(self) -> None:
        self.now = START_MS / 1000 + 1e7

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class DelayedArrivals:
    """Loads that end when a batch over them asks for their bytes."""

    mover: DelayedMover
    tickets: frozenset[int]

    def wait(self) -> None:
        self.mover.release_loads(self.tickets)


class DelayedMover(SyncMover):
    """Copies that end when told to. `late` copies bytes at the end, otherwise at the start: both are allowed.

    `near_loads`: batches may begin over loads under way, whose bytes come, or fail to, when the batch waits for them.
    """

    def __init__(self, old: Mover, late: bool, fault: Fault | None = None, *, near_loads: bool = False) -> None:
        super().__init__(old.pool, old.arena, fault)
        self.late, self.near_loads = late, near_loads
        self.overlapped = 0
        self.load_seconds = 0.0  # expected of every load: above what encoding takes, none is begun
        self.jobs: list[tuple[str, Copy, TransferFailed | None]] = []
        self.ended: list[Finished] = []
        self.submitted: list[str] = []
        self.first_layers: dict[int, int] = {}  # of split loads, by ticket
        self.unpacker = old.unpacker

    def submit(self, kind: str, copies: Sequence[Copy]) -> None:
        for each in copies:
            pages = (each.gpu_pages.copy(), each.host_pages.copy())
            copy = Copy(each.ticket, each.user, *pages, each.first_token, each.tokens)
            self.submitted.append(kind)
            self.jobs.append((kind, copy, None if self.late else self.attempt(kind, copy)))

    def submit_split(self, loads: Sequence[Copy], first_layer: int, pieces: Pieces | None = None) -> DelayedArrivals:
        self.first_layers.update((each.ticket, first_layer) for each in loads)
        self.submit(LOAD, loads)
        return DelayedArrivals(self, frozenset(each.ticket for each in loads))

    def attempt(self, kind: str, copy: Copy, first_layer: int = 0) -> TransferFailed | None:
        return super().attempt(kind, copy, self.first_layers.get(copy.ticket, first_layer) if kind == LOAD else 0)

    def release(self, index: int = 0) -> None:
        """End one job, by default the oldest."""
        kind, copy, error = self.jobs.pop(index)
        if self.late:
            error = self.attempt(kind, copy)
        self.ended.append(Finished(kind, copy.ticket, error))

    def release_all(self) -> None:
        while self.jobs:
            self.release()

    def release_loads(self, tickets: frozenset[int]) -> None:
        for kind, under_way, _ in list(self.jobs):
            if kind == LOAD and under_way.ticket in tickets:
                self.release([(job[0], job[1].ticket) for job in self.jobs].index((LOAD, under_way.ticket)))

    def load_s(self, size: int) -> float:
        return self.load_seconds

    def near(self, ticket: int) -> bool:
        return self.near_loads and any((kind, copy.ticket) == (LOAD, ticket) for kind, copy, _ in self.jobs)

    def arrivals(self, tickets: Collection[int]) -> DelayedArrivals:
        self.overlapped += 1
        return DelayedArrivals(self, frozenset(tickets))

    def poll(self) -> list[Finished]:
        ended, self.ended = self.ended, []
        return ended

    def pending(self) -> int:
        return len(self.jobs) + len(self.ended)

    def wait(self, timeout_s: float = math.inf) -> bool:
        self.release_all()
        return True


@dataclass
class Pending:
    """A submitted request with the history as it stood at that moment, and its exposure times resolved."""

    world: World
    future: Future[ScoreResult]
    history: History
    candidates: Rows

    def expected(self) -> npt.NDArray[np.float32]:
        """float32 [candidates, tasks] logits of a full recompute with the weights now served, rounded where pages are."""
        return recompute(self.world.truth, self.history, self.candidates, self.world.pages).numpy()

    def rounding(self, expected: npt.NDArray[np.float32]) -> float:
        """How far computations may lie apart here: where a norm divides by next to nothing, rounding alone passes the
        tolerance. Four times what weights that differ by half a unit in the last place make of it, or by as much as the
        host's format changes values, and no more than ten tolerances.
        """
        largest = 0.0
        for seed in range(4):
            generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(self.world.truth)
            with torch.no_grad():
                for weight in model.parameters():
                    weight *= 1 + (torch.rand(weight.shape, generator=generator) - 0.5).to(weight) * self.world.noise
            nearby = recompute(model, self.history, self.candidates, self.world.pages).numpy()
            largest = max(largest, float(np.abs(nearby - expected).max()))
        return min(4 * largest, 10 * self.world.tolerance)

    def verify(self) -> ScoreResult:
        """The result, which has come, equals the recompute and accounts for every prefix token."""
        result, expected = self.future.result(timeout=0), self.expected()
        assert result.logits.shape == expected.shape
        tolerance = self.world.tolerance
        if np.abs(result.logits - expected).max(initial=0.0) > tolerance:
            tolerance += self.rounding(expected)
        np.testing.assert_allclose(result.logits, expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(result.scores, 1 / (1 + np.exp(-expected)), rtol=0, atol=tolerance)
        assert result.position == self.history.position
        assert result.gpu_tokens + result.host_tokens + result.encoded_tokens == result.prefix_tokens
        assert min(result.gpu_tokens, result.host_tokens, result.encoded_tokens) >= 0
        return result


@dataclass
class LateBatch:
    """A batch whose rows are computed when its result is asked for."""

    run: Callable[[], PendingBatch]
    ran: PendingBatch | None = None

    def result(self) -> npt.NDArray[np.float32]:
        self.ran = self.run()
        return self.ran.result()

    def waited(self) -> dict[int, float]:
        assert self.ran is not None
        return self.ran.waited()


class OverlappingRunner:
    """A runner whose batches count as under way until the loop's next step, as those on a GPU do.

    `late`: they read and write nothing before that step ends them.
    """

    overlaps = True

    def __init__(self, runner: BatchRunner, late: bool = False) -> None:
        self.runner, self.late = runner, late

    def room(self, size: BatchSize) -> BatchArrays:
        return self.runner.room(size)

    def early_room(self, size: BatchSize) -> BatchArrays:
        return self.runner.early_room(size)

    def start_early(self, early: EarlyLayers) -> None:
        if not self.late:
            self.runner.start_early(early)

    def start(
        self, plan: BatchPlan, arrivals: Arrivals | None = None, early: EarlyLayers | None = None
    ) -> PendingBatch:
        def run() -> PendingBatch:
            if self.late and early is not None:
                self.runner.start_early(early)
            return self.runner.start(plan, arrivals, early)

        return LateBatch(run) if self.late else run()

    def settle(self) -> None:
        self.runner.settle()

    def stats(self) -> dict[str, Any]:
        return self.runner.stats()


class World:
    """Drives an engine by hand. Tiers are sized in pages; the mirror keeps every row ever appended."""

    def __init__(
        self,
        model: RankingModel | None = None,
        *,
        gpu_pages: int = 64,
        host_pages: int = 64,
        page_tokens: int = 4,
        history: HistoryStore | None = None,
        fault: Fault | None = None,
        seed: int = 0,
        start: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
        tolerance: float = TOLERANCE,
        costs: Costs | None = None,
        **config: Any,
    ) -> None:
        self.model = model if model is not None else small_model()
        self.rng = np.random.default_rng(seed)
        self.clock = FakeClock()
        self.truth = self.model
        self.tolerance = tolerance
        self.noise = NOISE[config.get("host_format", "kv")]
        sizes = EngineConfig(
            device=device, dtype=dtype, page_tokens=page_tokens, poison_pages=True,
            gpu_format=config.get("gpu_format", "native"), graphs="on",
        )  # fmt: skip
        states = page_shape(self.model.config, sizes, DTYPES[dtype])
        self.pages = states.dtype
        packed = None
        if host_pages:
            formatted = dataclasses.replace(sizes, host_format=config.get("host_format", "kv"))
            packed = packed_format(self.model.config, formatted, states)
        page = Footprint.of(states, packed)
        tiers = {"gpu_cache": f"{gpu_pages * page.gpu}B", "host_cache": f"{host_pages * page.host}B"}
        self.config = dataclasses.replace(sizes, **{**tiers, "write_back_idle_ms": 0, **config})
        self.engine = Engine(
            self.model, self.config, history=history, clock=self.clock, start=start, fault=fault, costs=costs
        )
        # The clock moves when told to: what batches seem to take by it means nothing.
        self.engine._core._pace.line = Line  # type: ignore[method-assign]
        self.rows: dict[str, Rows] = {}
        self.features: dict[str, Rows | None] = {}

    @property
    def schema(self) -> Any:
        return self.model.schema

    @property
    def tiers(self) -> Any:
        return self.engine._core.tiers

    # Histories

    def put(self, user: str, count: int = 0, features: bool = True) -> None:
        """A new history of `count` behaviours (and new U features)."""
        rows = make_behaviours(self.rng, count, schema=self.schema)
        self.put_rows(user, rows, make_features(self.rng, self.schema) if features else None)

    def put_rows(self, user: str, rows: Rows | None, features: Rows | None) -> None:
        self.engine.put_user(user, features, rows)
        if rows is not None or user not in self.rows:
            self.rows[user] = rows if rows is not None else make_behaviours(self.rng, 0, schema=self.schema)
        if features is not None or user not in self.features:
            self.features[user] = features

    def append(self, user: str, count: int, prefetch: bool = False) -> None:
        known = self.rows.get(user, make_behaviours(self.rng, 0, schema=self.schema))
        after = int(known["time_ms"][-1]) if len(known) else START_MS
        more = make_behaviours(self.rng, count, after, self.schema)
        end = self.engine.append(user, more, len(known), prefetch=prefetch)
        self.rows[user] = np.concatenate((known, more))
        self.features.setdefault(user, None)
        assert end == len(self.rows[user])

    def truncate(self, user: str, position: int) -> None:
        assert self.engine.truncate(user, position) == position
        self.rows[user] = self.rows[user][:position].copy()

    def delete(self, user: str) -> None:
        assert self.engine.delete_user(user) == (user in self.rows)
        self.rows.pop(user, None)
        self.features.pop(user, None)

    def history_of(self, user: str) -> History:
        """The mirror's history; only how many of the oldest rows were let go is the store's to say."""
        first = self.engine.history.read(user).first
        return History(self.features[user], first, self.rows[user][first:])

    # Scores

    def candidates(self, count: int, time_ms: Any = -1) -> Rows:
        return make_candidates(self.rng, count, time_ms, self.schema)

    def submit(
        self,
        user: str,
        count: int = 3,
        *,
        candidates: Rows | None = None,
        deadline: float | None = None,
        history: History | None = None,
    ) -> Pending:
        rows = self.candidates(count) if candidates is None else candidates
        resolved = rows.copy()
        resolved["time_ms"][resolved["time_ms"] < 0] = int(self.clock() * 1000)
        known = self.history_of(user) if history is None else history
        return Pending(self, self.engine.submit(Request(user, rows, deadline, history)), known, resolved)

    def score(self, user: str, count: int = 3, **options: Any) -> ScoreResult:
        pending = self.submit(user, count, **options)
        self.run()
        return pending.verify()

    def step(self) -> bool:
        progress = self.engine.step()
        self.engine.check()
        return progress

    def run(self, limit: int = 500) -> None:
        """Step until nothing is left to do; copies that a mover holds back do not count."""
        for _ in range(limit):
            if not self.step() and not self.engine._loop._inbox:
                return
        raise AssertionError(f"the engine was still busy after {limit} steps")

    def replace(self, model: RankingModel) -> None:
        """Serve other weights: whatever is still queued is answered by them."""
        self.engine.replace_model(model)
        self.truth = model

    # What the engine is made of

    def overlap(self, late: bool = False) -> None:
        """Have the loop plan each batch while the one before it runs; `late`: begins to run only when it is ended."""
        core = self.engine._core
        serve = core._serve

        def overlapping(model: RankingModel) -> Served:
            served = serve(model)
            served.runner = OverlappingRunner(served.runner, late)
            return served

        core._serve = overlapping  # type: ignore[method-assign]
        core.served.runner = OverlappingRunner(core.served.runner, late)

    def pace(self, token_s: float, batch_s: float = 0.0) -> None:
        """Have the engine believe that a token takes so many seconds to encode, and a batch so many whatever is in it."""
        pace = self.engine._core._pace
        pace.token_s = lambda now: token_s  # type: ignore[method-assign]
        pace.line = lambda: Line(batch_s, token_s, math.inf)  # type: ignore[method-assign]

    def restore_at(self, layer: int | None) -> None:
        """Have batches load the layers from `layer` on of what only the host has, and encode the others; None: have them
        choose by their costs again.
        """
        vars(self.tiers.restoring).pop("_choose", None)
        if layer is None:
            return
        layers = self.model.config.layers
        recompute = Choice(layers, 1.0, "recompute", {})
        choice = recompute if layer == layers else Choice(layer, 1.0, "split" if layer else "load", {})
        self.tiers.restoring._choose = lambda pieces, needs, others: choice if pieces else recompute

    def use_mover(self, mover: Mover) -> None:
        self.tiers.mover = self.tiers._onload.mover = mover
        if self.tiers.restoring is not None:
            self.tiers.restoring._mover = mover

    def delay_copies(self, late: bool = True, fault: Fault | None = None, near_loads: bool = False) -> DelayedMover:
        mover = DelayedMover(self.tiers.mover, late, fault, near_loads=near_loads)
        self.use_mover(mover)
        return mover

    def hook(self, op: str, before: Callable[[], None]) -> None:
        """Call `before` each time kernel `op` is launched."""
        core = self.engine._core
        runner: Any = (
            core.served.runner.runner if isinstance(core.served.runner, OverlappingRunner) else core.served.runner
        )
        real = getattr(runner._kernels, op)

        def hooked(*args: Any) -> Any:
            before()
            return real(*args)

        runner._kernels = dataclasses.replace(runner._kernels, **{op: hooked})

    def value(self, name: str, label: str = "") -> float:
        return self.engine.metrics.value(name, label)

    def evict_from_gpu(self, users: tuple[str, ...] = ("filler",), count: int = 3) -> None:
        """Score users long enough to push every other one off the GPU."""
        for user in users:
            if user not in self.rows:
                self.put(user, self.model.config.max_history)
            self.score(user, count)

    def held(self, user: str) -> tuple[int, int]:
        """Tokens of the user on the GPU and on the host, true or not."""
        for name, gpu, host in self.tiers.index.users():
            if name == user:
                return gpu, host
        return 0, 0

    def assert_idle(self) -> None:
        """Nothing queued, copied or held in flight; every page is free or holds committed tokens."""
        stats = self.tiers.index.stats()
        assert not self.engine._core.busy()
        assert (stats.batches_in_flight, stats.loads_in_flight, stats.stores_in_flight, stats.detached) == (0, 0, 0, 0)
        assert stats.gpu.in_flight == stats.host.in_flight == 0
        assert self.value("requests_in_flight") == self.value("loads_in_flight") == self.value("stores_in_flight") == 0

    def assert_empty(self) -> None:
        """Back to the baseline: after everything was invalidated, every page is free."""
        self.engine.invalidate()
        self.assert_idle()
        stats = self.tiers.index.stats()
        assert stats.gpu.free == stats.gpu.total
        assert stats.host.free == stats.host.total
        self.engine.check()
