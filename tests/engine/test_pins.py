"""Pinned users through an engine: whose states stay, what is counted, and what ends a pin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_world import World
from small_models import small_model

from mtserve.config import EngineConfig
from mtserve.engine.checks import MAX_PINS
from mtserve.engine.engine import Engine
from mtserve.errors import InvalidArgument

Make = Callable[..., World]


def test_pinned_users_are_found_on_the_device_after_others_came(world: Make) -> None:
    w = world(gpu_pages=24, pin_budget=0.5)
    assert w.engine.pin(["a", "b", "unknown"]) == 3
    assert w.engine.pin(["a"]) == 0
    for user in "abcdefg":
        w.put(user, 17)
        w.score(user)
    assert w.score("a").tier == w.score("b").tier == "gpu"
    assert w.score("c").tier == "host"
    metrics = w.engine.stats()["metrics"]
    assert metrics["pinned_users"] == {"gpu": 2, "host": 2}
    assert metrics["pinned_pages"]["gpu"] == w.engine.stats()["tiers"]["gpu"]["pinned_pages"] == 10
    assert w.engine.unpin(["a", "b", "c"]) == 2
    assert w.engine.stats()["metrics"]["pinned_pages"] == {"gpu": 0, "host": 0}
    for user in "cdefg":
        w.score(user)
    assert w.score("a").tier == "host"
    w.engine.check()


def test_a_pin_outlives_states_but_not_its_user(world: Make) -> None:
    w = world(gpu_pages=24, pin_budget=0.5)
    w.put("a", 17)
    w.engine.pin(["a"])
    w.score("a")
    w.engine.invalidate()
    assert w.engine.stats()["metrics"]["pinned_users"] == {"gpu": 0, "host": 0}
    w.score("a")
    assert w.engine.stats()["metrics"]["pinned_users"]["gpu"] == 1
    w.delete("a")
    assert w.engine.unpin(["a"]) == 0
    w.engine.check()


def test_what_no_list_of_users_is_is_refused(world: Make) -> None:
    w = world()
    for call in (w.engine.pin, w.engine.unpin):
        for users, field in (("alice", "user_ids"), (["a"] * (MAX_PINS + 1), "user_ids"), (["a", ""], "user_id")):
            with pytest.raises(InvalidArgument) as raised:
                call(users)
            assert raised.value.field == field
    assert w.engine.unpin(["a"]) == 0


def test_without_a_cache_nobody_is_pinned() -> None:
    with Engine(small_model(0), EngineConfig(device="cpu", cache="off"), start=False) as engine:
        assert (engine.pin(["a"]), engine.unpin(["a"])) == (0, 0)
