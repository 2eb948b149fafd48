"""A link that is slow at times, without anybody waiting for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from mtserve.cache.index import Copy, PageIds
from mtserve.transfer.mover import LOAD, Arrivals, Finished, Mover, Pieces, Unpacker
from mtserve.types import Clock


class SlowMover(Mover):
    """Another mover, some of whose copies are told as finished later than they were.

    Until then nobody reads what they brought and their pages stay pinned, as those of a slow copy do.
    """

    def __init__(self, inner: Mover, delay: Callable[[str], float], clock: Clock) -> None:
        """`delay`: asked once a copy, with "load" or "store", for the seconds on `clock` by which it ends late."""
        super().__init__(inner.pool, inner.arena, chunk_pages=inner.chunk_pages)
        self._inner, self._delay, self._clock = inner, delay, clock
        self._late: dict[tuple[str, int], float] = {}  # (kind, ticket) of slow copies -> seconds
        self._held: list[tuple[float, Finished]] = []  # with the time to tell

    @property
    def unpacker(self) -> Unpacker | None:  # type: ignore[override]
        return self._inner.unpacker

    @unpacker.setter
    def unpacker(self, unpacker: Unpacker | None) -> None:
        self._inner.unpacker = unpacker

    def submit(self, kind: str, copies: Sequence[Copy]) -> None:
        for copy in copies:
            seconds = self._delay(kind)
            if seconds > 0:
                self._late[kind, copy.ticket] = seconds
        self._inner.submit(kind, copies)

    def submit_split(self, loads: Sequence[Copy], first_layer: int, pieces: Pieces | None = None) -> Arrivals:
        """Never late: a batch waits for them, and all that would show is a slow batch."""
        return self._inner.submit_split(loads, first_layer, pieces)

    def poll(self) -> list[Finished]:
        now = self._clock()
        for finished in self._inner.poll():
            self._held.append((now + self._late.pop((finished.kind, finished.ticket), 0.0), finished))
        self._held.sort(key=lambda held: held[0])
        ended = [finished for time, finished in self._held if time <= now]
        self._held = self._held[len(ended) :]
        return ended

    def pending(self) -> int:
        return self._inner.pending() + len(self._held)

    def load_s(self, size: int) -> float:
        return self._inner.load_s(size)

    def split_pieces(self, loads: Sequence[Copy]) -> Pieces:
        return self._inner.split_pieces(loads)

    def near(self, ticket: int) -> bool:
        """A late load is not near, however much of it is there."""
        return (LOAD, ticket) not in self._late and self._inner.near(ticket)

    def arrivals(self, tickets: Collection[int]) -> Arrivals:
        return self._inner.arrivals(tickets)

    def poison(self, pages: PageIds) -> None:
        self._inner.poison(pages)

    def wait(self, timeout_s: float = math.inf) -> bool:
        """Block until every copy has ended; what is only held back is held no longer."""
        ended = self._inner.wait(timeout_s)
        self._late.clear()
        self._held = [(-math.inf, finished) for _, finished in self._held]
        return ended
