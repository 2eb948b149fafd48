"""The loop that sends a trace's requests to an engine, in an order that means the same every time.

A request of a user is sent only after that user's previous request was answered and its clicks
were appended: every score sees exactly the history that the trace gives it, whatever the
timing. Requests held back by this rule are parked; requests of other users may pass them.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from mtserve.engine.engine import Engine
from mtserve.errors import MtserveError
from mtserve.trace.replay.features import TraceRows
from mtserve.trace.replay.run_log import RunLog
from mtserve.trace.schema import TraceRequest
from mtserve.types import Clock, Request, ScoreResult

# Requests parked behind their users before the closed loop stops reading ahead, per request in flight.
PARKED_PER_FLIGHT = 8

Answer = tuple[TraceRequest, float, float, Future[ScoreResult]]  # request, arrival, end, future


class Driver:
    """One run over the first `run.requests` requests of a trace.

    Closed loop (`speed` 0): `concurrency` requests are in flight at any time; a latency is from
    submission to answer. Open loop: request i arrives at (t_ms[i] - t_ms[0]) / speed, and its latency
    is from there to its answer, so that waiting counts wherever it happens; at most `concurrency`
    are in flight even then, the bound of the engine's queue.
    `clock`: seconds, monotonic.
    """

    def __init__(
        self,
        engine: Engine,
        rows: TraceRows,
        run: RunLog,
        *,
        concurrency: int,
        speed: float = 0.0,
        clock: Clock = time.perf_counter,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self._engine, self._rows, self._run = engine, rows, run
        self._concurrency, self._speed = concurrency, speed
        self._clock, self._progress = clock, progress
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._parked: dict[int, deque[tuple[TraceRequest, float]]] = {}  # keys are the users in flight
        self._waiting = self._in_flight = self._finished = 0
        self._started = 0.0

    @property
    def finished(self) -> int:
        """Requests that have come to their end."""
        return self._finished

    def drive(self) -> None:
        """Send every request and wait for the last answer. Raises what the engine raises for a broken append."""
        trace = self._rows.trace
        first_ms = int(trace.t_ms[0]) if self._run.requests else 0
        self._started = self._clock()
        for request in trace.iter_requests(0, self._run.requests):
            if self._speed:
                due = self._started + (request.t_ms - first_ms) / 1000 / self._speed
                self._wait_until(due)
            else:
                while self._waiting >= PARKED_PER_FLIGHT * self._concurrency:
                    self._finish(self._answers.get())
                due = -1.0
            self._offer(request, due)
        while self._in_flight:
            self._finish(self._answers.get())
        self._run.seconds = self._clock() - self._started

    def _wait_until(self, due: float) -> None:
        """Take answers as they come, until `due`."""
        while (left := due - self._clock()) > 0:
            try:
                self._finish(self._answers.get(timeout=left))
            except queue.Empty:
                return

    def _offer(self, request: TraceRequest, due: float) -> None:
        while self._in_flight >= self._concurrency:
            self._finish(self._answers.get())
        if request.user_index in self._parked:
            self._parked[request.user_index].append((request, due))
            self._waiting += 1
            return
        self._parked[request.user_index] = deque()
        self._send(request, due)

    def _send(self, request: TraceRequest, due: float) -> None:
        """Submit; `due` is when it arrived in the open loop, -1 for now."""
        candidates = self._rows.candidates(request)
        arrived = self._clock() if due < 0 else due
        self._in_flight += 1
        try:
            future = self._engine.submit(Request(request.user, candidates))
        except MtserveError as error:
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda ended: self._answers.put((request, arrived, self._clock(), ended)))

    def _finish(self, answer: Answer) -> None:
        """Record an answer, append its clicks, and send the user's next request where one is parked."""
        request, arrived, ended, future = answer
        error = future.exception()
        if error is None:
            self._run.answered(request.number, future.result(), ended - arrived)
        else:
            self._run.failed(error)
        if len(request.clicked):
            self._engine.append(request.user, self._rows.clicked(request))
        self._in_flight -= 1
        self._finished += 1
        self._progress(self._finished)
        parked = self._parked[request.user_index]
        if parked:
            self._waiting -= 1
            self._send(*parked.popleft())
        else:
            del self._parked[request.user_index]
