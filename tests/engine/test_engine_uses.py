"""What the engine tells the cache of its batches: a request is one use of its user, in however many of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from engine_world import World
from small_models import CAUSAL, small_model

from mtserve.errors import TransferFailed

Make = Callable[..., World]


def told(w: World, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bool]]:
    """For each batch from now on: its users, and whether it does nothing but go on with requests of the user."""
    index, batches = w.tiers.index, []
    begin = index.begin_batch

    def begin_batch(users: Sequence[str], chains: Any, cached: Any, stored: Any, table: Any, again: Any) -> int:
        batches.append(dict(zip(users, again, strict=True)))
        return begin(users, chains, cached, stored, table, again)

    monkeypatch.setattr(index, "begin_batch", begin_batch)
    return batches


def of(user: str, batches: list[dict[str, bool]]) -> list[bool]:
    return [batch[user] for batch in batches if user in batch]


def test_parts_go_on_with_the_request_that_the_first_began(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    w = world(small_model(**CAUSAL), gpu_pages=40, cold_batch_tokens=11, cold_after=10)
    batches = told(w, monkeypatch)
    w.put("a", 40)
    w.put("b", 5)
    cold = w.submit("a")
    warm = []
    while not cold.future.done():
        warm.append(w.submit("b"))
        w.step()
    assert of("a", batches) == [False, True, True, True]
    w.run()
    assert of("b", batches) == [False] * len(warm)
    w.score("a")
    assert of("a", batches) == [False, True, True, True, False]
    w.engine.prefetch("a")
    w.run()
    assert of("a", batches)[5:] == [False]


def test_another_request_in_the_last_part_is_a_use(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    w = world(small_model(**CAUSAL), cold_batch_tokens=11, cold_after=10)
    batches = told(w, monkeypatch)
    w.put("a", 40)
    first = w.submit("a")
    w.step()
    w.step()
    second = w.submit("a")
    w.run()
    assert first.verify().encoded_tokens > 11
    second.verify()
    assert of("a", batches) == [False, True, True, False]


def test_what_is_encoded_again_for_a_load_that_failed_is_no_use(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = False

    def switched(kind: str) -> None:
        if kind == "load" and failing:
            raise TransferFailed(kind)

    w = world(gpu_pages=14, host_pages=40, restore="load")
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    w.overlap()
    w.delay_copies(fault=switched, near_loads=True)
    batches, failing = told(w, monkeypatch), True
    pending = w.submit("a")
    w.run()
    pending.verify()
    assert w.value("loads_failed_total") == 1
    assert of("a", batches) == [False, True]


def test_a_batch_that_was_not_begun_is_no_use(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    w = world()
    w.put("a", 5)
    job = w.submit("a")
    monkeypatch.setattr(w.tiers.index, "begin_batch", lambda *_: 1 / 0)
    w.engine._loop.run_inbox()
    (queued,) = w.engine._core.scheduler.jobs()
    w.run()
    assert isinstance(job.future.exception(), ZeroDivisionError)
    assert not queued.begun
