"""What each tier keeps and gives back, and that every counter moves exactly as scripted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_world import World
from small_models import CAUSAL, small_model

from mtserve._core import policy_names
from mtserve.cache.index import Copy
from mtserve.errors import NotFound

Make = Callable[..., World]


def test_states_evicted_from_the_gpu_come_back_from_the_host_with_their_unfinished_tail(world: Make) -> None:
    w = world(gpu_pages=12)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    result = w.score("a")
    assert (result.gpu_tokens, result.host_tokens, result.encoded_tokens, result.tier) == (4, 19, 0, "host")
    again = w.score("a")
    assert (again.gpu_tokens, again.tier) == (23, "gpu")  # what was restored stays like any other


def test_states_evicted_from_both_tiers_are_encoded_again(world: Make) -> None:
    w = world(gpu_pages=11, host_pages=11)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    result = w.score("a")
    assert (result.gpu_tokens, result.host_tokens, result.encoded_tokens, result.tier) == (0, 0, 23, "cold")


def test_without_a_host_tier_nothing_is_copied(world: Make) -> None:
    w = world(gpu_pages=12, host_pages=0)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    assert w.score("a").host_tokens == 0
    assert w.value("stores_total") == w.value("loads_total") == 0


@pytest.mark.parametrize("gpu_pages", [1, 2])
@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_users_larger_than_the_pool(world: Make, changes: dict[str, Any], gpu_pages: int) -> None:
    w = world(small_model(**changes), gpu_pages=gpu_pages, host_pages=30, cold_after=6, cold_batch_tokens=9)
    for user in "abc":
        w.put(user, 13)
    for _ in range(3):
        pending = [w.submit(user, 2) for user in "abcab"]
        w.run()
        assert all(each.verify().encoded_tokens > 0 for each in pending)
        for user in "abc":
            w.append(user, 2)
    w.assert_idle()


def test_a_part_that_finds_no_page_is_answered_once(world: Make) -> None:
    """The part is encoded whole instead, and its jobs, still queued for the next part, must not run again."""
    w = world(small_model(**CAUSAL), gpu_pages=1, cold_after=5, cold_batch_tokens=9)
    w.put("a", 20)
    w.score("a")
    assert w.value("batches_total") == 1
    assert w.value("cancelled_total") == 0
    w.assert_idle()


def test_a_host_smaller_than_one_user_keeps_a_true_prefix(world: Make) -> None:
    w = world(gpu_pages=11, host_pages=3)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    result = w.score("a")
    assert result.host_tokens <= 12
    assert result.encoded_tokens >= 11


def test_prefetch_brings_states_before_the_request_comes(world: Make) -> None:
    w = world(gpu_pages=12)
    w.put("a", 21)
    for expected in ("encoded", "loaded", "there already"):
        future = w.engine.prefetch("a")
        w.run()
        nothing = future.result(0)
        assert nothing.logits.shape == (0, 2), expected
        assert nothing.gpu_tokens + nothing.host_tokens + nothing.encoded_tokens == 23
        assert w.score("a").gpu_tokens == 23
        if expected == "encoded":
            w.evict_from_gpu()
    assert w.value("loads_total") == 1
    assert w.value("prefetches_total") == 3
    with pytest.raises(NotFound):
        w.engine.prefetch("nobody")


def test_a_prefetched_onload_is_shared_with_the_request_that_follows(world: Make) -> None:
    w = world(gpu_pages=12)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    mover = w.delay_copies()
    w.engine.prefetch("a")
    w.step()
    pending = w.submit("a")
    w.step()
    assert mover.submitted == ["load"]
    assert not pending.future.done()
    mover.release()
    w.run()
    assert pending.verify().host_tokens == 19


def test_others_are_served_while_an_onload_is_under_way(world: Make) -> None:
    w = world(gpu_pages=20)
    for user in "ab":
        w.put(user, 21)
        w.score(user)
    w.evict_from_gpu()
    w.score("b")
    mover = w.delay_copies()
    slow, quick = w.submit("a"), w.submit("b")
    w.run()
    assert mover.submitted == ["load"]
    assert quick.verify().tier == "gpu"
    assert not slow.future.done()
    mover.release_all()
    w.run()
    assert slow.verify().tier == "host"


@pytest.mark.parametrize("policy", policy_names())
def test_nobody_makes_room_for_those_whose_turn_comes_later(world: Make, policy: str) -> None:
    w = world(gpu_pages=19, max_batch_tokens=7, policy=policy)
    for user in "dabc":
        w.put(user, 21)
        w.score(user)
    mover = w.delay_copies()
    w.append("a", 4)
    pending = [w.submit(user, 3 if user == "a" else 7) for user in "abcd"]  # one a batch
    w.step()
    assert mover.submitted == ["store"]  # it holds a's pages fast, b and c wait with theirs: no room for d's
    w.run()
    assert [each.verify().gpu_tokens for each in pending[1:3]] == [23, 23]
    assert mover.submitted == ["store", "load"]
    for _ in range(5):
        mover.release_all()
        w.run()
    assert [each.verify().encoded_tokens for each in pending] == [4, 0, 0, 0]
    assert pending[3].verify().host_tokens > 0


def test_every_counter_moves_as_scripted(world: Make) -> None:
    w = world(gpu_pages=12)
    page = w.tiers.mover.pool[0].nbytes
    seen: dict[str, Any] = w.engine.stats()["metrics"]

    def moved(**expected: Any) -> None:
        """Exactly these counters and gauges have moved since the last call, by these amounts."""
        nonlocal seen
        now = w.engine.stats()["metrics"]
        moves = _differences(seen, now)
        seen = now
        assert moves == expected

    w.put("a", 21)
    moved(generations_total=1)
    w.score("a", 3)
    scored = {"requests_total": 1, "batches_total": 1}
    moved(
        **scored, candidates_total=3, stores_total=1, store_bytes_total=6 * page, requests_by_tier_total_cold=1,
        prefix_tokens_total_encoded=23, pages_in_use_gpu=6, pages_in_use_host=6,
    )  # fmt: skip
    w.append("a", 1)
    moved(appended_behaviours_total=1)
    w.score("a", 2)
    moved(
        **scored, candidates_total=2, stores_total=1, store_bytes_total=page, requests_by_tier_total_gpu=1,
        prefix_tokens_total_gpu=23, prefix_tokens_total_encoded=1,
    )  # fmt: skip
    w.put("b", 40)
    w.score("b", 1)
    moved(
        **scored, generations_total=1, candidates_total=1, stores_total=1, store_bytes_total=11 * page,
        requests_by_tier_total_cold=1, prefix_tokens_total_encoded=42, pages_in_use_gpu=6, pages_in_use_host=11,
        evicted_pages_total_gpu=5,
    )  # fmt: skip
    w.score("a", 4)
    moved(
        **scored, candidates_total=4, loads_total=1, load_bytes_total=5 * page, requests_by_tier_total_host=1,
        prefix_tokens_total_gpu=4, prefix_tokens_total_host=20, evicted_pages_total_gpu=5,
    )  # fmt: skip
    w.engine.prefetch("a")
    w.run()
    moved(prefetches_total=1, batches_total=1)
    w.engine.invalidate("a")
    moved(pages_in_use_gpu=-6, pages_in_use_host=-6)
    assert w.engine.delete_user("b")
    moved(pages_in_use_gpu=-6, pages_in_use_host=-11)


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    moves: dict[str, float] = {}
    for name, value in after.items():
        labels = value if isinstance(value, dict) else {"": value}
        if "p50" in labels:  # a histogram: times are not scripted
            continue
        for label, number in labels.items():
            old = before[name][label] if isinstance(value, dict) else before[name]
            if number != old:
                moves[f"{name}_{label}" if label else name] = number - old
    return moves


def test_stats_can_be_written_as_json(world: Make) -> None:
    w = world(gpu_pages=12)
    w.put("a", 21)
    w.score("a")
    stats = json.loads(json.dumps(w.engine.stats()))
    assert stats["state"] == "serving"
    assert stats["queue_length"] == 0
    assert stats["tiers"]["gpu"]["pages"] == {"total": 12, "used": 6, "in_flight": 0, "free": 6}
    assert stats["tiers"]["host"]["users"] == 1
    assert stats["metrics"]["requests_by_tier_total"] == {"gpu": 0, "host": 0, "cold": 1}
    assert stats["metrics"]["batch_tokens"]["sum"] == 26


def test_pages_of_both_tiers_hold_the_same_bytes(world: Make) -> None:
    """Whatever storm of evictions and reloads came before, a copy ends with twins."""
    w = world(gpu_pages=17, host_pages=40, page_tokens=3)
    mover = w.delay_copies(late=False)
    unequal = []
    real = mover.copy_now

    def compared(kind: str, copy: Copy, first_layer: int = 0) -> None:
        real(kind, copy, first_layer)
        inside = mover.pool[copy.gpu_pages.astype(np.int64)].numpy()
        outside = mover.arena[copy.host_pages.astype(np.int64)].numpy()
        if inside.tobytes() != outside.tobytes():
            unequal.append((kind, copy))

    mover.copy_now = compared  # type: ignore[method-assign]
    for user in "abcd":
        w.put(user, 11)
    for turn in range(40):
        user = "abcd"[w.rng.integers(4)]
        w.append(user, int(w.rng.integers(3)))
        pending = w.submit(user, 1)
        w.step()
        mover.release_all()
        w.run()
        pending.verify()
        mover.release_all()
        assert not unequal, turn
    assert mover.submitted.count("load") > 5
