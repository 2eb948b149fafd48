"""What survives when a history, the user's features or the model change: the true part, and no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_world import World
from small_models import CAUSAL, make_behaviours, make_features, small_config, small_model

from mtserve.engine.engine import Engine
from mtserve.errors import FailedPrecondition, InvalidArgument, NotFound
from mtserve.model.cut import cut_history
from mtserve.types import History

Make = Callable[..., World]

# 17 behaviours, max_realtime 10: U is tokens 0-1, S tokens 2-11, R tokens 12-18.
POSITION, PREFIX = 17, 19


@pytest.mark.parametrize("tier", ["gpu", "host"])
def test_a_correction_in_r_leaves_the_longest_true_prefix(world: Make, tier: str) -> None:
    w = world(gpu_pages=12)
    w.put("a", POSITION)
    w.score("a")
    if tier == "host":
        w.evict_from_gpu()
    w.truncate("a", 14)
    w.append("a", 3)
    result = w.score("a")
    assert result.gpu_tokens + result.host_tokens == 16
    assert (result.host_tokens > 0) == (tier == "host")
    assert result.encoded_tokens == 3
    assert w.score("a").gpu_tokens == PREFIX


def test_a_shortened_history_needs_nothing_new_and_loses_nothing(world: Make) -> None:
    w = world()
    w.put("a", POSITION)
    w.score("a")
    w.truncate("a", 15)
    assert w.score("a").gpu_tokens == PREFIX - 2


@pytest.mark.parametrize("change", ["S", "U", "first behaviour"])
def test_a_correction_in_u_or_s_leaves_nothing(world: Make, change: str) -> None:
    w = world()
    w.put("a", POSITION)
    w.score("a")
    if change == "U":
        w.put_rows("a", None, make_features(w.rng))
    elif change == "S":
        w.truncate("a", 9)
        w.append("a", POSITION - 9)
    else:
        rows = w.rows["a"].copy()
        rows["dwell"][0] += 1
        w.put_rows("a", rows, None)
    result = w.score("a")
    assert (result.gpu_tokens, result.host_tokens, result.encoded_tokens) == (0, 0, PREFIX)


def test_a_causal_model_keeps_what_precedes_the_correction(world: Make) -> None:
    w = world(small_model(**CAUSAL))
    w.put("a", POSITION)
    w.score("a")
    rows = w.rows["a"].copy()
    rows["item"][5] += 1
    w.put_rows("a", rows, None)
    assert w.score("a").gpu_tokens == 2 + 5
    w.put_rows("a", None, make_features(w.rng))
    assert w.score("a").gpu_tokens == 0


def test_putting_the_same_user_again_loses_nothing(world: Make) -> None:
    w = world()
    w.put("a", POSITION)
    w.score("a")
    w.put_rows("a", w.rows["a"].copy(), w.features["a"].copy())
    assert w.score("a").gpu_tokens == PREFIX


def test_a_request_queued_when_its_user_is_deleted_leaves_no_states(world: Make) -> None:
    w = world(gpu_pages=12)
    w.put("a", POSITION)
    w.score("a")
    waiting = w.submit("a")
    w.delete("a")
    w.run()
    waiting.verify()
    assert w.held("a") == (0, 0)


def test_a_deleted_user_leaves_no_states(world: Make) -> None:
    w = world()
    w.put("a", POSITION)
    w.score("a")
    w.delete("a")
    assert w.held("a") == (0, 0)
    with pytest.raises(NotFound):
        w.engine.prefetch("a")
    w.put("a", 3)
    assert w.score("a").encoded_tokens == 5


# New weights


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_states_of_other_weights_are_never_used(world: Make, changes: dict[str, Any]) -> None:
    first, second = small_model(0, **changes), small_model(1, **changes)
    w = world(first, gpu_pages=12)
    w.put("a", POSITION)
    w.score("a")
    for model in (second, first, first):
        before = w.submit("a")  # queued by the old weights, answered by the new
        w.replace(model)
        w.run()
        assert before.verify().gpu_tokens == 0
        assert w.score("a").gpu_tokens == PREFIX
        w.evict_from_gpu()
        w.append("a", 1)
        assert w.score("a").host_tokens > 0
        w.truncate("a", POSITION)


@pytest.mark.parametrize("late", [False, True])
def test_weights_replaced_while_states_load_and_store(world: Make, late: bool) -> None:
    w = world(small_model(0), gpu_pages=12)
    w.put("a", POSITION)
    w.score("a")
    w.evict_from_gpu()
    mover = w.delay_copies(late)
    w.put("b", 20)
    loading, encoding = w.submit("a"), w.submit("b")
    w.step()
    encoding.verify()
    assert mover.submitted == ["load", "store"]
    w.replace(small_model(1))
    w.step()
    assert loading.verify().encoded_tokens == PREFIX
    mover.release_all()
    w.run()
    w.score("a")  # the pages that the old copies held are free again
    assert w.score("a").gpu_tokens == PREFIX
    assert w.score("filler").gpu_tokens == 0  # whose last states were of the old weights
    mover.release_all()
    w.run()
    w.assert_idle()


def test_weights_of_another_shape_are_refused_and_change_nothing(world: Make) -> None:
    w = world()
    w.put("a", POSITION)
    w.score("a")
    with pytest.raises(FailedPrecondition, match="configuration"):
        w.engine.replace_model(small_model(attention_length=9))
    other = dataclasses.replace(w.schema, user=())
    with pytest.raises(FailedPrecondition, match="schema"):
        w.engine.replace_model(small_model(schema=other))
    assert w.score("a").gpu_tokens == PREFIX
    w.replace(small_model(1, name="another name"))
    w.score("a")
    assert w.engine.stats()["model"]["name"] == "another name"


# Re-cuts


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_scores_are_exact_before_at_and_after_every_limit(world: Make, changes: dict[str, Any]) -> None:
    w = world(small_model(**changes), page_tokens=3, gpu_pages=60)
    w.put("a", 7)
    for _ in range(96):
        w.append("a", 1)
        cut = cut_history(len(w.rows["a"]), w.model.config)
        assert w.score("a", 2).prefix_tokens == 2 + cut.kept


def test_a_new_generation_is_encoded_before_its_first_request(world: Make) -> None:
    w = world(gpu_pages=40)
    w.put("a", 20)
    w.score("a")
    w.append("a", 1)  # the 21st behaviour: R is folded
    w.run()
    assert w.score("a").gpu_tokens == 23
    assert w.value("generations_total") == 2


def test_nobody_encodes_the_new_generation_of_a_user_without_states(world: Make) -> None:
    w = world()
    w.put("a", 20)
    w.append("a", 1)
    w.run()
    assert w.value("batches_total") == 0
    w.score("a")
    w.engine.invalidate("a")
    w.append("a", 10)
    w.run()
    assert w.value("batches_total") == 1


def test_a_correction_far_behind_the_last_cut(world: Make) -> None:
    w = world(gpu_pages=60)
    w.put("a", 5)
    for _ in range(13):
        w.append("a", 17)
        w.score("a", 1)
    first = w.engine.history.read("a").first
    assert first > 0  # old rows were let go
    for position in (len(w.rows["a"]) - 30, len(w.rows["a"]) - 55, first + 1, first):
        w.truncate("a", position)
        w.score("a", 2)
    w.append("a", 12)
    w.score("a")
    with pytest.raises(FailedPrecondition):
        w.engine.truncate("a", first - 1)


# Callers who keep the history themselves


def test_a_sent_history_is_scored_and_not_stored(world: Make) -> None:
    w = world()
    rows = make_behaviours(w.rng, POSITION)
    features = make_features(w.rng)
    assert w.score("s", history=History(features, 0, rows)).gpu_tokens == 0
    assert w.score("s", history=History(features, 0, rows.copy())).gpu_tokens == PREFIX
    grown = np.concatenate((rows, make_behaviours(w.rng, 2, int(rows["time_ms"][-1]))))
    assert w.score("s", history=History(features, 0, grown)).gpu_tokens == PREFIX
    changed = grown.copy()
    changed["item"][13] += 1
    assert w.score("s", history=History(features, 0, changed)).gpu_tokens == 2 + 13
    assert w.score("s", history=History(None, 0, changed)).gpu_tokens == 0
    with pytest.raises(NotFound):
        w.engine.history.read("s")


def test_a_sent_history_shares_verified_states_with_the_stored_one(world: Make) -> None:
    w = world()
    w.put("a", POSITION)
    w.score("a")
    known = w.history_of("a")
    assert w.score("a", history=known).gpu_tokens == PREFIX
    other = known.behaviours.copy()
    other["item"][-1] += 1
    assert w.score("a", history=History(known.features, 0, other)).gpu_tokens == PREFIX - 1
    assert w.score("a").gpu_tokens == PREFIX - 1
    assert w.engine.history.read("a").position == POSITION


def test_a_sent_history_may_begin_anywhere(world: Make) -> None:
    w = world()
    rows = make_behaviours(w.rng, 60)
    config = small_config()
    for first in (0, 3, 20, 47):
        result = w.score("s", 2, history=History(None, first, rows[first:]))
        assert result.prefix_tokens == 2 + cut_history(60, config, first).kept


def test_a_broken_sent_history_is_refused(world: Make) -> None:
    w = world()
    rows = make_behaviours(w.rng, 5)
    backwards = rows.copy()
    backwards["time_ms"][3] = 1
    two = np.zeros(2, w.schema.user_dtype)
    for history, field in (
        (History(None, 0, backwards), "history[3].time_ms"),
        (History(None, 0, np.zeros(3)), "history"),
        (History(None, -1, rows), "history.first"),
        (History(two, 0, rows), "history.features"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            w.engine.score("s", w.candidates(1), history=history)
        assert caught.value.field == field
    assert w.value("rejected_total", "invalid") == 4


# Restart


def test_a_restart_on_a_durable_history_gives_the_same_scores(world: Make, tmp_path: Any) -> None:
    from mtserve.config import HistoryConfig
    from mtserve.history import open_history

    stored = HistoryConfig(path=str(tmp_path / "history"))
    candidates, scores = None, {}
    for life in range(3):
        with open_history(stored, small_model().schema) as history:
            w = World(history=history, gpu_pages=20, seed=life)
            candidates = w.candidates(4) if candidates is None else candidates
            if life == 0:
                for user, count in (("a", 33), ("b", 4), ("c", 0)):
                    w.put(user, 0)
                    for _ in range(count):
                        w.append(user, 1)
                rows, features = w.rows, w.features
                w.truncate("a", 27)
            w.rows, w.features = rows, features
            for user in "abc":
                logits = w.score(user, candidates=candidates).logits
                np.testing.assert_allclose(logits, scores.setdefault(user, logits), rtol=0, atol=1e-5)
            w.engine.close()
            assert history.read("a").position == 27  # given, so not closed with the engine


def test_an_engine_closes_the_history_it_made_itself() -> None:
    w = World()
    w.put("a", 2)
    w.engine.close()
    with pytest.raises(Exception, match="closed"):
        w.engine.history.read("a")
    assert isinstance(w.engine, Engine)
