"""Which requests share a batch, a load and an encode, and that budgets are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_world import World
from small_models import CAUSAL, small_model

from mtserve.engine.queue.scheduler import PATIENCE
from mtserve.types import History

Make = Callable[..., World]


def _tokens(w: World) -> float:
    """New tokens of all batches so far: behaviours encoded and candidates."""
    return w.engine.metrics.distribution("batch_tokens").sum


def test_two_requests_of_one_user_share_one_encode(world: Make) -> None:
    w = world()
    w.put("a", 17)
    first, second = w.submit("a", 3), w.submit("a", 4)
    w.run()
    assert first.verify().encoded_tokens == second.verify().encoded_tokens == 19
    assert w.value("batches_total") == 1
    assert _tokens(w) == 19 + 3 + 4


def test_two_requests_of_one_user_share_one_load(world: Make) -> None:
    w = world(gpu_pages=12)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    before = _tokens(w)
    pending = [w.submit("a", 2) for _ in range(5)]
    w.run()
    assert w.value("loads_total") == 1
    assert _tokens(w) - before == 10
    for each in pending:
        assert each.verify().host_tokens == 19


def test_an_append_between_two_requests_is_encoded_once(world: Make) -> None:
    w = world()
    w.put("a", 15)
    pending = []
    for _ in range(4):
        pending.append(w.submit("a", 2))
        w.append("a", 1)
    w.run()
    for count, each in enumerate(pending):
        assert each.verify().position == 15 + count
    assert w.value("batches_total") == 1
    assert _tokens(w) == 2 + 18 + 4 * 2


def test_the_shorter_history_may_come_second(world: Make) -> None:
    w = world()
    w.put("a", 17)
    known = w.history_of("a")
    longer = w.submit("a", 2)
    shorter = w.submit("a", 2, history=History(known.features, 0, known.behaviours[:14]))
    w.run()
    assert longer.verify().position == 17
    assert shorter.verify().position == 14
    assert _tokens(w) == 19 + 4


@pytest.mark.parametrize("keep", [14, 6, 0])
@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_a_correction_between_two_requests_is_never_mixed(world: Make, changes: dict[str, Any], keep: int) -> None:
    """Each is scored on the history that stood when it was submitted."""
    w = world(small_model(**changes))
    w.put("a", 17)
    w.score("a")
    pending = []
    for _ in range(3):
        pending.append(w.submit("a", 2))
        w.truncate("a", keep)
        w.append("a", 17 - keep)
    pending.append(w.submit("a", 2))
    w.run()
    logits = [each.verify().logits for each in pending]
    assert not np.allclose(logits[0], logits[1])


def test_a_re_cut_between_two_requests_is_never_mixed(world: Make) -> None:
    w = world()
    w.put("a", 19)
    pending = []
    for _ in range(4):
        pending.append(w.submit("a", 2))
        w.append("a", 1)
    w.run()
    assert [each.verify().position for each in pending] == [19, 20, 21, 22]


def test_an_oversized_cold_user_does_not_stall_the_warm(world: Make) -> None:
    w = world(gpu_pages=40, max_batch_tokens=60, cold_batch_tokens=20, cold_after=10)
    for user in "abc":
        w.put(user, 11)
        w.score(user)
    w.put("cold", 40)
    newcomer = w.submit("cold", 3)
    answered_at, waited = 0, []
    for turn in range(9):
        w.append("a", 1)
        warm = [w.submit(user, 2) for user in "abc"]
        w.step()
        waited += [each for each in warm if not each.future.done()]
        for each in warm:
            if each.future.done():
                each.verify()
        if newcomer.future.done() and not answered_at:
            answered_at = turn
    assert 1 <= answered_at <= 6  # not at once, not never
    assert len(waited) <= 3  # the one batch that it had to itself
    assert newcomer.verify().encoded_tokens == 42


@pytest.mark.parametrize("page_tokens", [1, 4, 64])
def test_a_causal_prefix_encoded_in_parts_equals_the_whole(world: Make, page_tokens: int) -> None:
    w = world(small_model(**CAUSAL), page_tokens=page_tokens, cold_batch_tokens=11, cold_after=10)
    w.put("a", 40)
    result = w.score("a", 3)
    assert (result.gpu_tokens, result.encoded_tokens) == (0, 42)
    assert w.value("batches_total") >= 4
    assert _tokens(w) == 42 + 3


def test_a_prefix_changed_between_its_parts(world: Make) -> None:
    w = world(small_model(**CAUSAL), cold_batch_tokens=11, cold_after=10)
    w.put("a", 40)
    before = w.submit("a", 2)
    w.step()
    w.step()
    assert not before.future.done()
    w.truncate("a", 9)
    w.append("a", 20)
    after = w.submit("a", 2)
    w.run()
    before.verify()
    after.verify()


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_no_batch_of_several_exceeds_its_budget(world: Make, changes: dict[str, Any]) -> None:
    budget = 30
    w = world(small_model(**changes), gpu_pages=90, max_batch_tokens=budget, cold_batch_tokens=20, cold_after=5)
    for index, user in enumerate("abcdefgh"):
        w.put(user, 3 + 2 * index)
    pending = [w.submit(user, 1 + index % 7) for index, user in enumerate("abcdefghhgfedcba")]
    for _ in range(60):
        batches, tokens = w.value("batches_total"), _tokens(w)
        done = sum(each.future.done() for each in pending)
        w.step()
        alone = sum(each.future.done() for each in pending) - done <= 1
        assert _tokens(w) - tokens <= budget or alone, batches
    for each in pending:
        each.verify()


def test_a_causal_batch_never_exceeds_its_budget(world: Make) -> None:
    """The last part of a cold prefix counts its candidates too."""
    w = world(small_model(**CAUSAL), max_batch_tokens=20, cold_batch_tokens=20, cold_after=5)
    for user, count in (("a", 16), ("b", 17), ("c", 31)):
        w.put(user, count)
        w.score(user, 10)
    assert w.engine.metrics.distribution("batch_tokens").max <= 20


def test_a_part_that_finds_no_pages_is_encoded_whole_only_where_that_fits(world: Make) -> None:
    """The largest batch has 46 rows: 42 tokens and 4 candidates."""
    w = world(
        small_model(**CAUSAL),
        gpu_pages=18,
        max_batch_tokens=46,
        cold_batch_tokens=20,
        cold_after=5,
        max_candidates=4,
        write_back_queue="100%",
    )
    w.put("b", 10)
    w.score("b")
    w.delay_copies()
    w.put("s", 40)
    saved = w.submit("s")
    w.run()
    saved.verify()
    assert w.held("s")[0] == 42  # stores have these pages; c and b would fit without s
    w.put("c", 40)
    turns = []
    cold = w.submit("c")
    while not cold.future.done():
        w.append("b", 1)
        ready = w.submit("b")
        w.step()
        turns.append(ready.future.done())
        assert len(turns) < 20
    assert sum(turns) >= PATIENCE
    assert cold.verify().encoded_tokens == 42
    assert w.engine.metrics.distribution("batch_tokens").max <= 46
    w.tiers.mover.release_all()
    w.run()
    w.engine.check()


def test_requests_of_a_batch_are_bounded(world: Make) -> None:
    w = world(max_batch_requests=3)
    for user in "abcdefg":
        w.put(user, 2)
    pending = [w.submit(user, 1) for user in "abcdefg"]
    w.run()
    assert w.engine.metrics.distribution("batch_requests").max == 3
    for each in pending:
        each.verify()


def test_prefetches_run_behind_scores(world: Make) -> None:
    w = world(max_batch_requests=1)
    w.put("a", 4)
    w.put("b", 4)
    prefetch, score = w.engine.prefetch("a"), w.submit("b")
    w.step()
    assert score.future.done()
    assert not prefetch.done()
