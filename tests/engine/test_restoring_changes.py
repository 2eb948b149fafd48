"""What changes while a batch restores its users' states: histories, features, the model, and who is there to ask."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import NoReturn

import pytest
from engine_world import World
from restored_worlds import (
    COUNT,
    FORMATS,
    LAYERS,
    PREFIX,
    Crash,
    deep_world,
    on_the_host,
    settle,
    split_under_way,
    tokens,
)
from small_models import make_features, small_model

from mtserve.errors import ResourceExhausted

Make = Callable[..., World]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def invalidated(w: World) -> None:
    w.engine.invalidate("a")


def all_invalidated(w: World) -> None:
    w.engine.invalidate()


def deleted(w: World) -> None:
    w.delete("a")
    w.put("a", 9)


def corrected(w: World) -> None:
    w.truncate("a", COUNT - 3)
    w.append("a", 3)


def frozen_again(w: World) -> None:
    w.put_rows("a", None, make_features(w.rng))


def cancelled(w: World) -> None:
    """Nothing else: whoever asked is gone."""


@pytest.mark.parametrize("copied", [False, True], ids=["copying", "copied"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("change", [invalidated, all_invalidated, deleted, corrected, frozen_again, cancelled])
def test_a_user_who_changes_while_the_batch_is_under_way(
    world: Make, change: Callable[[World], None], layer: int, copied: bool
) -> None:
    w, mover, pending = split_under_way(world, layer, copied=copied)
    if change is cancelled:
        pending[0].future.cancel()
    change(w)
    w.engine.check()
    after = w.submit("a")
    w.step()
    if change is not cancelled:
        pending[0].verify()  # by the history as it stood
    assert pending[1].verify().encoded_tokens == 0
    settle(w, mover)
    found = tokens(after)
    if change in (invalidated, all_invalidated, deleted, frozen_again):
        assert found[:2] == (0, 0)
    elif change is corrected:
        assert found == (PREFIX - 3, 0, 3)
    else:
        assert found == (PREFIX, 0, 0)
    w.assert_empty()


@pytest.mark.parametrize("failed", [False, True], ids=["the batch ends", "the batch has failed"])
@pytest.mark.parametrize("host_format", ["kv", "x8"])
def test_a_model_replaced_while_the_batch_is_under_way(world: Make, host_format: str, failed: bool) -> None:
    w, mover, pending = split_under_way(world, 2, copied=False, host_format=host_format)
    if failed:
        Crash(w, 0)
        w.step()
    queued = w.submit("b")
    w.engine._core.batches.land()
    assert all(each.future.done() for each in pending)
    if not failed:
        for each in pending:
            each.verify()
    w.replace(small_model(1, layers=LAYERS, d=32))
    w.engine.check()
    settle(w, mover)
    assert tokens(queued) == (0, 0, PREFIX)
    w.evict_from_gpu(("one", "two"))
    settle(w, mover)
    w.evict_from_gpu()
    w.restore_at(2)
    last = w.submit("b")
    settle(w, mover)
    assert last.verify().host_tokens > 0
    w.assert_empty()


@pytest.mark.parametrize("host_format", FORMATS)
def test_a_model_for_which_there_is_no_room_replaces_nothing(
    world: Make, monkeypatch: pytest.MonkeyPatch, host_format: str
) -> None:
    """What the old weights packed is unpacked by the old weights."""
    w = deep_world(world, host_format=host_format)
    on_the_host(w, "a", "b")
    served = w.engine.stats()["model"]

    def no_room(*_: object) -> NoReturn:
        raise ResourceExhausted("no room for its activations", field="gpu_cache")

    with monkeypatch.context() as short:
        short.setattr("mtserve.engine.served.make_runner", no_room)
        with pytest.raises(ResourceExhausted):
            w.engine.replace_model(small_model(1, layers=LAYERS, d=32))
    assert w.engine.stats()["model"] == served
    for layer, user in ((0, "a"), (2, "b")):
        w.restore_at(layer)
        assert w.score(user).host_tokens > 0


def test_loads_under_way_may_run_the_unpacker_of_the_model_before(world: Make) -> None:
    """Its launches are queued: what they point to must not be anything else's before they have run."""
    w = deep_world(world, host_format="x8")
    on_the_host(w, "a")
    mover = w.delay_copies()
    w.tiers.restoring = None  # loads begin by themselves
    pending = w.submit("a")
    w.step()
    assert [kind for kind, *_ in mover.jobs] == ["load"]
    before = weakref.ref(mover.unpacker)
    w.replace(small_model(1, layers=LAYERS, d=32))
    gc.collect()
    assert before() is not None is not mover.unpacker is not before()
    settle(w, mover)
    pending.verify()
    gc.collect()
    assert before() is None


@pytest.mark.parametrize("failed", [False, True], ids=["the batch ends", "the batch has failed"])
def test_an_engine_closed_while_the_batch_is_under_way(world: Make, failed: bool) -> None:
    w, mover, pending = split_under_way(world, 2, copied=False)
    if failed:
        Crash(w, 0)
        w.step()
        assert len(mover.jobs) == 2
    w.engine.close()
    for each in [] if failed else pending:
        each.verify()
    assert (mover.jobs, w.tiers.index.stats().loads_in_flight, w.value("loads_in_flight")) == ([], 0, 0)
    w.engine.check()
