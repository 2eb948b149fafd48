"""Which users have states that the host lacks, and when they are copied there."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mtserve.cache.index import Store, TieredIndex
from mtserve.types import Clock

# How long last pages are saved at once after one was lost: many times what it takes users to come and go then.
HURRY_S = 1.0


class WriteBack:
    """Picks what to save: full pages right after the batch that filled them, the rest once its user has been idle.

    A request appends a few tokens to a user's last page, and the next one a few more. Copied each time, the page
    would cross the link again and again for tokens that soon follow; copied once its user has paused, it crosses
    once. A user who loses the page before that encodes less than a page again. Where that happens, because users come and
    go faster than they pause, the last pages are saved at once for some time.

    What the link has no room for stays listed here, a name a user, and its states stay on the device meanwhile; so
    does what a host tier that still grows has no room for. Nothing is dropped but by eviction, which the index counts.
    A user whose copy failed, or whose history is larger than the whole host tier, is tried again with its next batch.
    """

    def __init__(self, index: TieredIndex, clock: Clock, idle_s: float) -> None:
        """`idle_s`: seconds without a batch after which the last page is saved too; 0: at once."""
        self._index, self._clock, self._idle_s = index, clock, idle_s
        self._hurried_until = -math.inf
        self._unsaved: dict[str, float] = {}  # user -> time of the last batch, oldest first
        self._grown: dict[str, None] = {}  # of these, users with full pages that nobody has tried to save yet
        self._crowded: dict[
            str, None
        ] = {}  # users for whom, or for all of whom, a host tier that grows had no room yet

    def __len__(self) -> int:
        """Users with states that the host may not have."""
        return len(self._unsaved) + len(self._crowded)

    def grew(self, users: Iterable[str]) -> None:
        """A batch has made states of these users."""
        now = self._clock()
        for user in users:
            self._unsaved.pop(user, None)
            self._unsaved[user] = now
            self._grown[user] = None
            self._crowded.pop(user, None)

    def hurry(self) -> None:
        """States that nobody had saved were evicted."""
        self._hurried_until = self._clock() + HURRY_S

    def _wait_s(self) -> float:
        """Seconds without a batch after which a user's last page is saved."""
        return self._idle_s if self._clock() >= self._hurried_until else 0.0

    def begin(self, pages: int, *, host_grows: bool = False) -> tuple[list[Store], bool]:
        """The copies to start now, `pages` or little more; and whether more should have started.

        `host_grows`: whether the host tier is still to become larger, so that who finds no room there is tried again.
        """
        stores: list[Store] = []
        waiting: list[str] = []
        if self._grown and self._wait_s() > 0:
            begun, late = self._index.begin_stores(list(self._grown), tail=False, pages=pages)
            stores, waiting = begun, list(late)
        self._grown = dict.fromkeys(waiting)
        due = self._due()
        if not due:
            return stores, bool(waiting)
        pages -= sum(len(store.gpu_pages) for store in stores)
        whole, late = self._index.begin_stores(due, tail=True, pages=pages)
        covered = {store.user: store.tokens - store.first_token for store in whole}
        for user in due[: len(due) - len(late)]:
            # What came while the user's last copy runs is saved when that has ended.
            if user not in covered and self._index.is_busy(user).storing:
                continue
            del self._unsaved[user]
            self._grown.pop(user, None)
            if host_grows and self._index.unsaved_tokens(user) > covered.get(user, 0):
                self._crowded[user] = None
        return stores + whole, bool(waiting or late)

    def host_grew(self) -> None:
        """There is more room on the host: try again, first, whoever found none."""
        self._unsaved = {**dict.fromkeys(self._crowded, -math.inf), **self._unsaved}
        self._crowded.clear()

    def forget(self, user_id: str | None) -> None:
        """The states of this user, or of all, are void."""
        for listed in (self._unsaved, self._grown, self._crowded):
            if user_id is None:
                listed.clear()  # type: ignore[attr-defined]
            else:
                listed.pop(user_id, None)  # type: ignore[attr-defined]

    def due_in(self) -> float:
        """Seconds until the next copy is to start; infinity when none is."""
        if self._grown:
            return 0.0
        oldest = next(iter(self._unsaved.values()), math.inf)
        return max(0.0, oldest + self._wait_s() - self._clock())

    def _due(self) -> list[str]:
        latest, due = self._clock() - self._wait_s(), []
        for user, last in self._unsaved.items():
            if last > latest:
                break
            due.append(user)
        return due
