"""Batches that decide for themselves how their users' states come back: loaded, encoded, or some layers each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from engine_world import World
from restored_worlds import COUNT, FORMATS, LAYERS, PREFIX, SPLITS, deep_world, on_the_host, push_off, settle
from small_models import CAUSAL, SCHEMA, small_model

from mtserve.engine.queue.pace import BELIEVED_S
from mtserve.model.schema import FeatureSchema
from mtserve.restore.choice import Choice, Need, Work
from mtserve.restore.costs import Costs, costs_for_cpu
from mtserve.transfer.mover import Pieces

Make = Callable[..., World]
NO_USER = FeatureSchema(user=(), behaviour=SCHEMA.behaviour, candidate=SCHEMA.candidate)
SHAPES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": CAUSAL,
    "plain norm": {"norm": "plain"},
    "d=24": {"d": 24, "heads": 3, "head_dim": 8},
    "d=96": {"d": 96, "heads": 2, "head_dim": 12},
    "gate first": {"gate_first": True, **CAUSAL},
    "no user": {"schema": NO_USER},
}


def way_of(layer: int) -> str:
    return "load" if layer == 0 else "recompute" if layer == LAYERS else "split"


@pytest.mark.parametrize("host_format", FORMATS)
@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_every_split_scores_as_a_full_recompute(world: Make, layer: int, host_format: str) -> None:
    w = deep_world(world, host_format=host_format)
    on_the_host(w, "a", "b", count=14)
    w.restore_at(layer)
    w.append("a", 3)
    gpu, host = w.held("b")
    pending = [w.submit("a"), w.submit("b"), w.submit("a", 2)]
    w.run()
    results = [each.verify() for each in pending]
    assert (results[1].gpu_tokens, results[1].host_tokens) == (gpu, host - gpu if layer < LAYERS else 0)
    assert w.value("restored_batches_total", way_of(layer)) == 1
    # What was restored serves like any other states, and more is added behind.
    w.append("a", 3)
    assert w.score("a").encoded_tokens == 3
    w.assert_empty()


@pytest.mark.parametrize("page_tokens", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_splits_of_every_kind_of_model(world: Make, shape: dict[str, Any], page_tokens: int) -> None:
    """Users whose S, R and U are restored, in turn: some of each is on the device, on the host, and new."""
    host_format = "x8" if page_tokens == 3 else "kv"
    model = small_model(**{"layers": LAYERS, "d": 32, **shape})
    w = deep_world(world, model, page_tokens=page_tokens, gpu_pages=64 // page_tokens, host_format=host_format)
    on_the_host(w, "a", "b", "c")
    for turn, layer in enumerate([1, 3, 2, 1]):
        w.restore_at(layer)
        users = "abc"[turn % 3 :] + "abc"[: turn % 3]
        for user in users:
            w.append(user, turn)
        pending = [w.submit(user, back) for back, user in enumerate(users, 1)]
        exposed = w.rows["a"]["time_ms"][-2]
        pending.append(w.submit("a", candidates=w.candidates(2, exposed)))  # sees less than all
        w.run()
        for each in pending:
            each.verify()
        push_off(w, "a", "b", "c")
    assert w.value("restored_batches_total", "split") >= 4
    assert w.value("load_bytes_total") > 0
    w.assert_empty()


@pytest.mark.parametrize("late", [False, True], ids=["early copies", "late copies"])
@pytest.mark.parametrize("layer", SPLITS)
def test_other_batches_go_on_beside_a_split_one(world: Make, layer: int, late: bool) -> None:
    w = deep_world(world, gpu_pages=24)
    on_the_host(w, "a", "b")
    w.overlap(late=True)
    mover = w.delay_copies(late)
    w.restore_at(layer)
    first = [w.submit(user) for user in "ab"]
    w.step()
    assert (len(mover.jobs), w.tiers.index.stats().batches_in_flight) == (2, 1)
    w.put("new", 9)
    second = [w.submit("new"), w.submit("a"), w.submit("b")]
    w.step()  # launches the second, which waits for nobody, and ends the first
    for each in first:
        assert each.verify().encoded_tokens == 0
    settle(w, mover)
    assert [each.verify().gpu_tokens for each in second] == [0, PREFIX, PREFIX]
    w.assert_empty()


def test_what_a_load_brought_is_found_only_once_the_batch_has_made_the_rest(world: Make) -> None:
    w = deep_world(world)
    on_the_host(w, "a")
    held = w.held("a")
    w.overlap(late=True)
    mover = w.delay_copies()
    w.restore_at(2)
    pending = w.submit("a")
    w.step()
    mover.release()
    w.tiers.finish()
    w.engine.check()
    assert w.value("loads_in_flight") == 0
    assert w.held("a") == held
    assert w.tiers.index.stats().loads_in_flight == 1
    w.step()
    pending.verify()
    assert w.held("a") == (PREFIX, PREFIX)


# Who is beside


def test_requests_of_one_user_share_a_load_whatever_their_histories(world: Make) -> None:
    w = deep_world(world)
    on_the_host(w, "a")
    w.restore_at(2)
    older = w.history_of("a")
    older = type(older)(older.features, older.first, older.behaviours[:-4])
    w.append("a", 1)
    pending = [w.submit("a", history=older), w.submit("a"), w.submit("a", 1)]
    w.run()
    results = [each.verify() for each in pending]
    assert [each.encoded_tokens for each in results] == [0, 1, 1]
    assert w.value("loads_total") == w.value("restored_batches_total", "split") > 0
    w.assert_empty()


def test_a_prefetch_is_loaded_whole_beside_what_batches_decide(world: Make) -> None:
    w = deep_world(world, gpu_pages=24)
    on_the_host(w, "a", "b")
    mover = w.delay_copies()
    w.restore_at(2)
    prefetch, pending = w.engine.prefetch("b"), w.submit("a")
    w.step()
    assert pending.verify().encoded_tokens == 0
    assert [copy.user for kind, copy, _ in mover.jobs if kind == "load"] == ["b"]
    assert list(mover.first_layers.values()) == [2]
    settle(w, mover)
    assert prefetch.done()
    assert w.score("b").gpu_tokens == PREFIX
    w.assert_empty()


def test_ready_users_go_first_and_the_restored_are_loaded_meanwhile(world: Make) -> None:
    w = deep_world(world, gpu_pages=30)
    on_the_host(w, "a", "b")
    w.put("warm", 5)
    w.score("warm")
    mover = w.delay_copies()
    w.restore_at(2)
    pending = [w.submit(user) for user in ("a", "warm", "b")]
    w.step()
    assert [each.future.done() for each in pending] == [False, True, False]
    assert {copy.user for kind, copy, _ in mover.jobs if kind == "load"} == {"a", "b"}
    settle(w, mover)
    for each in pending:
        each.verify()
    assert w.value("restored_batches_total", "split") == 0
    w.assert_empty()


def test_a_cold_user_encoded_in_parts_beside_restored_ones(world: Make) -> None:
    w = deep_world(world, small_model(layers=LAYERS, d=32, **CAUSAL), gpu_pages=30, cold_batch_tokens=11, cold_after=10)
    on_the_host(w, "a", "b")
    w.restore_at(1)
    w.put("cold", 40)
    pending = [w.submit(user) for user in ("cold", "a", "b")]
    for _ in range(20):
        w.step()
    w.run()
    for each in pending:
        each.verify()
    w.assert_empty()


@pytest.mark.parametrize("layer", SPLITS)
def test_who_waits_for_room_fills_a_split_batch(world: Make, layer: int) -> None:
    """Encoded whole and not kept, in the slots behind those of the users who are restored."""
    w = deep_world(world, gpu_pages=7, max_batch_tokens=100)
    on_the_host(w, "a", "b")
    mover = w.delay_copies()
    mover.load_seconds = 9.0
    w.pace(0.01)
    w.restore_at(layer)
    pending = [w.submit(user) for user in "abb"]
    w.step()
    results = [each.verify() for each in pending]
    assert results[0].encoded_tokens == 0
    assert [each.encoded_tokens for each in results[1:]] == [PREFIX, PREFIX]
    assert w.value("spare_requests_total") == 2
    assert w.value("restored_batches_total", "split") == 1
    settle(w, mover)
    w.assert_empty()


# Budgets


def test_a_user_larger_than_a_batch_is_restored_alone_and_small_ones_after_it(world: Make) -> None:
    w = deep_world(world, gpu_pages=30, max_batch_tokens=12, cold_batch_tokens=12)
    on_the_host(w, "large")
    on_the_host(w, "b", "c", count=6)
    w.restore_at(2)
    batches = w.value("batches_total")
    pending = [w.submit(user) for user in ("large", "b", "c")]
    w.run()
    assert all(each.verify().encoded_tokens == 0 for each in pending)
    assert w.value("batches_total") - batches >= 2
    w.assert_empty()


def test_a_batch_has_room_for_what_its_own_loads_evict(world: Make) -> None:
    """The first user's load takes the pages that the second had on the device, and nothing is left for a load of those."""
    w = deep_world(world, gpu_pages=14, max_batch_tokens=40, max_candidates=3)
    on_the_host(w, "b", "a")
    for filler in range(4):
        w.engine.invalidate(f"filler {filler}")
    mover = w.delay_copies()
    w.put("new", 30)
    w.submit("new")
    w.step()
    assert [copy.user for _, copy, _ in mover.jobs] == ["new"]  # its pages cannot be evicted
    assert (w.held("a"), w.held("b")) == ((12, PREFIX), (0, PREFIX))
    w.restore_at(LAYERS)
    rows: list[int] = []
    start = w.engine._core.served.runner.start

    def counted(plan: Any, *arguments: Any) -> Any:
        rows.append(plan.rows)
        return start(plan, *arguments)

    w.engine._core.served.runner.start = counted  # type: ignore[method-assign]
    pending = [w.submit(user) for user in "ba"]
    w.step()
    settle(w, mover)
    for each in pending:
        each.verify()
    assert len(rows) == 2 and max(rows) <= 40
    w.assert_empty()


