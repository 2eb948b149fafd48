"""Round trips of every RPC through a real server, with odd shapes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_engine import SCHEMA, TASKS, FakeEngine, expected_scores

from mtserve.errors import FailedPrecondition, InvalidArgument, MtserveError, NotFound, ResourceExhausted, Unavailable
from mtserve.server.client import Client, ScoreCall, Scores


def candidates(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    item = rng.integers(-(2**63), 2**63 - 1, count)
    return {"item": item, "affinity": rng.random((count, 2), dtype=np.float32)}


@pytest.mark.parametrize("count", [0, 1, 2, 7, 99, 100])
def test_scores_arrive_in_the_shape_and_order_of_the_candidates(client: Client, count: int) -> None:
    client.append("ann", {"time_ms": [1, 2, 3]})
    rows = candidates(count)
    answer = client.score("ann", rows, context={"hour": 6})
    assert answer.tasks == TASKS
    assert answer.scores.shape == (count, 3)
    np.testing.assert_array_equal(answer.scores, expected_scores(rows["item"], rows["affinity"], [6] * count))
    np.testing.assert_array_equal(answer.task("ctcvr"), answer.scores[:, 1])
    found = (answer.prefix_tokens, answer.gpu_tokens, answer.host_tokens, answer.encoded_tokens)
    assert (answer.position, answer.latency_s, *found) == (3, 0.0125, 6, 2, 1, 3)


def test_an_unknown_task_is_named(client: Client) -> None:
    client.append("ann", {"time_ms": [1]})
    with pytest.raises(InvalidArgument, match="task: 'cvr' is not one of ctr, ctcvr, like"):
        client.score("ann", candidates(1)).task("cvr")


def test_history_arrives_as_it_was_sent(client: Client, engine: FakeEngine) -> None:
    item = [2**63 - 1, -(2**63), 0, 5, 127, 128, 16383]
    columns = {"time_ms": [0, 1, 1, 5, 5, 9, 2**40], "item": item, "dwell": np.linspace(0, 1, 7)}
    assert client.append("ann", columns, position=0) == 7
    np.testing.assert_array_equal(engine.histories["ann"], SCHEMA.behaviours(columns))
    assert client.append("ann", {"time_ms": [2**41]}, position=7) == 8
    assert client.truncate("ann", 2) == 2
    assert client.append("ann", {"time_ms": []}) == 2
    assert client.delete_user("ann") is True
    assert client.delete_user("ann") is False


def test_an_append_carries_its_hint_and_none_by_default(client: Client, engine: FakeEngine) -> None:
    client.append("ann", {"time_ms": [1]})
    assert engine.prefetched == []
    assert client.append("bob", {"time_ms": [1]}, prefetch=True) == 1
    assert client.append("bob", {"time_ms": [2]}, position=1, prefetch=True) == 2
    with pytest.raises(FailedPrecondition):
        client.append("bob", {"time_ms": [3]}, position=1, prefetch=True)
    assert engine.prefetched == ["bob", "bob"]


def test_put_user_sets_features_and_history_apart(client: Client, engine: FakeEngine) -> None:
    assert client.put_user("bob", {"segment": 3, "traits": [0.5, 1.5, 2.5]}) == 0
    assert client.put_user("bob", history={"time_ms": [4, 5], "item": [1, 2], "dwell": [[1.0], [2.0]]}) == 2
    features = engine.features["bob"]
    assert features is not None
    assert features["segment"].tolist() == [3]
    assert features["traits"].tolist() == [[0.5, 1.5, 2.5]]
    assert engine.histories["bob"]["dwell"].tolist() == [[1.0], [2.0]]


def test_a_stateless_history_reaches_the_engine_whole(client: Client, engine: FakeEngine) -> None:
    client.score("new", {"item": [1]}, history={"time_ms": [7, 8], "item": [1, 2]}, features={"segment": 9})
    history = engine.requests[-1].history
    assert history is not None
    assert history.features is not None
    assert (history.first, history.position) == (0, 2)
    assert history.features["segment"].tolist() == [9]
    assert "new" not in engine.histories
    client.score("new", {"item": [1]}, history={"time_ms": []})
    history = engine.requests[-1].history
    assert history is not None
    assert history.features is None


def test_append_is_done_before_scoring(client: Client) -> None:
    answer = client.score("cat", candidates(3), append={"time_ms": [1, 2]}, append_position=0)
    assert answer.position == 2
    with pytest.raises(FailedPrecondition) as caught:
        client.score("cat", candidates(3), append={"time_ms": [1, 2]}, append_position=0)
    assert caught.value.position == 2


def test_exposure_times_default_to_now(client: Client, engine: FakeEngine) -> None:
    client.append("ann", {"time_ms": [1]})
    client.score("ann", {"item": [1, 2]})
    assert engine.requests[-1].candidates["time_ms"].tolist() == [-1, -1]
    client.score("ann", {"item": [1, 2], "time_ms": [5, -1]})
    assert engine.requests[-1].candidates["time_ms"].tolist() == [5, -1]
    client.score("ann", {"time_ms": [5, 6]})
    assert engine.requests[-1].candidates["item"].tolist() == [0, 0]


def test_batch_items_fail_on_their_own(client: Client) -> None:
    client.append("ann", {"time_ms": [1]})
    good = ScoreCall("ann", candidates(2))
    outcomes = client.score_batch(
        [
            good,
            ScoreCall("nobody", candidates(2)),
            ScoreCall("ann", {"colour": [1]}),
            ScoreCall("ann", candidates(1), append={"time_ms": [2]}, append_position=5),
            ScoreCall("ann", candidates(101)),
            good,
        ]
    )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [Scores, NotFound, InvalidArgument, FailedPrecondition, InvalidArgument, Scores]
    assert isinstance(outcomes[2], MtserveError)
    assert outcomes[2].field == "candidates.colour"
    assert isinstance(outcomes[3], FailedPrecondition)
    assert outcomes[3].position == 1
    assert client.score_batch([]) == []


def test_batch_takes_one_users_requests_in_order(client: Client, engine: FakeEngine) -> None:
    engine.append_seconds = 0.01
    calls = [ScoreCall("ann", candidates(1), append={"time_ms": [n]}, append_position=n) for n in range(5)]
    answers = client.score_batch([*calls, ScoreCall("ann", candidates(1))])
    assert [answer.position for answer in answers if isinstance(answer, Scores)] == [1, 2, 3, 4, 5, 5]


def test_prefetch_invalidate_stats_and_schema(client: Client, engine: FakeEngine) -> None:
    client.append("ann", {"time_ms": [1]})
    client.prefetch("ann")
    assert engine.prefetched == ["ann"]
    assert client.invalidate("ann") == 1
    assert client.invalidate() == 1
    assert engine.invalidated == ["ann", None]
    assert client.stats()["metrics"]["answers_total"]["OK"] == 4
    assert [feature["name"] for feature in client.schema()["candidate"]] == ["item", "affinity", "hour"]


def test_pins_are_counted(client: Client, engine: FakeEngine) -> None:
    assert client.pin(["ann", "bob"]) == 2
    assert client.pin(("bob", "zoë", "bob")) == 1
    assert engine.pinned == {"ann", "bob", "zoë"}
    assert client.unpin(["bob", "eve"]) == 1
    assert client.unpin([]) == 0
    assert engine.pinned == {"ann", "zoë"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item": [1, 2], "affinity": [[1.0, 2.0]]}, "candidates.affinity: has 1 rows where others have 2"),
        ({"item": 5}, "candidates.item: expected one value a row"),
        ({"item": ["a"]}, "candidates.item: expected numbers"),
        ({"item": [2**63]}, "candidates.item: a value is above 2"),
        ({"time_ms": [1.5]}, "candidates.time_ms: expected integers, got float64"),
        ({"item": [[1], [2, 3]]}, "candidates.item: "),
    ],
)
def test_columns_are_checked_before_they_are_sent(client: Client, columns: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        client.score("ann", columns)


def test_features_without_a_history_are_refused(client: Client) -> None:
    with pytest.raises(InvalidArgument, match="features: needs history"):
        client.score("ann", {"item": [1]}, features={"segment": 1})


def test_nobody_listening_is_unavailable() -> None:
    with Client("127.0.0.1:1", timeout_s=5) as client, pytest.raises(Unavailable):
        client.stats()


def test_the_client_imports_neither_torch_nor_the_model() -> None:
    code = "import sys, mtserve.server.client; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mtserve.server.wire" in modules
    assert not {"torch", "mtserve.model", "mtserve.engine", "prometheus_client"} & set(modules)


def test_a_message_above_the_limit_is_refused(engine: FakeEngine, serve: Callable[..., Any]) -> None:
    target = serve(engine, max_message_mib=1).target
    with Client(target) as client, pytest.raises(ResourceExhausted):
        client.append("ann", {"time_ms": np.zeros(200_000, np.int64)})
