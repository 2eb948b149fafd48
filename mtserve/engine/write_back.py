"""Which users have states that the host lacks, and when they are copied there."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mtserve.cache.index import Store, TieredIndex
from mtserve.types import Clock


class WriteBack:
    """Picks what to save: full pages right after the batch that filled them, the rest once its user has been idle.

    A request appends a few tokens to a user's last page, and the next one a few more. Copied each time, the page
    would cross the link again and again for tokens that soon follow; copied once its user has paused, it crosses
    once. A user who loses the page before that encodes less than a page again.
    """

    def __init__(self, index: TieredIndex, clock: Clock, idle_s: float) -> None:
        """`idle_s`: seconds without a batch after which the last page is saved too; 0: at once."""
        self._index, self._clock, self._idle_s = index, clock, idle_s
        self._unsaved: dict[str, float] = {}  # user -> time of the last batch, oldest first
        self._grown: dict[str, None] = {}  # of these, users of batches since the last `begin`

    def __len__(self) -> int:
        """Users with states that the host may not have."""
        return len(self._unsaved)

    def grew(self, users: Iterable[str]) -> None:
        """A batch has made states of these users."""
        now = self._clock()
        for user in users:
            self._unsaved.pop(user, None)
            self._unsaved[user] = now
            self._grown[user] = None

    def begin(self) -> list[Store]:
        """The copies to start now."""
        stores: list[Store] = []
        if self._idle_s > 0:
            stores += self._index.begin_stores(list(self._grown), tail=False)
        self._grown.clear()
        due = self._due()
        whole = self._index.begin_stores(due, tail=True)
        begun = {store.user for store in whole}
        for user in due:
            # What came while the user's last copy runs is saved when that has ended.
            if user in begun or not self._index.is_busy(user).storing:
                del self._unsaved[user]
        return stores + whole

    def due_in(self) -> float:
        """Seconds until the next copy is to start; infinity when none is."""
        oldest = next(iter(self._unsaved.values()), math.inf)
        return max(0.0, oldest + self._idle_s - self._clock())

    def _due(self) -> list[str]:
        latest, due = self._clock() - self._idle_s, []
        for user, last in self._unsaved.items():
            if last > latest:
                break
            due.append(user)
        return due
