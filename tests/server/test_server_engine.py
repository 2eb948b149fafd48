"""The server around the real engine: what goes over the wire is what the engine says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from server_harness import running

from mtserve.config import EngineConfig, ServerConfig
from mtserve.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound
from mtserve.server.client import Client, ScoreCall, Scores
from mtserve.server.lifecycle import serve

engine_module = pytest.importorskip("mtserve.engine.engine")
presets = pytest.importorskip("mtserve.model.presets")

COUNT = 7


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    model = presets.build("tiny", seed=0)
    config = EngineConfig(device="cpu", page_tokens=8, gpu_cache="4MiB", host_cache="4MiB", max_candidates=50)
    with engine_module.Engine(model, config) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Any) -> Iterator[Client]:
    with running(engine, max_append=200) as server, Client(server.target, timeout_s=60) as client:
        yield client


def behaviours(count: int, start_ms: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(start_ms)
    return {
        "time_ms": start_ms + np.arange(count) * 1000,
        "item": rng.integers(0, 2**62, count),
        "category": rng.integers(0, 50, count),
        "action": rng.integers(0, 8, count),
        "dwell": rng.random((count, 1), dtype=np.float32),
    }


def candidates(count: int = COUNT) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(99)
    return {"item": rng.integers(0, 2**62, count), "affinity": rng.random((count, 4), dtype=np.float32)}


FEATURES = {"segment": 17, "country": 49, "activity": [0.5, 2.0]}
CONTEXT = {"surface": 3}


def embedded(engine: Any, user_id: str) -> np.ndarray:
    rows = engine.schema.candidates(candidates(), CONTEXT)
    return np.asarray(engine.score(user_id, rows).scores)


def test_scores_are_the_engines_own(engine: Any, client: Client) -> None:
    client.put_user("ann", FEATURES, behaviours(41))
    cold = client.score("ann", candidates(), context=CONTEXT)
    assert (cold.position, cold.tasks) == (41, ("ctr", "ctcvr"))
    assert cold.scores.shape == (COUNT, 2)
    assert cold.gpu_tokens + cold.host_tokens + cold.encoded_tokens == cold.prefix_tokens
    np.testing.assert_allclose(cold.scores, embedded(engine, "ann"), atol=1e-5)
    warm = client.score("ann", candidates(), context=CONTEXT)
    assert warm.gpu_tokens > 0
    np.testing.assert_allclose(warm.scores, cold.scores, atol=1e-5)


def test_stored_and_sent_histories_score_alike(client: Client) -> None:
    client.put_user("stored", FEATURES, behaviours(23))
    stored = client.score("stored", candidates(), context=CONTEXT)
    sent = client.score("sent", candidates(), context=CONTEXT, history=behaviours(23), features=FEATURES)
    np.testing.assert_allclose(sent.scores, stored.scores, atol=1e-5)
    with pytest.raises(NotFound):
        client.score("sent", candidates())


def test_append_then_score_equals_the_whole_history_at_once(client: Client) -> None:
    late = behaviours(5, 10_000_000)
    client.put_user("grown", FEATURES, behaviours(23))
    client.score("grown", candidates(), context=CONTEXT)
    grown = client.score("grown", candidates(), context=CONTEXT, append=late, append_position=23)
    whole = {name: np.concatenate([values, late[name]]) for name, values in behaviours(23).items()}
    fresh = client.score("fresh", candidates(), context=CONTEXT, history=whole, features=FEATURES)
    assert grown.position == 28
    np.testing.assert_allclose(grown.scores, fresh.scores, atol=1e-5)
    assert client.truncate("grown", 23) == 23
    back = client.score("grown", candidates(), context=CONTEXT)
    client.put_user("short", FEATURES, behaviours(23))
    np.testing.assert_allclose(back.scores, client.score("short", candidates(), context=CONTEXT).scores, atol=1e-5)


def test_the_engines_refusals_arrive_typed(client: Client) -> None:
    client.put_user("bob", FEATURES, behaviours(9))
    with pytest.raises(FailedPrecondition, match="gap") as caught:
        client.append("bob", behaviours(1, 10_000_000), position=12)
    assert caught.value.position == 9
    with pytest.raises(InvalidArgument, match="times must not decrease"):
        client.append("bob", behaviours(1, 1))
    with pytest.raises(NotFound, match="nobody"):
        client.score("nobody", candidates())
    with pytest.raises(InvalidArgument, match="limit of 50"):
        client.score("bob", candidates(51))
    with pytest.raises(DeadlineExceeded):
        client.score("bob", candidates(), timeout_s=1e-9)


def test_a_batch_mixes_users(client: Client) -> None:
    for number in range(5):
        client.put_user(f"user{number}", FEATURES, behaviours(5 + 11 * number))
    alone = [client.score(f"user{number}", candidates(number + 1), context=CONTEXT) for number in range(5)]
    calls = [ScoreCall(f"user{number}", candidates(number + 1), context=CONTEXT) for number in range(5)]
    together = client.score_batch([*calls, ScoreCall("nobody", candidates())])
    assert isinstance(together.pop(), NotFound)
    for one, other in zip(alone, together, strict=True):
        assert isinstance(other, Scores)
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-5)


def test_prefetch_invalidate_and_stats(engine: Any, client: Client) -> None:
    client.put_user("cat", FEATURES, behaviours(30))
    client.prefetch("cat")
    before = client.score("cat", candidates(), context=CONTEXT)
    client.invalidate("cat")
    cold = client.score("cat", candidates(), context=CONTEXT)
    assert (cold.gpu_tokens, cold.encoded_tokens) == (0, cold.prefix_tokens)
    np.testing.assert_allclose(cold.scores, before.scores, atol=1e-5)
    client.invalidate()
    assert client.pin(["cat", "stranger"]) == 2
    client.score("cat", candidates(), context=CONTEXT)
    assert client.stats()["metrics"]["pinned_users"]["gpu"] == 1
    assert client.delete_user("cat") is True
    assert client.unpin(["cat", "stranger"]) == 1
    assert client.stats()["metrics"]["prefetches_total"] >= 1
    engine.check()


def test_the_score_after_an_append_with_a_hint_finds_all_of_its_prefix(
    engine: Any, client: Client, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    client.put_user("eve", FEATURES, behaviours(30))
    for turn in range(3):  # at first the history is not in memory
        batches = engine.metrics.value("batches_total")
        position = client.append("eve", behaviours(1, 10_000_000 + turn), prefetch=True)
        eventually(lambda before=batches: engine.metrics.value("batches_total") > before)
        answer = client.score("eve", candidates(), context=CONTEXT)
        assert answer.position == position == 31 + turn
        assert (answer.gpu_tokens, answer.encoded_tokens) == (answer.prefix_tokens, 0)
        np.testing.assert_allclose(answer.scores, embedded(engine, "eve"), atol=1e-5)


def test_run_serves_the_real_engine(capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_module.Engine(presets.build("tiny", seed=0), EngineConfig(device="cpu", host_cache="1MiB"))
    addresses: list[str] = []

    async def main() -> None:
        stop = asyncio.Event()
        task = asyncio.create_task(serve(engine, ServerConfig(port=0, metrics_port=0), stop=stop))
        while not addresses and not task.done():
            await asyncio.sleep(0.01)
            addresses.extend(line.split()[-1] for line in capsys.readouterr().out.splitlines())
        await asyncio.to_thread(_score_once, addresses[0])
        stop.set()
        await task

    asyncio.run(main())
    assert engine.stats()["state"] == "closed"


def _score_once(target: str) -> None:
    with Client(target) as client:
        assert client.score("new", candidates(), history=behaviours(3)).scores.shape == (COUNT, 2)


def test_cancelled_calls_leave_the_engine_whole(
    engine: Any, client: Client, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    client.put_user("dan", FEATURES, behaviours(150))

    outcomes: list[Scores | DeadlineExceeded] = []

    outcomes: list[Scores | DeadlineExceeded] = []

    def give_up(number: int) -> None:
        try:
            outcomes.append(client.score("dan", candidates(), timeout_s=number * 2e-4))
        except DeadlineExceeded as error:
            outcomes.append(error)

    threads = [threading.Thread(target=give_up, args=(number,)) for number in range(1, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 29
    assert any(isinstance(outcome, DeadlineExceeded) for outcome in outcomes)
    eventually(lambda: engine.metrics.value("requests_in_flight") == 0)
    engine.check()
    assert client.score("dan", candidates()).scores.shape == (COUNT, 2)
