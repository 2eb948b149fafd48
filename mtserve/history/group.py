"""Group commit: threads that write at the same time share one transaction and one sync."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, cast

from mtserve.errors import Unavailable

T = TypeVar("T")
MAX_GROUP = 1024


class Ticket:
    """One change on its way: what to do, then what came of it."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change
        self.result: Any = None
        self.error: BaseException | None = None
        self.settled = False
        self.called = False  # settled, or due to lead
        self.wake = threading.Lock()  # half the cost of an Event
        self.wake.acquire()

    def call(self) -> None:
        """Wake the ticket's thread. `called` goes first, see `_wait`."""
        self.called = True
        self.wake.release()


class GroupCommit:
    """The first thread to arrive leads and commits for all that arrive while it does; there is no thread of its own.

    `commit` gets a non-empty list of tickets and sets `result` or `error` in each.
    """

    def __init__(self, commit: Callable[[list[Ticket]], None]) -> None:
        self._commit = commit
        self._lock = threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._leading = False
        self._closed = False
        self._idle = threading.Condition(self._lock)

    def submit(self, change: Callable[[Any], T]) -> T:
        """Do `change`, within some thread's group; returns its result or raises its error once that is durable."""
        ticket = Ticket(change)
        with self._lock:
            if self._closed:
                raise Unavailable("the history store is closed")
            self._waiting.append(ticket)
            lead, self._leading = not self._leading, True
        interrupt = None if lead else _wait(ticket)
        if not ticket.settled:
            self._lead()
        if interrupt or ticket.error:
            raise interrupt or cast(BaseException, ticket.error)
        return cast(T, ticket.result)

    def close(self) -> None:
        """Refuse new changes and wait for those under way."""
        with self._lock:
            self._closed = True
            self._idle.wait_for(lambda: not self._leading)

    def _lead(self) -> None:
        with self._lock:
            group = [self._waiting.popleft() for _ in range(min(MAX_GROUP, len(self._waiting)))]
        try:
            self._commit(group)
        except BaseException as error:  # nobody may wait forever, whatever hit the leader
            for ticket in group:
                ticket.error = ticket.error or error
            raise
        finally:
            for ticket in group:
                ticket.settled = True
                ticket.call()
            self._hand_over()

    def _hand_over(self) -> None:
        """Wake the oldest waiting ticket's thread to lead next."""
        with self._lock:
            if self._waiting:
                self._waiting[0].call()
            else:
                self._leading = False
                self._idle.notify_all()


def _wait(ticket: Ticket) -> BaseException | None:
    """Wait until `ticket` is settled or has to lead; returns what tried to interrupt that.

    A ticket whose thread went away could never lead, and all behind it would hang.
    """
    interrupt = None
    while not ticket.called:  # an interrupt may also come when the lock was taken already: nobody would call again
        try:
            ticket.wake.acquire()
        except BaseException as error:
            interrupt = error
    ticket.wake.acquire(blocking=False)  # or when it was about to be
    return interrupt