# Ways


@pytest.mark.parametrize("restore", ["load", "recompute"])
@pytest.mark.parametrize("host_format", FORMATS)
def test_a_way_that_is_set_holds_for_every_format(world: Make, host_format: str, restore: str) -> None:
    w = deep_world(world, gpu_pages=20, host_format=host_format, restore=restore)
    assert w.tiers.restoring is None
    on_the_host(w, "a", "b", count=14)
    gpu, host = w.held("a")
    for _ in range(3):
        w.append("a", 1)
        pending = [w.submit("a"), w.submit("b")]
        w.run()
        results = [each.verify() for each in pending]
        assert all((each.host_tokens > 0) == (restore == "load") for each in results)
        push_off(w, "a", "b")
    assert (w.value("loads_total") > 0) == (restore == "load")
    assert gpu < host
    w.assert_empty()


@pytest.mark.parametrize("host_format", FORMATS)
def test_without_a_host_tier_nothing_is_packed(world: Make, host_format: str) -> None:
    w = deep_world(world, host_pages=0, host_format=host_format)
    w.tolerance = FORMATS["kv"]
    assert w.tiers.restoring is None
    assert w.engine._core.memory.packed is None  # type: ignore[union-attr]
    w.put("a", COUNT)
    w.score("a")
    w.evict_from_gpu()
    result = w.score("a")
    assert (result.host_tokens, result.gpu_tokens + result.encoded_tokens) == (0, PREFIX)
    w.assert_empty()


