"""A device, a link and a clock that only a cost model moves: what an engine is driven on by virtual_replay.py.

    loop     for each batch `batch_s`, times 0.5 to 1.5 at random, `request_s` a request and `plan_row_s` a row; all else
             takes no time
    device   batches one after the other, each `layers` times Costs.compute_s; a batch over loads ends after them
    link     loads one after the other at the link's rate, each told `load_s` later; write-backs on a line of their own

The figures are those of mtserve/restore/gpus.py for a real shape of model. Logits are zeros, and no byte is copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.cache.index import Copy
from mtserve.engine.forward.batch import BatchArrays, BatchPlan, BatchSize, EarlyLayers
from mtserve.model.presets import preset
from mtserve.restore.costs import Costs
from mtserve.restore.gpus import GpuFigures
from mtserve.transfer.mover import LOAD, STORE, Arrivals, Finished, Mover, Pieces

START_S = 1e9
JITTER = 0.5  # of the loop's `batch_s`: without any, clients and batches fall in step, and chance decides in which
NEAR_SHARE = 0.25  # of a load's bytes: with these there, a batch starts over it


class VirtualClock:
    """Seconds that pass when somebody takes them."""

    def __init__(self) -> None:
        self.now = START_S

    def __call__(self) -> float:
        return self.now

    def until(self, time: float) -> None:
        """Go on to `time`, if that is still to come."""
        self.now = max(self.now, time)


@dataclass(frozen=True)
class VirtualMachine:
    """`costs` of a batch of a model with `layers` layers; `request_s`: of the loop for a request of a batch;
    `page_bytes` of states cross the link a page.
    """

    costs: Costs
    request_s: float
    layers: int
    page_bytes: int

    @classmethod
    def of(cls, figures: GpuFigures, model: str, page_tokens: int, batch_s: float | None = None) -> VirtualMachine:
        """Of the preset `model` in 16 bits on a GPU; `batch_s`: in place of what the figures say."""
        config = preset(model)
        costs = figures.costs(config, packed=False)
        if batch_s is not None:
            costs = dataclasses.replace(costs, batch_s=batch_s)
        page_bytes = 2 * 2 * config.heads * config.head_dim * config.layers * page_tokens
        return cls(costs, figures.request_s, config.layers, page_bytes)

    def costs_of_pages(self, page_bytes: int) -> Costs:
        """The same costs for an engine whose pages have `page_bytes`: the link brings as many pages a second."""
        link = tuple((size, rate * page_bytes / self.page_bytes) for size, rate in self.costs.link)
        return dataclasses.replace(self.costs, link=link)


@dataclass(frozen=True)
class VirtualArrivals:
    """Loads that are there at `end`."""

    clock: VirtualClock
    end: float

    def wait(self) -> None:
        self.clock.until(self.end)


class VirtualMover(Mover):
    """Moves no bytes; copies end when their time has come."""

    def __init__(self, old: Mover, machine: VirtualMachine, clock: VirtualClock) -> None:
        super().__init__(old.pool, old.arena)
        self._machine, self._clock = machine, clock
        self._free = dict.fromkeys((LOAD, STORE), clock())
        self._under_way: dict[tuple[str, int], tuple[float, float]] = {}  # (kind, ticket) -> when near, when over

    @property
    def page_s(self) -> float:
        return self._machine.page_bytes / self._machine.costs.link[-1][1]

    def submit(self, kind: str, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self._begin(kind, copy, 1.0)

    def submit_split(self, loads: Sequence[Copy], first_layer: int, pieces: Pieces | None = None) -> VirtualArrivals:
        for load in loads:
            self._begin(LOAD, load, 1 - first_layer / self._machine.layers)
        return self.arrivals([load.ticket for load in loads])

    def _begin(self, kind: str, copy: Copy, share: float) -> None:
        begin = max(self._free[kind], self._clock())
        took = share * len(copy.gpu_pages) * self.page_s
        self._free[kind] = begin + took
        known = begin + self._machine.costs.load_s
        self._under_way[kind, copy.ticket] = known + NEAR_SHARE * took, known + took

    def poll(self) -> list[Finished]:
        now = self._clock()
        ended = sorted((over, *copy) for copy, (_, over) in self._under_way.items() if over <= now)
        for _, kind, ticket in ended:
            del self._under_way[kind, ticket]
        return [Finished(kind, ticket, None) for _, kind, ticket in ended]

    def pending(self) -> int:
        return len(self._under_way)

    def wait(self, timeout_s: float = math.inf) -> bool:
        self._clock.until(self.next_end(last=True))
        return True

    def next_end(self, last: bool = False) -> float:
        """When a copy is near or over next, or the last one is over; now where none is under way."""
        times = [time for each in self._under_way.values() for time in each if time > self._clock()]
        return (max if last else min)(times, default=self._clock())

    def load_s(self, size: int) -> float:
        return size / self.pool[:1].nbytes * self.page_s

    def near(self, ticket: int) -> bool:
        return self._under_way[LOAD, ticket][0] <= self._clock()

    def arrivals(self, tickets: Collection[int]) -> VirtualArrivals:
        return VirtualArrivals(self._clock, max(self._under_way[LOAD, ticket][1] for ticket in tickets))


@dataclass(frozen=True)
class VirtualBatch:
    """A batch that is over at `end`."""

    logits: npt.NDArray[np.float32]
    clock: VirtualClock
    end: float

    def result(self) -> npt.NDArray[np.float32]:
        self.clock.until(self.end)
        return self.logits

    def waited(self) -> dict[int, float]:
        return {}


class VirtualRunner:
    """Takes the loop's time as a batch starts, and the device's behind that."""

    overlaps = True

    def __init__(self, machine: VirtualMachine, clock: VirtualClock, tasks: int, seed: int) -> None:
        self._machine, self._clock, self._tasks = machine, clock, tasks
        self._rng = np.random.default_rng(seed)
        self._free = clock()
        self.batches = self.requests = self._rows = 0

    def room(self, size: BatchSize) -> BatchArrays:
        return BatchArrays.empty(size)

    def early_room(self, size: BatchSize) -> BatchArrays:
        return BatchArrays.empty(size)

    def start_early(self, early: EarlyLayers) -> None:
        self._clock.until(self._clock() + self._machine.costs.plan_row_s * early.plan.rows)
        self._free = max(self._free, self._clock()) + early.layers * self._layer_s(early.plan)

    def start(
        self, plan: BatchPlan, arrivals: Arrivals | None = None, early: EarlyLayers | None = None
    ) -> VirtualBatch:
        costs, requests = self._machine.costs, len(plan.scored)
        self.batches, self.requests, self._rows = self.batches + 1, self.requests + requests, self._rows + plan.rows
        self._clock.until(
            self._clock()
            + costs.batch_s * self._rng.uniform(1 - JITTER, 1 + JITTER)
            + self._machine.request_s * requests
            + costs.plan_row_s * plan.rows
        )
        took = (self._machine.layers - (early.layers if early else 0)) * self._layer_s(plan)
        end = max(self._free, self._clock()) + took
        if arrivals is not None:
            assert isinstance(arrivals, VirtualArrivals)
            end = max(end, arrivals.end + took * NEAR_SHARE)
        self._free = end
        return VirtualBatch(np.zeros((plan.candidates, self._tasks), np.float32), self._clock, end)

    def _layer_s(self, plan: BatchPlan) -> float:
        pairs = int(plan.layout.limit.sum(dtype=np.int64)) + plan.candidates  # each of which sees itself
        return self._machine.costs.compute_s(plan.rows, pairs)

    def settle(self) -> None:
        self._clock.until(self._free)

    def stats(self) -> dict[str, Any]:
        return {"rows": self._rows, "padded_rows": 0, "padded_rows_share": None}
