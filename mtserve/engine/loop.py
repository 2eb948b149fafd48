"""The thread that owns the core, and how other threads reach it: by commands, run between two steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mtserve.engine.core import Core
from mtserve.errors import Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")

# How long the loop sleeps while only copies are under way, and while nothing is.
POLL_S, IDLE_S = 0.0002, 0.5


class Loop:
    """Steps a core. `state`: serving, draining, closed, or broken (a step raised: our bug, and nothing goes on).

    `start=False` starts no thread: commands then run at once, and the caller drives `step`.
    """

    def __init__(self, core: Core, *, start: bool) -> None:
        self._core = core
        self._inbox: deque[tuple[Callable[[], None], bool]] = deque()
        self._coming = 0  # commands in the inbox that bring a request for scores
        self._wake = threading.Condition()
        self.state = "serving"
        self._thread = threading.Thread(target=self._run, name="mtserve-engine", daemon=True) if start else None
        if self._thread is not None:
            self._thread.start()

    @property
    def by_hand(self) -> bool:
        return self._thread is None

    @property
    def waiting(self) -> int:
        """Requests for scores that wait for a batch, whatever is on its way to the queue included."""
        return self._coming + self._core.scheduler.scores

    def admitting(self) -> None:
        """Raise Unavailable unless new work is taken."""
        if self.state != "serving":
            raise Unavailable(f"the engine is {self.state}")

    def post(self, command: Callable[[], None], *, scores: bool = False) -> None:
        """Have `command` run between two steps; `scores`: it counts as waiting. Raises Unavailable when no step will come."""
        with self._wake:
            if self.state in ("closed", "broken"):
                raise Unavailable(f"the engine is {self.state}")
            self._inbox.append((command, scores))
            self._coming += scores
            self._wake.notify()

    def call(self, command: Callable[[], T]) -> T:
        """The result of `command`, run between two steps."""
        if self._thread is None or self.state in ("closed", "broken"):
            self.run_inbox()
            return command()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)

        self.post(run)
        return future.result()

    def step(self) -> bool:
        """Drive the core by hand; False when there was nothing to do."""
        assert self._thread is None, "the engine's own thread drives it"
        self.run_inbox()
        return self._core.step()

    def run_inbox(self) -> None:
        """Run the commands that wait; for whoever drives the core."""
        while self._inbox:
            command, scores = self._inbox.popleft()
            if scores:
                with self._wake:
                    self._coming -= 1
            command()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new work, finish what is queued and under way; False when time ran out first."""
        if self.state == "serving":
            self.state = "draining"
        end = time.monotonic() + timeout_s
        while self.state == "draining":
            if self._idle(end - time.monotonic()):
                return True
            if time.monotonic() > end:
                return False
            if self._thread is None:
                self.step()
            else:
                time.sleep(0.001)
        return not self._core.busy()

    def close(self) -> bool:
        """Stop; what still waits fails with Unavailable. False when it was closed before."""
        with self._wake:
            if self.state == "closed":
                return False
            self.state = "closed"
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        self.run_inbox()
        self._core.close(Unavailable("the engine was closed"))
        return True

    def _idle(self, timeout_s: float) -> bool:
        """Whether the core, asked between two steps, has nothing left to do; False when it gives no answer in time."""
        answer: Future[bool] = Future()
        self.post(lambda: answer.set_result(not self._core.busy()))
        if self._thread is None:
            self.run_inbox()
        try:
            return answer.result(max(0.0, timeout_s))
        except TimeoutError:
            return False

    def _run(self) -> None:
        try:
            while self.state != "closed":
                self.run_inbox()
                if not self._core.step():
                    self._sleep()
                    self._core.stopwatch.lap("idle")
        except Exception as error:
            log.exception("the engine's loop stopped")
            with self._wake:
                self.state = "broken"  # nothing is posted from here on, and what was, is answered now
            self.run_inbox()
            self._core.close(Unavailable(f"the engine's loop stopped: {error!r}"))

    def _sleep(self) -> None:
        with self._wake:
            if not self._inbox and self.state != "closed":
                self._wake.wait(POLL_S if self._core.busy() else min(IDLE_S, self._core.due_in()))