FREE_LINK = costs_for_cpu()
SLOW_LINK = Costs(**{**FREE_LINK.to_table(), "link": [(1, 1e3)]})
# Of 5 pages a layer takes 21 us to encode and 25 us to come: half of the layers each.
EVEN_LINK = Costs(**{**FREE_LINK.to_table(), "link": [(1, 1e8)]})


@pytest.mark.parametrize("host_format", ["kv", "kv8"])
@pytest.mark.parametrize(("costs", "way"), [(FREE_LINK, "load"), (SLOW_LINK, "recompute"), (EVEN_LINK, "split")])
def test_costs_decide(world: Make, costs: Costs, way: str, host_format: str) -> None:
    w = deep_world(world, costs=costs, host_format=host_format)
    on_the_host(w, "a")
    w.score("a")
    assert w.value("restored_batches_total", way) == 1
    assert w.value("restore_prediction_error") >= 0
    w.assert_empty()


def test_only_batches_that_load_nothing_tell_what_a_token_takes(world: Make) -> None:
    """Of them as of any other, or requests beside them would be judged by nothing, and every load would look cheap."""
    w = deep_world(world, gpu_pages=26)
    on_the_host(w, "a", "b")

    def pass_time() -> None:
        w.clock.now += 0.01

    w.hook("attention", pass_time)
    pace = w.engine._core._pace
    for layer, user in ((0, "a"), (LAYERS, "b")):
        w.clock.now += 10 * BELIEVED_S
        w.restore_at(layer)
        w.score(user)
        assert (pace.token_s(w.clock()) > 0) == (layer == LAYERS)


def test_who_is_not_kept_counts_among_what_the_batch_computes(world: Make) -> None:
    w = deep_world(world, gpu_pages=7, max_batch_tokens=100)
    on_the_host(w, "a", "b")
    w.delay_copies().load_seconds = 9.0
    w.pace(0.01)
    seen: list[Work] = []

    def choose(pieces: Pieces | None, needs: Sequence[Need], others: Work) -> Choice:
        seen.append(others)
        return Choice(LAYERS, 1.0, "recompute", {})

    w.tiers.restoring._choose = choose
    pending = [w.submit(user) for user in "ab"]
    w.step()
    for each in pending:
        each.verify()
    assert [work.rows for work in seen] == [PREFIX + 3]


def test_how_well_batches_are_predicted_is_told(world: Make) -> None:
    w = deep_world(world)
    assert w.engine.stats()["restoring"]["batches"] == 0
    on_the_host(w, "a")
    w.hook("attention", lambda: vars(w.clock).update(now=w.clock.now + 0.01))
    w.restore_at(2)
    w.score("a")
    assert w.engine.stats()["restoring"]["by_way"] == {"split": 1}
    w.tiers.restoring = None
    assert w.engine.stats()["restoring"] == {}
