"""What goes wrong while a batch restores its users' states: scores stay right, and nothing half made is found."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from engine_world import World
from restored_worlds import (
    FORMATS,
    LAYERS,
    PREFIX,
    SPLITS,
    Crash,
    SomeFail,
    deep_world,
    on_the_host,
    settle,
    split_under_way,
    tokens,
)

Make = Callable[..., World]
TIMEOUT_MS = 200


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


# Copies that fail


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("host_format", FORMATS)
def test_the_user_of_a_failed_load_is_encoded_by_the_next_batch_and_others_are_not(
    world: Make, host_format: str, layer: int, late: bool
) -> None:
    faults = SomeFail()
    w = deep_world(world, gpu_pages=22, host_format=host_format)
    on_the_host(w, "a", "b", "c")
    mover = w.delay_copies(late, faults)
    w.restore_at(layer)
    held = w.held("b")[0]
    faults.begin(1)
    batches = w.value("batches_total")
    pending = [w.submit(user) for user in "abc"]
    settle(w, mover)
    assert tokens(pending[1]) == (held, 0, PREFIX - held)
    assert all(tokens(pending[place])[2] == 0 for place in (0, 2))
    assert w.value("batches_total") == batches + 2
    assert (w.value("loads_failed_total"), w.value("failed_total")) == (1, 0)
    again = [w.submit(user) for user in "abc"]
    settle(w, mover)
    assert all(tokens(each) == (PREFIX, 0, 0) for each in again)
    w.assert_empty()


@pytest.mark.parametrize("layer", SPLITS)
def test_all_loads_of_a_batch_fail(world: Make, layer: int) -> None:
    faults = SomeFail()
    w = deep_world(world, fault=faults)
    on_the_host(w, "a", "b")
    w.restore_at(layer)
    faults.begin(0, 1)
    pending = [w.submit(user) for user in "abab"]
    w.run()
    assert all(tokens(each)[1] == 0 for each in pending)
    assert w.value("restored_batches_total", "split") == 1
    w.assert_empty()


# Batches that fail


@pytest.mark.parametrize("copied", [False, True], ids=["copying", "copied"])
@pytest.mark.parametrize("launch", range(LAYERS))
@pytest.mark.parametrize("host_format", ["kv", "x8"])
def test_a_batch_that_fails_in_any_layer_publishes_nothing_and_keeps_nothing(
    world: Make, host_format: str, launch: int, copied: bool
) -> None:
    w, mover, pending = split_under_way(world, 2, copied=copied, host_format=host_format)
    held = [w.held(user) for user in "ab"]
    Crash(w, launch)
    w.step()
    for each in pending:
        assert isinstance(each.future.exception(0), RuntimeError)
    assert [w.held(user) for user in "ab"] == held
    stats = w.tiers.index.stats()
    under_way = 0 if copied or launch >= 2 else 2  # what waits for its copy keeps its pages until that has ended
    assert (stats.loads_in_flight, stats.batches_in_flight) == (2 if not copied else 0, 0)
    assert len(mover.jobs) == under_way
    again = [w.submit(user) for user in "ab"]
    w.step()
    assert not any(each.future.done() for each in again)
    settle(w, mover)
    assert [tokens(each)[:2] for each in again] == [(gpu, host - gpu) for gpu, host in held]
    assert w.value("loads_total") == 4
    w.assert_empty()


def test_requests_do_not_begin_over_what_a_failed_batch_left_behind(world: Make) -> None:
    """Its load brings only some layers, however near it is."""
    w, mover, pending = split_under_way(world, 2, copied=False)
    mover.near_loads = True
    Crash(w, 0)
    w.step()
    assert all(each.future.done() for each in pending)
    again, batches = w.submit("a"), w.value("batches_total")
    for _ in range(3):
        w.step()
    assert not again.future.done()
    settle(w, mover)
    assert again.verify().host_tokens > 0
    assert (mover.overlapped, w.value("batches_total")) == (0, batches + 1)
    w.assert_empty()


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_a_batch_that_does_not_start(world: Make, layer: int) -> None:
    w = deep_world(world)
    on_the_host(w, "a", "b")
    mover = w.delay_copies()
    w.restore_at(layer)
    runner = w.engine._core.served.runner
    start, broken = runner.start, [True]

    def start_or_not(*arguments: Any) -> Any:
        if broken and broken.pop():
            raise RuntimeError("no device")
        return start(*arguments)

    runner.start = start_or_not  # type: ignore[method-assign]
    pending = [w.submit(user) for user in "ab"]
    w.step()
    assert all(isinstance(each.future.exception(0), RuntimeError) for each in pending)
    assert w.tiers.index.stats().batches_in_flight == 0
    settle(w, mover)
    again = [w.submit(user) for user in "ab"]
    settle(w, mover)
    for each in again:
        each.verify()
    w.assert_empty()


@pytest.mark.parametrize("where", ["index.begin_batch", "plan", "plan early"])
def test_a_batch_that_cannot_be_planned(world: Make, where: str) -> None:
    w = deep_world(world)
    on_the_host(w, "a", "b")
    mover = w.delay_copies()
    w.restore_at(2)
    core: Any = w.engine._core
    owner, name = (core.tiers.index, "begin_batch") if where == "index.begin_batch" else (core.served.planner, "plan")
    real, left = getattr(owner, name), [2 if where == "plan early" else 1]

    class Broken:
        def __getattr__(self, attribute: str) -> Any:
            return self.call if attribute == name else getattr(owner, attribute)

        def call(self, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("out of memory")
            return real(*arguments)

    if where == "index.begin_batch":
        core.tiers.index = Broken()
    else:
        core.served.planner = Broken()
    pending = [w.submit(user) for user in "ab"]
    w.step()
    assert all(isinstance(each.future.exception(0), RuntimeError) for each in pending)
    assert w.tiers.index.stats().loads_in_flight == 2  # for nothing, but under way
    settle(w, mover)
    assert w.tiers.index.stats().loads_in_flight == 0
    again = [w.submit(user) for user in "ab"]
    settle(w, mover)
    assert all(each.verify().host_tokens > 0 for each in again)
    w.assert_empty()


@pytest.mark.parametrize("begun", [False, True], ids=["lost for long", "begun"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_loads_that_the_mover_does_not_take(world: Make, layer: int, begun: bool) -> None:
    """Whether they run all the same is not known: nobody finds their pages, and their users do not wait for them."""
    w = deep_world(world, gpu_pages=26)
    on_the_host(w, "a", "b")
    mover = w.delay_copies()
    w.restore_at(layer)
    real, given = mover.submit_split, []

    def submit_split(*arguments: Any) -> Any:
        given.append(arguments)
        if begun:
            real(*arguments)
        raise RuntimeError("no device")

    mover.submit_split = submit_split  # type: ignore[method-assign]
    pending = [w.submit(user) for user in "ab"]
    w.engine.step()
    assert all(isinstance(each.future.exception(0), RuntimeError) for each in pending)
    mover.submit_split = real  # type: ignore[method-assign]
    again = [w.submit(user) for user in "ab"]
    for _ in range(3):
        w.engine.step()
    assert [tokens(each) for each in again] == [(0, 0, PREFIX)] * 2
    stats = w.tiers.index.stats()
    assert (stats.detached, stats.batches_in_flight) == (2, 0)
    if not begun:
        real(*given[0])
    settle(w, mover)
    assert [w.held(user)[0] for user in "ab"] == [PREFIX, PREFIX]
    w.assert_empty()


def test_a_batch_about_which_nothing_is_decided_holds_nothing(world: Make) -> None:
    w = deep_world(world)
    on_the_host(w, "a", "b")
    held = [w.held(user) for user in "ab"]

    def undecided(*_: Any) -> Any:
        raise RuntimeError("no costs")

    w.tiers.restoring._choose = undecided
    pending = [w.submit(user) for user in "ab"]
    w.run()
    assert all(isinstance(each.future.exception(0), RuntimeError) for each in pending)
    assert [w.held(user)[1] for user in "ab"] == [host for _, host in held]
    w.assert_idle()
    w.restore_at(2)
    assert w.score("a").host_tokens > 0
    w.assert_empty()


# Copies that do not end


def test_the_load_of_a_batch_that_is_stuck_publishes_nothing(world: Make) -> None:
    """Who waits for the batch waits for the load; what both made is void once it took too long."""
    w, mover, pending = split_under_way(world, 2, copied=False, copy_timeout_ms=TIMEOUT_MS)
    w.clock.now += TIMEOUT_MS / 1000 + 0.001
    w.step()
    assert w.value("copies_stuck_total") == 2
    for each in pending:
        each.verify()
    assert [w.held(user) for user in "ab"] == [(0, 0), (0, 0)]
    again = w.submit("a")
    settle(w, mover)
    assert tokens(again) == (0, 0, PREFIX)
    w.assert_empty()


def test_the_load_that_a_failed_batch_left_behind_is_stuck(world: Make) -> None:
    w, mover, _ = split_under_way(world, 2, copied=False, users="a", copy_timeout_ms=TIMEOUT_MS, gpu_pages=20)
    Crash(w, 0)
    w.step()
    again = w.submit("a")
    w.step()
    assert not again.future.done()
    w.clock.now += TIMEOUT_MS / 1000 + 0.001
    for _ in range(3):
        w.step()
    assert tokens(again) == (0, 0, PREFIX)
    assert w.value("copies_stuck_total") == 1
    assert w.tiers.index.stats().detached == 1
    settle(w, mover)
    assert w.held("a") == (PREFIX, PREFIX)
    w.assert_empty()


# No room


def test_users_for_whose_loads_there_is_no_room_are_encoded_beside_the_others(world: Make) -> None:
    """Pages that a store holds cannot be evicted; two loads take what is left, and the third user is not kept."""
    w = deep_world(world, gpu_pages=20, max_batch_tokens=200)
    on_the_host(w, "a", "b", "c")
    w.engine.invalidate("filler")
    mover = w.delay_copies()
    w.put("new", 30)
    fresh = w.submit("new")
    w.step()
    fresh.verify()
    assert [kind for kind, *_ in mover.jobs] == ["store"]
    w.restore_at(2)
    batches = w.value("batches_total")
    pending = [w.submit(user) for user in "abc"]
    w.step()
    assert [tokens(each) for each in pending] == [(0, PREFIX, 0), (0, PREFIX, 0), (0, 0, PREFIX)]
    assert w.value("batches_total") == batches + 1
    settle(w, mover)
    w.assert_empty()
