"""The copies under way between the tiers: whose they are, what they carry and how long they take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from mtserve.cache.index import Copy
from mtserve.metrics import Metrics
from mtserve.transfer.mover import LOAD, STORE, Finished
from mtserve.types import Clock

DIRECTIONS = (LOAD, STORE)


class Transfer(NamedTuple):
    """One copy under way: its size in bytes, when it was submitted, and the device pages that it holds fast."""

    user_id: str
    bytes: int
    began: float
    held_pages: int


class Transfers:
    """Counts and times copies, each from its submission until it is polled as finished."""

    def __init__(self, metrics: Metrics, clock: Clock, page_tokens: int, page_bytes: int, timeout_s: float) -> None:
        """`timeout_s`: a copy under way for longer is stuck."""
        self._metrics, self._clock, self._timeout_s = metrics, clock, timeout_s
        self._page_tokens, self._page_bytes = page_tokens, page_bytes
        self._loading: dict[str, int] = {}  # user -> ticket of the load under way
        self._stuck: set[int] = set()  # tickets
        self._open: dict[str, dict[int, Transfer]] = {kind: {} for kind in DIRECTIONS}  # by ticket
        self._open_bytes = dict.fromkeys(DIRECTIONS, 0)
        self._busy_since = dict.fromkeys(DIRECTIONS, 0.0)  # of directions with copies under way
        self._busy_s = dict.fromkeys(DIRECTIONS, 0.0)  # of earlier times

    def __len__(self) -> int:
        """Copies under way, both ways."""
        return sum(map(len, self._open.values()))

    def began(self, kind: str, copies: Sequence[Copy], page_bytes: int = 0) -> None:
        """`copies` are submitted now; `page_bytes`: what they move of each page, where that is not all of it."""
        now, under_way = self._clock(), self._open[kind]
        if not under_way:
            self._busy_since[kind] = now
        size, page_bytes, page_tokens = 0, page_bytes or self._page_bytes, self._page_tokens
        for copy in copies:
            moved = len(copy.gpu_pages) * page_bytes
            under_way[copy.ticket] = Transfer(copy.user, moved, now, -(-copy.tokens // page_tokens))
            size += moved
        if kind == LOAD:
            self._loading.update([(copy.user, copy.ticket) for copy in copies])
        self._open_bytes[kind] += size
        self._metrics.count_many(((f"{kind}s_in_flight", len(copies), ""), (f"{kind}_bytes_in_flight", size, "")))

    def loading(self, user_id: str) -> int | None:
        """Ticket of the load under way that brings the user's present states."""
        return self._loading.get(user_id)

    def loads_of(self, users: Sequence[str]) -> tuple[int, ...]:
        """Tickets of such loads of any of these users."""
        loading = self._loading
        return tuple([loading[user] for user in users if user in loading]) if loading else ()

    def disown(self, user_id: str | None) -> None:
        """What loads under way bring of this user, or of all, belongs to no later batch."""
        if user_id is None:
            self._loading.clear()
        else:
            self._loading.pop(user_id, None)

    def any_open(self, kind: str, tickets: Collection[int]) -> bool:
        """Whether any of these copies is under way."""
        return not self._open[kind].keys().isdisjoint(tickets)

    def held(self) -> dict[str, int]:
        """Device pages that copies under way hold fast, by user."""
        held: dict[str, int] = {}
        for under_way in self._open.values():
            for each in under_way.values():
                held[each.user_id] = held.get(each.user_id, 0) + each.held_pages
        return held

    def ended(self, finished: Sequence[Finished]) -> set[str]:
        """These copies were polled; returns the users whose loads failed."""
        now, unloaded = self._clock(), set[str]()
        for kind in DIRECTIONS:
            done = [each for each in finished if each.kind == kind]
            if not done:
                continue
            transfers = [self._open[kind].pop(each.ticket) for each in done]
            if self._stuck:
                self._stuck.difference_update([each.ticket for each in done])
            failed = [t for t, each in zip(transfers, done, strict=True) if each.error is not None]
            self._count(kind, now, transfers, failed)
            if not self._open[kind]:
                self._busy_s[kind] += max(0.0, now - self._busy_since[kind])
            if kind == LOAD:
                unloaded.update(transfer.user_id for transfer in failed)
                for each, transfer in zip(done, transfers, strict=True):
                    if self._loading.get(transfer.user_id) == each.ticket:
                        del self._loading[transfer.user_id]
        return unloaded

    def newly_stuck(self) -> list[tuple[str, str]]:
        """(kind, user) of copies that have just been under way for too long; each is told once."""
        latest, found = self._clock() - self._timeout_s, []
        for kind, under_way in self._open.items():
            for ticket, transfer in under_way.items():  # oldest first
                if transfer.began > latest:
                    break
                if ticket not in self._stuck:
                    self._stuck.add(ticket)
                    found.append((kind, transfer.user_id))
        if found:
            self._metrics.count("copies_stuck_total", len(found))
        return found

    @property
    def any_stuck(self) -> bool:
        """Whether a copy that was under way for too long has still not ended."""
        return bool(self._stuck)

    @property
    def moving(self) -> int:
        """Copies under way that are expected to end."""
        return len(self) - len(self._stuck)

    def moving_bytes(self, kind: str) -> int:
        """Bytes of those of one direction."""
        stuck = (each.bytes for ticket, each in self._open[kind].items() if ticket in self._stuck)
        return self._open_bytes[kind] - sum(stuck) if self._stuck else self._open_bytes[kind]

    def _count(self, kind: str, now: float, ended: Sequence[Transfer], failed: Sequence[Transfer]) -> None:
        size = sum([transfer.bytes for transfer in ended])
        self._open_bytes[kind] -= size
        self._metrics.count_many(
            (
                (f"{kind}s_in_flight", -len(ended), ""),
                (f"{kind}_bytes_in_flight", -size, ""),
                (f"{kind}s_total", len(ended) - len(failed), ""),
                (f"{kind}s_failed_total", len(failed), ""),
                (f"{kind}_bytes_total", size - sum([transfer.bytes for transfer in failed]), ""),
            )
        )
        self._metrics.observe_many(f"{kind}_seconds", [max(0.0, now - transfer.began) for transfer in ended])

    def under_way(self, kind: str) -> int:
        """Copies of one direction under way."""
        return len(self._open[kind])

    def check(self) -> None:
        """Fail an assertion where the gauges are not what is under way."""
        for kind, under_way in self._open.items():
            assert self._metrics.value(f"{kind}s_in_flight") == len(under_way)
            assert self._open_bytes[kind] == sum(each.bytes for each in under_way.values())
            assert self._metrics.value(f"{kind}_bytes_in_flight") == self._open_bytes[kind]

    def stats(self) -> dict[str, Any]:
        """By direction, JSON-able: `bytes` moved, `busy_seconds` in which a copy was under way, copies `in_flight` and
        `failed`; `gb_per_s`: the quotient of the first two in 10^9 bytes a second, None when there were none.
        """
        return {kind: self._direction(kind) for kind in DIRECTIONS}

    def _direction(self, kind: str) -> dict[str, Any]:
        moved, busy_s = int(self._metrics.value(f"{kind}_bytes_total")), self._busy_s[kind]
        if self._open[kind]:
            busy_s += max(0.0, self._clock() - self._busy_since[kind])
        return {
            "bytes": moved,
            "busy_seconds": busy_s,
            "gb_per_s": moved / busy_s / 1e9 if busy_s > 0 else None,
            "in_flight": len(self._open[kind]),
            "failed": int(self._metrics.value(f"{kind}s_failed_total")),
        }
