"""The engine: histories in, scores out, from any thread. What the loop does is `Core.step`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import numpy as np

from mtserve.config import EngineConfig
from mtserve.engine.admission import Admission
from mtserve.engine.checks import check_pins
from mtserve.engine.core import Core
from mtserve.engine.hints import Hints
from mtserve.engine.loop import Loop
from mtserve.engine.request.job import Job, make_job
from mtserve.engine.request.sequence import UserSequence
from mtserve.engine.request.sequences import SequenceCache
from mtserve.engine.setup import available_memory
from mtserve.errors import MtserveError, ResourceExhausted, Unavailable
from mtserve.history.memory import MemoryHistory
from mtserve.history.store import HistoryStore, check_user_id
from mtserve.metrics import Metrics
from mtserve.model.cut import Cut, cut_history
from mtserve.model.ranking import RankingModel
from mtserve.model.schema import FeatureSchema
from mtserve.restore.costs import Costs
from mtserve.transfer.mover import Fault
from mtserve.types import Clock, History, Request, Rows, ScoreResult
from mtserve.units import parse_capacity


class Engine:
    """Scores candidates from cached user states.

    `history`: where behaviours live (in memory unless given; the engine closes only its own).
    `clock`: seconds; deadlines and unset exposure times are read off it.
    `start=False` starts no thread: the caller drives `step`, and `score` drives it by itself.
    `fault` makes copies between the tiers fail, for tests; `config.chaos` does so by itself.
    `costs` of restoring states (`restore = "auto"`): calibrated where not given, on a GPU with the cuda kernels.

    All methods may be called from any thread, unless `start=False`.
    """

    def __init__(
        self,
        model: RankingModel,
        config: EngineConfig | None = None,
        *,
        history: HistoryStore | None = None,
        clock: Clock = time.time,
        start: bool = True,
        fault: Fault | None = None,
        costs: Costs | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.metrics = Metrics()
        self.history = history or MemoryHistory(model.schema)
        self._owns_history = history is None
        self._clock = clock
        snapshot_bytes = parse_capacity(self.config.snapshot_cache, of=available_memory(), field="snapshot_cache")
        self._core = Core(model, self.config, self.metrics, clock, fault, background=start, costs=costs)
        self._sequences = SequenceCache(self.history, self._core.served.builder, snapshot_bytes)
        self._admission = Admission(self.config, self.metrics, clock, self._sequences, model.schema)
        self._loop = Loop(self._core, start=start)
        self._grow_host_tier()
        self._hints = Hints(self._read_and_encode, self.metrics, limit=self.config.max_queue, start=start)

    @property
    def model(self) -> RankingModel:
        """The model as served: on the engine's device, in its dtype."""
        return self._core.served.model

    @property
    def schema(self) -> FeatureSchema:
        return self._core.served.model.schema

    # Histories

    def put_user(self, user_id: str, features: Rows | None = None, history: Rows | None = None) -> int:
        """Set a user's U features and, when given, the whole history; returns the position.

        A change of either starts a new generation. None leaves what is known.
        """
        self._loop.admitting()
        with self._changing(user_id):
            position = self.history.put_user(user_id, features, history)
            self._sequences.forget(user_id)
        self.metrics.count("generations_total")
        return position

    def append(self, user_id: str, behaviours: Rows, position: int | None = None, *, prefetch: bool = False) -> int:
        """Durably add `behaviours` (rows of `schema.behaviour`) and return the new position.

        `position`: where the first one is believed to go; FailedPrecondition tells the true one.
        `prefetch` hints that a score of the user follows: the states are brought and what is new is encoded right
        away, as by `prefetch`. The append neither waits for that nor fails by it; where too much waits, nothing is done.
        """
        self._loop.admitting()
        with self._changing(user_id):
            end = self.history.append(user_id, behaviours, position)
            pair = self._sequences.appended(user_id, behaviours, end)
        self.metrics.count("appended_behaviours_total", len(behaviours))
        if pair is None:
            config = self.model.config
            self._recut(user_id, cut_history(end - len(behaviours), config), cut_history(end, config))
        else:
            self._recut(user_id, pair[0].cut, pair[1].cut)
        self._bring_appended(user_id, pair, prefetch and self.config.cache == "on")
        return end

    def _bring_appended(self, user_id: str, pair: tuple[UserSequence, UserSequence] | None, hinted: bool) -> None:
        """Encode what a hint announces, and a new generation before its first request."""
        if hinted:
            self.metrics.count("prefetches_total")
        if pair is None:
            if hinted:
                self._hints.add(user_id)
            return
        before, after = pair
        with contextlib.suppress(Unavailable):  # closed since: the append is durable nevertheless
            if hinted:
                self._encode(after)
            elif before.root != after.root:
                self._encode(after, replaces=before)

    def truncate(self, user_id: str, position: int) -> int:
        """Correct a history: forget the behaviours from `position` on, and return it."""
        self._loop.admitting()
        with self._changing(user_id):
            position = self.history.truncate(user_id, position)
            self._sequences.forget(user_id)
        return position

    def delete_user(self, user_id: str) -> bool:
        """Forget a user's history, features, states and pin; False when not known."""
        with self._changing(user_id):
            known = self.history.delete(user_id)
            self._sequences.forget(user_id)

        def forget() -> None:
            self._core.unpin([user_id])
            self._core.forget(user_id)

        self._loop.call(forget)
        return known

    def _changing(self, user_id: str) -> threading.Lock:
        check_user_id(user_id)
        return self._sequences.changing(user_id)

    def _recut(self, user_id: str, old: Cut, new: Cut) -> None:
        """Count a new generation, and let the store drop what no later cut or correction will reach."""
        if (old.start, old.static_end) == (new.start, new.static_end):
            return
        self.metrics.count("generations_total")
        limit = self.model.config.max_history
        if new.start > old.start and new.start > limit:
            self.history.drop_before(user_id, new.start - limit)

    # Scores

    def score(
        self, user_id: str, candidates: Rows, *, deadline_s: float | None = None, history: History | None = None
    ) -> ScoreResult:
        """Rank `candidates` (rows of `schema.candidate`) and wait for the result; see `submit` for the errors."""
        deadline = None if deadline_s is None else self._clock() + deadline_s
        future = self.submit(Request(user_id, candidates, deadline, history))
        while self._loop.by_hand and not future.done():
            self.step()
        return future.result()

    def submit(self, request: Request) -> Future[ScoreResult]:
        """Queue a request; cancel the future in any state.

        The history is read here, as it stands now: what is appended later does not change this score.
        (When it is not in memory that takes about a millisecond: not for an event loop's own thread.)
        Raises InvalidArgument, NotFound (no such user, no history sent), ResourceExhausted (queue full),
        DeadlineExceeded (already past) and Unavailable (draining) at once; the future holds later errors.
        """
        try:
            self._loop.admitting()
            job = self._admission.job(request, waiting=self._loop.waiting)
        except MtserveError as error:
            self._admission.refused(error)
            raise
        self.metrics.count_many((("requests_total", 1, ""), ("requests_in_flight", 1, "")))
        job.future.add_done_callback(self._answered)
        try:
            self._loop.post(lambda: self._admit(job), scores=True)
        except Unavailable:  # closed meanwhile: the future, which nobody has, ends the count of what is in flight
            job.future.cancel()
            raise
        return job.future

    def prefetch(self, user_id: str) -> Future[ScoreResult]:
        """Bring a user's states onto the device before the request comes; the future has no scores.

        Of a user's prefetches and hints that wait, only the newest stays: the others' futures fail with Cancelled.
        With ResourceExhausted where too many wait. Raises NotFound and Unavailable at once.
        """
        check_user_id(user_id)
        self.metrics.count("prefetches_total")
        return self._read_and_encode(user_id)

    def _read_and_encode(self, user_id: str) -> Future[ScoreResult]:
        self._loop.admitting()
        return self._encode(self._sequences.get(user_id))

    def invalidate(self, user_id: str | None = None) -> int:
        """Forget the cached states of a user, or of all; histories stay. Returns users forgotten."""
        if user_id is not None:
            check_user_id(user_id)
        return self._loop.call(lambda: self._core.invalidate(user_id))

    def pin(self, user_ids: Sequence[str]) -> int:
        """Keep these users' states before others', now and when they come; returns how many were not pinned yet.

        Of each tier's pages pinned users keep `config.pin_budget` at most: those used or pinned last, the rest are like
        anybody. Even these give way where a request finds no other room. Users need not be known. A pin ends with
        `unpin` or `delete_user`, and with the process. Raises InvalidArgument for more than MAX_PINS users or what is no
        user id, ResourceExhausted where more than 2^20 users would be pinned; then nothing has changed.
        0 where config.cache is "off".
        """
        check_pins(user_ids)
        return self._loop.call(lambda: self._core.pin(user_ids))

    def unpin(self, user_ids: Sequence[str]) -> int:
        """Treat these users like anybody again; returns how many were pinned. Errors as of `pin`."""
        check_pins(user_ids)
        return self._loop.call(lambda: self._core.unpin(user_ids))

    def replace_model(self, model: RankingModel) -> None:
        """Serve new weights of the same shape; states of the old ones are never used again."""

        def replace() -> None:
            self._core.replace_model(model)
            self._sequences.rebuild(self._core.served.builder)

        self._loop.call(replace)

    # Operation

    def stats(self) -> dict[str, Any]:
        """JSON-able facts and every metric, as of now."""
        facts = self._loop.call(self._core.stats)
        return {"state": self._loop.state, **facts, "metrics": self.metrics.snapshot()}

    def check(self) -> None:
        """Walk every structure; raises CorruptState (or fails an assertion) on the first inconsistency."""
        self._loop.call(self._core.check)
        self._sequences.check()

    def step(self) -> bool:
        """Drive the loop by hand (`start=False`); False when there was nothing to do."""
        return self._loop.step()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new work, finish what is queued and under way; False when time ran out first."""
        return self._loop.drain(timeout_s)

    def close(self) -> None:
        """Stop the loop; what still waits fails with Unavailable. Closing twice is fine."""
        self._hints.close()
        if self._core.memory is not None:
            self._core.memory.stop()
        closing = self._loop.state != "closed"
        try:
            self._loop.close()
        finally:
            if closing and self._owns_history:
                self.history.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # From callers' threads to the loop's

    def _grow_host_tier(self) -> None:
        tiers, memory = self._core.tiers, self._core.memory
        if tiers is None or memory is None:
            return

        def ready(pages: int) -> None:
            with contextlib.suppress(Unavailable):  # closed meanwhile
                self._loop.post(lambda: tiers.grow_host(pages))

        memory.grow(ready)

    def _answered(self, future: Future[ScoreResult]) -> None:
        self.metrics.count("requests_in_flight", -1)
        self._note_cancelled(future)

    def _note_cancelled(self, future: Future[ScoreResult]) -> None:
        if future.cancelled():
            self._core.scheduler.cancelled()

    def _encode(self, sequence: UserSequence, replaces: UserSequence | None = None) -> Future[ScoreResult]:
        nothing = np.empty(0, dtype=self.schema.candidate_dtype)
        job = make_job(sequence, nothing, Future(), self._clock(), None)
        job.replaces = replaces
        job.future.add_done_callback(self._note_cancelled)
        self._loop.post(lambda: self._admit(job))
        return job.future

    def _admit(self, job: Job) -> None:
        try:
            self._core.admit(job)
        except ResourceExhausted as error:
            if job.prefetch:
                self.metrics.count("prefetches_dropped_total")
            else:
                self._admission.refused(error)
            job.fail(error)
