"""An engine without a model: it keeps histories in a dict and scores by arithmetic."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from mtserve.config import EngineConfig
from mtserve.engine.checks import check_pins
from mtserve.errors import DeadlineExceeded, FailedPrecondition, NotFound, ResourceExhausted
from mtserve.metrics import Metrics
from mtserve.model.schema import Feature, FeatureSchema
from mtserve.types import Request, Rows, ScoreResult

TASKS = ("ctr", "ctcvr", "like")
SCHEMA = FeatureSchema(
    user=(Feature("segment", buckets=10, dim=4), Feature("traits", kind="dense", width=3)),
    behaviour=(Feature("item", buckets=100, dim=4), Feature("dwell", kind="dense", width=1)),
    candidate=(
        Feature("item", buckets=100, dim=4),
        Feature("affinity", kind="dense", width=2, role="cross"),
        Feature("hour", buckets=24, dim=4, role="context"),
    ),
)


class FakeEngine:
    """With `held`, submitted requests wait for `release`. `fail` is raised (or set) by the next submits."""

    def __init__(self, *, max_candidates: int = 100, max_queue: int = 1000) -> None:
        self.config = EngineConfig(max_candidates=max_candidates, max_queue=max_queue)
        self.schema = SCHEMA
        self.metrics = Metrics()
        self.histories: dict[str, Rows] = {}
        self.features: dict[str, Rows | None] = {}
        self.requests: list[Request] = []
        self.waiting: list[tuple[Request, Future[ScoreResult]]] = []
        self.held = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.fail: BaseException | None = None
        self.fail_later: BaseException | None = None
        self.append_seconds = 0.0
        self.prefetched: list[str] = []
        self.invalidated: list[str | None] = []
        self.pinned: set[str] = set()
        self.closed = False

    def put_user(self, user_id: str, features: Rows | None = None, history: Rows | None = None) -> int:
        self.features[user_id] = features if features is not None else self.features.get(user_id)
        if history is not None or user_id not in self.histories:
            self.histories[user_id] = history if history is not None else SCHEMA.behaviours({"time_ms": []})
        return len(self.histories[user_id])

    def append(self, user_id: str, behaviours: Rows, position: int | None = None, *, prefetch: bool = False) -> int:
        time.sleep(self.append_seconds)
        known = self.histories.get(user_id, behaviours[:0])
        if position is not None and position != len(known):
            raise FailedPrecondition(f"server is at {len(known)}", field="position", position=len(known))
        self.histories[user_id] = np.concatenate([known, behaviours])
        if prefetch:
            self.prefetched.append(user_id)
        return len(self.histories[user_id])

    def truncate(self, user_id: str, position: int) -> int:
        self.histories[user_id] = self._known(user_id)[:position]
        return len(self.histories[user_id])

    def delete_user(self, user_id: str) -> bool:
        return self.histories.pop(user_id, None) is not None

    def submit(self, request: Request) -> Future[ScoreResult]:
        if self.fail is not None:
            raise self.fail
        history = request.history.behaviours if request.history else self._known(request.user_id)
        if len(self.waiting) >= self.config.max_queue:
            raise ResourceExhausted(f"holds {self.config.max_queue} requests already", field="queue")
        future: Future[ScoreResult] = Future()
        self.requests.append(request)
        if self.fail_later is not None:
            future.set_exception(self.fail_later)
        elif request.deadline is not None and time.time() >= request.deadline:
            future.set_exception(DeadlineExceeded("passed", field="deadline"))
        elif self.held.is_set():
            self.waiting.append((request, future))
        else:
            future.set_result(self._result(request, len(history)))
        self.arrived.release()
        return future

    def release(self) -> None:
        self.held.clear()
        waiting, self.waiting = self.waiting, []
        for request, future in waiting:
            if not future.cancelled():
                future.set_result(self._result(request, len(self.histories.get(request.user_id, ()))))

    def prefetch(self, user_id: str) -> None:
        self._known(user_id)
        self.prefetched.append(user_id)

    def invalidate(self, user_id: str | None = None) -> int:
        self.invalidated.append(user_id)
        return 1 if user_id else len(self.histories)

    def pin(self, user_ids: Sequence[str]) -> int:
        check_pins(user_ids)
        before = len(self.pinned)
        self.pinned.update(user_ids)
        return len(self.pinned) - before

    def unpin(self, user_ids: Sequence[str]) -> int:
        check_pins(user_ids)
        before = len(self.pinned)
        self.pinned.difference_update(user_ids)
        return before - len(self.pinned)

    def stats(self) -> dict[str, Any]:
        return {"metrics": self.metrics.snapshot(), "queue": {"length": len(self.waiting)}}

    def drain(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        while self.waiting and time.monotonic() < end:
            time.sleep(0.005)
        return not self.waiting

    def close(self) -> None:
        self.closed = True

    def _known(self, user_id: str) -> Rows:
        if user_id not in self.histories:
            raise NotFound(f"{user_id!r} has no history here", field="user_id")
        return self.histories[user_id]

    def _result(self, request: Request, position: int) -> ScoreResult:
        rows = request.candidates
        scores = expected_scores(rows["item"], rows["affinity"], rows["hour"])
        return ScoreResult(scores, scores, TASKS, position, position + 3, 2, 1, position, 0.0125)


def expected_scores(item: Any, affinity: Any, hour: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [candidates, 3]: what FakeEngine answers for candidates of SCHEMA."""
    columns = [np.asarray(item) % 97 / 97, np.asarray(affinity).sum(axis=1), np.asarray(hour) / 24]
    return np.stack(columns, axis=1).astype(np.float32)
