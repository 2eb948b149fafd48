"""A small trace, the tiny model, and an engine's stand-in that answers when and as it is told."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from mtserve.model.presets import build
from mtserve.model.ranking import RankingModel
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.replay.features import TraceRows
from mtserve.trace.schema import Trace
from mtserve.types import Request, Rows, ScoreResult

TASKS = 2


def small_trace(users: int = 7, requests: int = 45, history: int = 40) -> Trace:
    """Users take turns at random, so that few are found where they were a moment ago."""
    config = GeneratorConfig(
        seed=3, users=users, requests=requests, history_median=history, items=500, activity_sigma=0.5
    )
    trace = generate(config)
    user = np.random.default_rng(4).permutation(trace.user)
    return replace(trace, user=user, session=np.zeros_like(trace.session))


def tiny_model() -> RankingModel:
    return build("tiny", seed=1)


class FakeEngine:
    """Answers on threads of its own after random pauses; remembers what came when.

    `serial_s`: answer one request after the other, each taking so long. `fail`: request numbers
    (by order of submission) that get an error.
    """

    def __init__(self, rows: TraceRows, *, serial_s: float = 0.0, fail: frozenset[int] = frozenset()) -> None:
        trace = rows.trace
        self.position = {user: int(n) for user, n in zip(trace.user_ids, trace.history_lengths, strict=True)}
        self.events: list[tuple[str, str]] = []
        self.busiest = 0
        self._open = self._submitted = 0
        self._random = random.Random(5)
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._serial_s, self._fail = serial_s, fail

    def submit(self, request: Request) -> Future[ScoreResult]:
        future: Future[ScoreResult] = Future()
        with self._lock:
            self.events.append(("submit", request.user_id))
            number, position = self._submitted, self.position[request.user_id]
            self._submitted += 1
            self._open += 1
            self.busiest = max(self.busiest, self._open)
            pause = self._random.random() * 0.004
        threading.Thread(target=self._answer, args=(future, request, number, position, pause)).start()
        return future

    def _answer(self, future: Future[ScoreResult], request: Request, number: int, position: int, pause: float) -> None:
        if self._serial_s:
            with self._turn:
                time.sleep(self._serial_s)
        else:
            time.sleep(pause)
        with self._lock:
            self.events.append(("answer", request.user_id))
            self._open -= 1
        if number in self._fail:
            future.set_exception(RuntimeError("as told"))
            return
        logits = np.zeros((len(request.candidates), TASKS), dtype=np.float32)
        future.set_result(ScoreResult(logits + 0.5, logits, ("a", "b"), position, position, position, 0, 0, 0.0))

    def append(self, user_id: str, behaviours: Rows) -> int:
        with self._lock:
            self.events.append(("append", user_id))
            self.position[user_id] += len(behaviours)
            return self.position[user_id]
