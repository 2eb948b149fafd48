"""Failed copies, delayed copies, crashed steps: the answer is right or an error, and nothing leaks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_world import World
from small_models import CAUSAL, small_model

from mtserve.errors import CorruptState, TransferFailed, Unavailable

Make = Callable[..., World]


class Faults:
    """Fails copies of the kinds in `failing`, and counts all."""

    def __init__(self) -> None:
        self.failing: set[str] = set()
        self.seen: list[str] = []

    def __call__(self, kind: str) -> None:
        self.seen.append(kind)
        if kind in self.failing:
            raise TransferFailed(f"{kind}: switched off")


def test_a_failed_load_is_encoded_instead(world: Make) -> None:
    faults = Faults()
    w = world(gpu_pages=12, fault=faults)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    faults.failing = {"load"}
    result = w.score("a")
    assert (result.gpu_tokens, result.host_tokens, result.encoded_tokens) == (4, 0, 19)
    assert (w.value("loads_failed_total"), w.value("loads_total"), w.value("load_bytes_total")) == (1, 0, 0)
    faults.failing = set()
    w.evict_from_gpu()
    assert w.score("a").host_tokens == 19  # the host's copy is as good as before
    w.assert_empty()


def test_what_a_failed_load_left_to_encode_is_not_counted_as_found_on_the_host(world: Make) -> None:
    faults = Faults()
    w = world(gpu_pages=12, fault=faults)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    faults.failing = {"load"}
    first = w.submit("a")
    while not first.future.done():
        w.step()  # fails, encodes, answers
    second = w.submit("a")  # in the very next step, before an idle one
    w.step()
    first.verify()
    assert second.verify().gpu_tokens == 23


def test_a_failed_store_is_not_on_the_host(world: Make) -> None:
    faults = Faults()
    w = world(gpu_pages=12, fault=faults)
    faults.failing = {"store"}
    w.put("a", 21)
    w.score("a")
    assert w.value("stores_failed_total") == 1
    assert w.held("a") == (23, 0)
    w.evict_from_gpu()
    result = w.score("a")
    assert (result.host_tokens, result.encoded_tokens) == (0, 19)
    w.assert_empty()


def test_a_store_that_failed_is_made_up_for_by_the_next(world: Make) -> None:
    faults = Faults()
    w = world(fault=faults)
    faults.failing = {"store"}
    w.put("a", 21)
    w.score("a")
    faults.failing = set()
    w.append("a", 1)
    w.score("a")
    assert w.held("a") == (24, 24)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_a_storm_of_failures_leaves_every_score_exact(world: Make, changes: dict[str, Any], late: bool) -> None:
    w = world(small_model(**changes), gpu_pages=14, host_pages=25, page_tokens=3)
    users = "abcd"
    for user in users:
        w.put(user, 9)

    def sometimes(kind: str) -> None:
        if w.rng.random() < 0.4:
            raise TransferFailed(kind)

    mover = w.delay_copies(late, sometimes)
    pending = []
    for _ in range(150):
        user = users[w.rng.integers(4)]
        w.append(user, int(w.rng.integers(3)))
        pending.append(w.submit(user, 1))
        w.step()
        while mover.jobs and w.rng.random() < 0.7:
            mover.release(int(w.rng.integers(len(mover.jobs))))
    for _ in range(30):
        mover.release_all()
        w.step()
    for each in pending:
        each.verify()
    for name in ("loads_total", "loads_failed_total", "stores_total", "stores_failed_total"):
        assert w.value(name) > 0, name
    assert sum(w.value(f"{kind}s{end}") for kind in ("load", "store") for end in ("_total", "_failed_total")) == len(
        mover.submitted
    )
    w.assert_empty()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("who", ["a", None], ids=["one user", "everybody"])
def test_states_invalidated_while_they_load_are_not_published(world: Make, who: str | None, late: bool) -> None:
    w = world(gpu_pages=12)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    mover = w.delay_copies(late)
    pending = w.submit("a")
    w.step()
    assert mover.submitted == ["load"]
    assert w.engine.invalidate(who) >= 1
    w.step()
    mover.release(0)
    w.step()
    assert pending.verify().encoded_tokens == 23
    mover.release_all()
    w.run()
    mover.release_all()
    w.run()
    assert w.score("a").gpu_tokens == 23
    mover.release_all()
    w.run()
    w.assert_empty()


@pytest.mark.parametrize("late", [False, True])
def test_states_invalidated_while_they_store_are_not_published(world: Make, late: bool) -> None:
    w = world()
    mover = w.delay_copies(late)
    w.put("a", 21)
    w.score("a")
    assert mover.submitted == ["store"]
    w.engine.invalidate("a")
    mover.release_all()
    w.run()
    assert w.held("a") == (0, 0)
    w.assert_empty()


@pytest.mark.parametrize("late", [False, True])
def test_a_history_corrected_while_its_old_states_store(world: Make, late: bool) -> None:
    w = world(gpu_pages=12)
    mover = w.delay_copies(late)
    w.put("a", 17)
    w.score("a")
    w.truncate("a", 13)
    w.append("a", 4)
    w.score("a")
    mover.release_all()
    w.run()
    mover.release_all()
    w.run()
    w.put("filler", 40)
    w.score("filler")
    mover.release_all()
    w.run()
    pending = w.submit("a")
    w.step()
    mover.release_all()
    w.run()
    assert pending.verify().host_tokens > 0


def test_histories_grow_while_their_states_store(world: Make) -> None:
    """The tail page is written by a batch while a write-back reads it."""
    w = world(gpu_pages=30, page_tokens=8)
    mover = w.delay_copies(late=True)
    w.put("a", 11)
    for _ in range(8):
        w.score("a")
        w.append("a", 1)
        if w.rng.random() < 0.4:
            mover.release_all()
    w.score("a")
    for _ in range(5):
        mover.release_all()
        w.step()
    gpu, host = w.held("a")
    assert gpu == host == 21


# Crashes


@pytest.mark.parametrize("op", ["attention", "group_layer_norm", "norm_gate", "page_write", "projection_silu"])
def test_a_crashed_step_fails_its_requests_and_leaks_nothing(
    world: Make, op: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    w = world(gpu_pages=30)
    w.put("a", 21)
    w.put("b", 5)
    w.score("b")
    countdown = [2]

    def crash() -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise RuntimeError("the kernel fell over")

    w.hook(op, crash)
    w.append("b", 2)
    pending = [w.submit("a"), w.submit("a"), w.submit("b")]
    w.run()
    for each in pending:
        with pytest.raises(RuntimeError, match="fell over"):
            each.future.result(0)
    assert w.value("failed_total") == 3
    assert w.held("a") == (0, 0)
    assert w.tiers.index.stats().gpu.in_flight == 0
    assert w.score("b").gpu_tokens == 7  # what was there before the crash still is
    assert w.score("a").gpu_tokens == 0
    w.assert_empty()


def test_a_crash_in_a_part_of_a_cold_prefix(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    w = world(small_model(**CAUSAL), cold_batch_tokens=11, cold_after=10)
    w.put("a", 40)
    pending = w.submit("a")
    w.step()
    crashes = [True]

    def crash() -> None:
        if crashes.pop() if crashes else False:
            raise RuntimeError("the kernel fell over")

    w.hook("attention", crash)
    w.step()
    assert isinstance(pending.future.exception(0), RuntimeError)
    w.run()
    assert w.score("a").gpu_tokens == 11  # the first part
    w.assert_empty()


@pytest.mark.parametrize("cache", ["on", "off"])
def test_scores_that_are_not_finite_are_an_error_and_drop_the_states(world: Make, cache: str) -> None:
    w = world(cache=cache)
    w.put("a", 9)
    w.put("b", 9)
    w.score("a")
    w.score("b")
    if cache == "on":
        w.tiers.mover.pool.fill_(float("nan"))
    else:
        with torch.no_grad():
            w.engine.model.position[8] = float("nan")
    pending = w.submit("a")
    w.run()
    with pytest.raises(CorruptState, match="'a'"):
        pending.future.result(0)
    assert w.value("failed_total") == 1
    if cache == "on":
        assert w.held("a") == (0, 0)
        assert w.score("a").encoded_tokens == 11


def test_an_engine_whose_loop_broke_answers_whoever_waits(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    entered, go = threading.Event(), threading.Event()

    def broken(kind: str) -> None:
        entered.set()
        go.wait(10)
        raise RuntimeError("the copy engine is gone")

    w = world(start=True, fault=broken)
    w.put("a", 9)
    first = w.submit("a")
    assert entered.wait(10)
    waiting = w.submit("a")  # posted to a loop that will not come back
    go.set()
    first.future.result(10)
    with pytest.raises(Unavailable, match="stopped"):
        waiting.future.result(10)
    with pytest.raises(Unavailable):
        w.submit("a")
    w.tiers.index.invalidate_all()
    w.tiers.check = lambda: None  # the one structure that the broken copy left behind
