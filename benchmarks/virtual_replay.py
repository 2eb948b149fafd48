"""Replays of traces through the engine's own loop on virtual time: queue, window, index, policy, tiers and batches are
the engine's; the device, the link and the time are those of virtual_device.py. No GPU, no threads, and a second of a
replay takes about as long as planning its batches does.

    clients  one thread, beside the loop: CLIENT_S in the mean, exponentially distributed, from an answer to the next request

The model that the engine holds has the layers and limits of a real one, and states so small that the pages of hundreds of
users take no memory to speak of.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
from virtual_device import VirtualClock, VirtualMachine, VirtualMover, VirtualRunner

from mtserve.config import EngineConfig
from mtserve.engine.engine import Engine
from mtserve.engine.request.job import Job
from mtserve.history.memory import MemoryHistory
from mtserve.model.presets import default_schema, preset
from mtserve.model.ranking import RankingModel
from mtserve.model.weights import initialise
from mtserve.trace.replay.driver import Answer, Driver
from mtserve.trace.replay.features import TraceRows
from mtserve.trace.replay.run_log import RunLog
from mtserve.trace.replay.runs import WARM_UP_USERS
from mtserve.types import History, Request

CLIENT_S = 50e-6
STUCK_STEPS = 100_000  # without an answer


def small_states(name: str) -> RankingModel:
    """As many layers, tokens and limits as the preset `name`, in as little memory as can be."""
    config = dataclasses.replace(preset(name), name=f"{name} in small", d=8, heads=1, head_dim=8)
    return initialise(RankingModel(config, default_schema(item_buckets=1000, dim=8)), seed=0)


class VirtualEngine:
    """An engine driven by hand on virtual time."""

    def __init__(
        self, model: RankingModel, config: EngineConfig, machine: VirtualMachine, history: MemoryHistory, seed: int
    ) -> None:
        self.clock = VirtualClock()
        config = dataclasses.replace(config, device="cpu", dtype="bfloat16", host_pinning="wait")
        self.engine = Engine(model, config, history=history, clock=self.clock, start=False)
        self._core = core = self.engine._core
        self.runner = VirtualRunner(machine, self.clock, len(model.config.tasks), seed)
        core.served.runner = self.runner
        self._mover: VirtualMover | None = None
        tiers = core.tiers
        if tiers is None:
            return
        self._mover = VirtualMover(tiers.mover, machine, self.clock)
        tiers.mover = tiers._onload.mover = self._mover
        if config.restore == "auto" and len(self._mover.arena):
            costs = machine.costs_of_pages(self._mover.pool[:1].nbytes)
            tiers.restore_by(costs, frozen_sees_all=model.config.static_attention == "full")

    @property
    def spare(self) -> int:
        """Requests encoded whole and not kept."""
        return int(self.engine.metrics.value("spare_requests_total"))

    def step(self, until: float) -> None:
        """One turn of the loop; where nothing is to be done, time passes until something is, or `until`."""
        if self.engine.step():
            return
        due = min(until, self.clock() + self._core.due_in())
        if self._mover is not None and self._mover.pending():
            due = min(due, self._mover.next_end())
        assert due < math.inf, "nothing will ever happen again"
        self.clock.until(max(due, math.nextafter(self.clock(), math.inf)))


class Answered:
    """The driver's queue of answers: who waits for one drives the engine, and takes some time for each."""

    def __init__(self, virtual: VirtualEngine, seed: int) -> None:
        self._virtual, self._answers = virtual, deque[tuple[float, Answer]]()
        self._busy_to, self._rng = virtual.clock(), np.random.default_rng(seed)

    def put(self, answer: Answer) -> None:
        self._busy_to = max(self._busy_to, self._virtual.clock()) + self._rng.exponential(CLIENT_S)
        self._answers.append((self._busy_to, answer))

    def get(self) -> Answer:
        for _ in range(STUCK_STEPS):
            ready = self._answers[0][0] if self._answers else math.inf
            if ready <= self._virtual.clock():
                return self._answers.popleft()[1]
            self._virtual.step(ready)
        raise AssertionError("the engine answers nobody")


@dataclass(frozen=True)
class VirtualReplay:
    """One replay: the log of its requests, and what the batches were. Times are of the virtual clock."""

    log: RunLog
    batches: int
    users_a_batch: float
    spare_share: float


class _Waits:
    """In place of the engine's Passing: nobody is encoded to save a batch."""

    def know(self, *_: Any, **__: Any) -> None:
        pass

    def cheaper(self, *_: Any, **__: Any) -> bool:
        return False


@contextmanager
def all_wait() -> Iterator[None]:
    """Have engines made meanwhile let all wait who find no room, and give room in the order of arrival: an ablation."""

    def as_they_came(jobs: Sequence[Job], held_tokens: Callable[[Job], int]) -> Sequence[Job]:
        return jobs

    def waits(*_: Any) -> _Waits:
        return _Waits()

    onload = "mtserve.engine.tiers.onload."
    with patch(onload + "Passing", waits), patch(onload + "in_turn", as_they_came):
        yield


def replay(
    rows: TraceRows,
    model: RankingModel,
    config: EngineConfig,
    machine: VirtualMachine,
    *,
    in_flight: int,
    seed: int = 0,
) -> VirtualReplay:
    """Answer every request of a trace, `in_flight` at a time; whoever is answered asks again at once."""
    trace = rows.trace
    run = RunLog.empty(trace.cand_offsets, len(model.config.tasks))
    longest = max(65536, int(trace.history_lengths.max(initial=0)))
    with MemoryHistory(model.schema, max_append=longest) as history:
        virtual = VirtualEngine(model, config, machine, history, seed)
        with virtual.engine as engine:
            for user in np.unique(trace.user).tolist():
                engine.put_user(trace.user_ids[user], rows.user(user), rows.history(user))
            _warm_up(virtual, rows, min(in_flight, WARM_UP_USERS))
            spare, batches, requests = virtual.spare, virtual.runner.batches, virtual.runner.requests
            driver = Driver(engine, rows, run, concurrency=in_flight, clock=virtual.clock)
            driver._answers = Answered(virtual, seed)  # type: ignore[assignment]
            driver.drive()
            spare, batches = virtual.spare - spare, virtual.runner.batches - batches
            requests = virtual.runner.requests - requests
            engine.check()
            run.stats = engine.stats()
    assert not run.failures, run.first_failure
    return VirtualReplay(run, batches, requests / batches, spare / requests)


def _warm_up(virtual: VirtualEngine, rows: TraceRows, users: int) -> None:
    """As mtserve/trace/replay.py does: short to long histories, encoded in whole and with a delta, and forgotten again."""
    trace = rows.trace
    by_length = trace.user[np.argsort(trace.prefix_lengths(), kind="stable")]
    for held_back in (1, 0):
        futures = []
        for number, user in enumerate(by_length[np.linspace(0, len(by_length) - 1, users).astype(np.int64)].tolist()):
            behaviours = rows.history(user)
            history = History(rows.user(user), 0, behaviours[: max(0, len(behaviours) - held_back)])
            candidates = rows.candidates(trace.request(int(np.argmax(trace.user == user))))
            futures.append(virtual.engine.submit(Request(f"warm-up {number}", candidates, history=history)))
        while not all(future.done() for future in futures):
            virtual.step(math.inf)
    virtual.engine.invalidate()
