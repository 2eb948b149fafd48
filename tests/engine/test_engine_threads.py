"""Many threads at once on a running engine: each answer belongs to one history that really stood."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_world import TOLERANCE, Pending, World
from small_models import CAUSAL, SCHEMA, START_MS, make_behaviours, make_candidates, make_features, small_model

from mtserve.history.memory import MemoryHistory
from mtserve.history.store import Append
from mtserve.model.reference import recompute
from mtserve.types import History, Request

Make = Callable[..., World]


class User:
    """One user changed by one thread and scored by several; every history that ever stood is kept."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.rng = np.random.default_rng(seed)
        self.features = make_features(self.rng)
        self.rows = make_behaviours(self.rng, 5)
        self.versions = [self.rows]

    def change(self, engine: Any) -> None:
        """Append, or correct the newest behaviours. The new version is noted before it can be seen."""
        if self.rng.random() < 0.3 and len(self.rows) > 3:
            keep = len(self.rows) - int(self.rng.integers(1, 4))
            self.versions.append(self.rows[:keep])
            self.rows = self.rows[:keep]
            engine.truncate(self.name, keep)
        more = make_behaviours(self.rng, 1, int(self.rows["time_ms"][-1]))
        self.rows = np.concatenate((self.rows, more))
        self.versions.append(self.rows)
        engine.append(self.name, more, prefetch=bool(self.rng.random() < 0.5))

    def verify(self, model: Any, answers: list[tuple[int, int, Any, Any]]) -> int:
        """Each answer equals the recompute of a version that stood between its submit and its answer."""
        for known, noted, candidates, result in answers:
            assert result.gpu_tokens + result.host_tokens + result.encoded_tokens == result.prefix_tokens
            stood = [rows for rows in self.versions[known - 1 : noted] if len(rows) == result.position]
            errors = [
                np.abs(recompute(model, History(self.features, 0, rows), candidates).numpy() - result.logits).max()
                for rows in stood
            ]
            assert errors, (result.position, known, noted)
            assert min(errors) < TOLERANCE
        return len(answers)


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_threads_that_append_correct_and_score(world: Make, changes: dict[str, Any]) -> None:
    w = world(small_model(**changes), gpu_pages=20, host_pages=30, start=True, cold_batch_tokens=25, cold_after=12)
    users = [User(name, seed) for seed, name in enumerate("abc")]
    answers: dict[str, list[tuple[int, int, Any, Any]]] = {user.name: [] for user in users}
    end = time.monotonic() + 1.5
    errors: list[BaseException] = []

    def guarded(work: Callable[[np.random.Generator], None], seed: int) -> threading.Thread:
        def run() -> None:
            rng = np.random.default_rng(seed)
            try:
                while time.monotonic() < end:
                    work(rng)
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=run)

    def score(rng: np.random.Generator) -> None:
        user = users[rng.integers(3)]
        candidates = make_candidates(rng, 2, START_MS * 2)
        known = len(user.versions) - 1  # the newest may not have been acknowledged yet
        result = w.engine.submit(Request(user.name, candidates)).result(20)
        answers[user.name].append((max(1, known), len(user.versions), candidates, result))
        time.sleep(0.002)

    def disturb(rng: np.random.Generator) -> None:
        [w.engine.invalidate, w.engine.prefetch][rng.integers(2)](users[rng.integers(3)].name)
        w.engine.check()
        w.engine.stats()
        time.sleep(0.02)

    def change(user: User) -> Callable[[np.random.Generator], None]:
        def work(_: np.random.Generator) -> None:
            if len(user.rows) < 40:
                user.change(w.engine)
            time.sleep(0.01)

        return work

    for user in users:
        w.engine.put_user(user.name, user.features, user.rows)
    threads = [guarded(score, seed) for seed in range(4)] + [guarded(disturb, 9)]
    threads += [guarded(change(user), 20) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sum(user.verify(w.model, answers[user.name]) for user in users) > 50
    assert w.engine.drain(10)
    w.assert_empty()


class PausedHistory(MemoryHistory):
    """Stops after an append is stored and before its caller hears of it."""

    def __init__(self) -> None:
        super().__init__(SCHEMA)
        self.stored, self.go = threading.Event(), threading.Event()
        self.go.set()

    def _append(self, append: Append) -> int:
        end = super()._append(append)
        self.stored.set()
        assert self.go.wait(10)
        return end


def test_an_append_overtaken_by_a_correction_does_not_come_back(world: Make) -> None:
    """The append is stored, then truncated away, before the engine hears of the append."""
    history = PausedHistory()
    w = world(history=history)
    w.put("a", 9)
    w.score("a")
    history.go.clear()
    history.stored.clear()
    more = make_behaviours(w.rng, 1, int(w.rows["a"]["time_ms"][-1]))
    appending = threading.Thread(target=w.engine.append, args=("a", more))
    appending.start()
    assert history.stored.wait(10)
    correcting = threading.Thread(target=w.engine.truncate, args=("a", 9))
    correcting.start()
    correcting.join(0.1)  # a correction that did not wait has been told by now
    w.score("a")
    history.go.set()
    appending.join()
    correcting.join()
    assert history.position("a") == 9
    assert w.score("a").position == 9
    w.engine.check()


def test_a_running_engine_replaces_its_model_between_batches(world: Make) -> None:
    models = [small_model(0), small_model(1)]
    w = world(models[0], start=True, gpu_pages=20)
    w.put("a", 17)
    history = w.history_of("a")
    candidates = w.candidates(3, START_MS * 2)
    expected = [recompute(model, history, candidates).numpy() for model in models]
    used = set()
    for turn in range(60):
        future = w.engine.submit(Request("a", candidates))
        if turn % 6 == 0:
            w.engine.replace_model(models[turn // 6 % 2])
        logits = future.result(10).logits
        close = [bool(np.abs(logits - each).max() < TOLERANCE) for each in expected]
        assert sum(close) == 1
        if turn % 6 == 5:
            assert close[turn // 6 % 2]
        used.add(close.index(True))
    assert used == {0, 1}


def test_a_request_made_before_a_swap_and_admitted_after_it(world: Make) -> None:
    """What `submit` does on its caller's thread, with the swap between its two halves."""
    w = world(small_model(0))
    w.put("a", 17)
    history, candidates = w.history_of("a"), w.candidates(3, START_MS * 2)
    for model in (small_model(1), small_model(0)):
        w.score("a")
        job = w.engine._admission.job(Request("a", candidates), waiting=0)
        w.replace(model)
        w.score("a")
        w.engine._admit(job)
        w.run()
        assert Pending(w, job.future, history, candidates).verify().gpu_tokens == 19


def test_score_waits_on_a_running_engine(world: Make) -> None:
    w = world(start=True)
    w.put("a", 4)
    result = w.engine.score("a", w.candidates(2), deadline_s=30)
    assert result.position == 4
    with pytest.raises(AssertionError, match="own thread"):
        w.engine.step()
