"""Where the loop's time goes: booked by phase, in full, and once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from engine_world import OverlappingRunner, World

from mtserve.engine.forward.batch import BatchPlan, EarlyLayers
from mtserve.engine.forward.runner import BatchRunner
from mtserve.engine.forward.runner import Pending as PendingBatch
from mtserve.engine.stopwatch import PHASES, Stopwatch
from mtserve.transfer.mover import Arrivals


class Script:
    """Seconds of the stopwatch, which pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def before(self, seconds: float, real: Callable[..., Any]) -> Callable[..., Any]:
        """`real`, which takes so long."""

        def slow(*args: Any, **options: Any) -> Any:
            self.passes(seconds)
            return real(*args, **options)

        return slow


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    monkeypatch.setattr(time, "perf_counter", script)
    return script


def test_a_lap_books_what_went_on_since_the_last_one(script: Script) -> None:
    watch = Stopwatch()
    for phase, seconds in (("outside", 1.0), ("copies", 2.0), ("planning", 4.0), ("copies", 8.0), ("idle", 0.0)):
        script.passes(seconds)
        assert watch.lap(phase) == script.now
    assert watch.seconds == {"outside": 1, "copies": 10, "planning": 4, "device": 0, "answers": 0, "idle": 0}
    assert tuple(watch.seconds) == PHASES
    with pytest.raises(KeyError):
        watch.lap("lunch")


def test_batches_that_overlap_count_once(script: Script) -> None:
    watch = Stopwatch()
    for began, ended, in_all in ((101, 103, 2), (102, 106, 5), (104, 106, 5), (110, 111, 6)):
        watch.landed(began, ended)
        assert watch.batch_s == in_all


def test_each_part_of_a_step_is_booked_as_what_it_is(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    core = world.engine._core
    world.put("ann", 9)
    world.run()
    for owner, name, seconds in (
        (core, "admit", 1.0),
        (core.tiers, "onload", 2.0),
        (core.served.planner, "plan", 4.0),
        (core.served.runner, "start", 8.0),
        (core.tiers, "release", 16.0),
        (core.tiers, "write_back", 32.0),
    ):
        monkeypatch.setattr(owner, name, script.before(seconds, getattr(owner, name)))
    pending = world.submit("ann")
    pending.future.add_done_callback(lambda _: script.passes(64.0))
    before = _loop(world)
    assert world.step()
    pending.verify()
    assert _since(before, _loop(world)) == {
        "outside": 1, "copies": 34, "planning": 4, "device": 8, "answers": 80, "idle": 0, "batches": 8,
    }  # fmt: skip


@dataclass(frozen=True)
class SlowBatch:
    """A batch whose end is waited for, 8 seconds long."""

    script: Script
    batch: PendingBatch

    def result(self) -> npt.NDArray[np.float32]:
        self.script.passes(8.0)
        return self.batch.result()

    def waited(self) -> dict[int, float]:
        return self.batch.waited()


class SlowRunner(OverlappingRunner):
    """Takes a second to launch a batch."""

    def __init__(self, script: Script, runner: BatchRunner) -> None:
        super().__init__(runner)
        self._script = script

    def start(
        self, plan: BatchPlan, arrivals: Arrivals | None = None, early: EarlyLayers | None = None
    ) -> PendingBatch:
        self._script.passes(1.0)
        return SlowBatch(self._script, super().start(plan, arrivals, early))


def test_a_batch_under_way_while_the_next_is_planned_counts_from_its_launch(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(max_batch_requests=1)
    core = world.engine._core
    for user in ("ann", "bob"):
        world.put(user, 9)
    world.run()
    core.served.runner = SlowRunner(script, core.served.runner)
    monkeypatch.setattr(core.served.planner, "plan", script.before(4.0, core.served.planner.plan))
    pending = [world.submit(user) for user in ("ann", "bob")]
    before = _loop(world)
    world.run()
    for each in pending:
        each.verify()
    spent = _since(before, _loop(world))
    assert spent["planning"] == 2 * (4 + 1)
    assert spent["device"] == 2 * 8
    # The first from its launch, over the other's planning and launch, to its end; the second from there on.
    assert spent["batches"] == (1 + 4 + 1 + 8) + 8
    assert spent["outside"] == spent["copies"] == spent["answers"] == spent["idle"] == 0


def test_the_phases_of_a_running_loop_are_the_whole_of_its_life() -> None:
    world = World(start=True)
    try:
        world.put("ann", 9)
        began = time.perf_counter()
        before = world.engine.stats()["loop_seconds"]
        inner = time.perf_counter()
        for _ in range(20):
            world.engine.score("ann", world.candidates(3))
        time.sleep(0.3)
        inner = time.perf_counter() - inner
        after = world.engine.stats()["loop_seconds"]
        outer = time.perf_counter() - began
    finally:
        world.engine.close()
    spent = {phase: after[phase] - before[phase] for phase in PHASES}
    assert min(spent.values()) > 0
    assert 0.98 * inner <= sum(spent.values()) <= 1.02 * outer
    assert spent["idle"] > 0.25


def _loop(world: World) -> dict[str, float]:
    stats = world.engine.stats()
    return {**stats["loop_seconds"], "batches": stats["batch_seconds"]}


def _since(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: seconds - before[name] for name, seconds in after.items()}
