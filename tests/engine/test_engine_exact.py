"""A cached score equals a full recompute, whatever came before and whoever shares the batch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_world import TOLERANCE, World
from small_models import BARE_SCHEMA, CAUSAL, START_MS, make_behaviours, small_model

from mtserve.types import History, Request

Make = Callable[..., World]
MODELS: dict[str, dict[str, Any]] = {
    "full static": {},
    "causal static": {"static_attention": "causal"},
    "causal": CAUSAL,
    "all real time, full": {"static_history": False},
    "gate first": {"gate_first": True},
    "plain norm": {"norm": "plain"},
    "no cross features": {"cross_features": False},
    "one head, one layer": {"heads": 1, "layers": 1, "head_dim": 16},
    "one task": {"tasks": ("ctr",)},
    "no U features": {"schema": BARE_SCHEMA},
    "no U features, causal": {"schema": BARE_SCHEMA, **CAUSAL},
}


@pytest.mark.parametrize("page_tokens", [1, 3, 64])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_a_cached_score_equals_a_full_recompute_after_any_appends(
    world: Make, changes: dict[str, Any], page_tokens: int
) -> None:
    w = world(small_model(**changes), page_tokens=page_tokens, gpu_pages=80)
    w.put("a", 7, features=bool(w.schema.user))
    encoded = 0
    for count in (0, 1, 2, 1, 5, 3, 11, 1, 9, 1, 30, 1):
        w.append("a", count)
        encoded += w.score("a", 5).encoded_tokens
    again = w.score("a", 5)
    assert (again.gpu_tokens, again.encoded_tokens) == (again.prefix_tokens, 0)
    assert encoded < 12 * again.prefix_tokens


def test_the_tolerance_can_see_one_old_behaviour(world: Make) -> None:
    """The comparison above would mean nothing if a behaviour's weight were below its tolerance."""
    w = world()
    w.put("a", 15)
    pending = w.submit("a", 4)
    rows = w.rows["a"].copy()
    for index in (0, 9, 14):
        changed = rows.copy()
        changed["item"][index] += 1
        other = dataclasses.replace(pending, history=History(w.features["a"], 0, changed))
        assert np.abs(other.expected() - pending.expected()).max() > 100 * TOLERANCE
    w.run()
    pending.verify()


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_candidates_do_not_see_each_other_nor_their_order(world: Make, changes: dict[str, Any]) -> None:
    w = world(small_model(**changes))
    w.put("a", 17)
    rows = w.candidates(9)
    whole = w.score("a", candidates=rows).logits
    order = w.rng.permutation(9)
    np.testing.assert_allclose(w.score("a", candidates=rows[order]).logits, whole[order], rtol=0, atol=TOLERANCE)
    for part in (slice(0, 1), slice(4, 7)):
        alone = w.score("a", candidates=rows[part]).logits
        np.testing.assert_allclose(alone, whole[part], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_score_does_not_depend_on_who_shares_the_batch(world: Make, cache: str) -> None:
    users = {"a": 23, "b": 0, "c": 1, "d": 40, "e": 12}
    alone, together = world(cache=cache, seed=5), world(cache=cache, seed=5)
    rows = alone.candidates(6)
    for w in (alone, together):
        for user, count in users.items():
            w.put_rows(user, make_behaviours(np.random.default_rng(count), count), None)
    single = {user: alone.score(user, candidates=rows).logits for user in users}
    pending = {user: together.submit(user, candidates=rows) for user in users}
    together.run()
    assert together.value("batches_total") == 1
    for user, each in pending.items():
        np.testing.assert_allclose(each.verify().logits, single[user], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_exposures_in_the_middle_of_the_history(world: Make, changes: dict[str, Any]) -> None:
    """A candidate sees what happened strictly before its exposure; S it always sees."""
    w = world(small_model(**changes))
    w.put("a", 19)
    times = w.rows["a"]["time_ms"]
    exposures = [*times, *(times + 1), 0, START_MS - 5, times[-1] + 10**9]
    w.score("a", candidates=w.candidates(len(exposures), exposures))
    hidden, seen = w.candidates(1), w.candidates(1)
    hidden[:] = seen
    hidden["time_ms"], seen["time_ms"] = times[-1], times[-1] + 1
    assert not np.allclose(w.score("a", candidates=hidden).logits, w.score("a", candidates=seen).logits)


def test_an_unset_exposure_is_after_every_behaviour_even_those_of_the_future(world: Make) -> None:
    w = world()
    w.put("a", 5)
    future_ms = int(w.clock() * 1000) + 60_000
    rows = make_behaviours(w.rng, 3, future_ms)
    w.put_rows("a", np.concatenate((w.rows["a"], rows)), None)
    candidates = w.candidates(2)
    explicit = candidates.copy()
    explicit["time_ms"] = rows["time_ms"][-1] + 1
    expected = w.score("a", candidates=explicit).logits
    future = w.engine.submit(Request("a", candidates))
    w.run()
    np.testing.assert_allclose(future.result(0).logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("schema", [None, BARE_SCHEMA], ids=["with U", "without U"])
def test_a_user_with_hardly_a_history(world: Make, count: int, schema: Any) -> None:
    w = world(small_model() if schema is None else small_model(schema=schema))
    w.put("new", count, features=False)
    for _ in range(2):
        result = w.score("new", 4)
        assert result.prefix_tokens == count + len(w.schema.user)


def test_the_reference_kernels_and_the_eager_ones_agree(world: Make) -> None:
    w = world(kernels="reference", page_tokens=3)
    for user, count in (("a", 13), ("b", 4)):
        w.put(user, count)
        w.score(user, 2)
        w.append(user, 3)
        assert w.score(user, 2).encoded_tokens == 3


def test_without_a_cache_everything_is_encoded_every_time(world: Make) -> None:
    w = world(cache="off")
    w.put("a", 17)
    for _ in range(2):
        assert w.score("a").encoded_tokens == 19
        w.append("a", 1)
        w.truncate("a", 17)
    assert w.tiers is None
    assert w.engine.invalidate() == 0
    w.engine.prefetch("a")
    w.run()
    w.replace(small_model(1))
    w.score("a")
    assert json.loads(json.dumps(w.engine.stats()))["tiers"] == {}


def test_results_say_who_they_are(world: Make) -> None:
    w = world()
    w.put("a", 12)
    result = w.score("a", 4)
    assert (result.position, result.prefix_tokens, result.tier, result.tasks) == (12, 14, "cold", ("ctr", "ctcvr"))
    assert result.scores.dtype == result.logits.dtype == np.float32
    assert w.score("a", 1).tier == "gpu"
