"""A device tier under LRU with a window and pins, plainly: lists of users. What the index is compared with."""

from __future__ import annotations


class Model:
    """Batches of one user each, whose histories only grow. `held` users are those that eviction passes by."""

    def __init__(self, pages: int, budget: int) -> None:
        self.total, self.budget = pages, budget
        self.pages: dict[str, int] = {}
        self.order: list[str] = []  # used first first
        self.aside: list[str] = []  # held ones that a search has met
        self.held: set[str] = set()
        self.pinned: set[str] = set()
        self.pins: list[str] = []  # pinned users with pages, used first first
        self.covered: list[str] = []
        self.window: list[str] = []
        self.busy = ""

    def batch(self, user: str, pages: int) -> None:
        self.busy = user
        self.shield(user)
        if user in self.pages:
            self._to_newest(user)
            self._use_pin(user)
        while (short := pages - self.pages.get(user, 0) - self._free()) > 0 and (victim := self._victim()):
            self._cut(victim, min(short, self.pages[victim]))
        room = min(pages, self.pages.get(user, 0) + self._free())
        if room:
            if user not in self.pages:
                self.order.append(user)
            self.pages[user] = room
            self._use_pin(user)
        self.busy = ""
        self.shield(user)

    def pin(self, users: list[str]) -> int:
        before = len(self.pinned)
        for user in users:
            self.pinned.add(user)
            self._use_pin(user)
        return len(self.pinned) - before

    def unpin(self, users: list[str]) -> int:
        before = len(self.pinned)
        for user in users:
            if user in self.pinned:
                self.pinned.remove(user)
                self._drop_pin(user)
                self.shield(user)
        return before - len(self.pinned)

    def set_window(self, users: list[str]) -> None:
        before, self.window = self.window, list(dict.fromkeys(users))
        for user in before + self.window:
            self.shield(user)

    def invalidate(self, user: str) -> None:
        if user in self.pages:
            self._cut(user, self.pages[user])

    def shield(self, user: str) -> None:
        held = user in self.pages and user != self.busy and (user in self.window or user in self.covered)
        if not held and user in self.aside:
            self.aside.remove(user)
            self.order.insert(0, user)
        (self.held.add if held else self.held.discard)(user)

    def _free(self) -> int:
        return self.total - sum(self.pages.values())

    def _to_newest(self, user: str) -> None:
        (self.aside if user in self.aside else self.order).remove(user)
        self.order.append(user)

    def _victim(self) -> str | None:
        for user in list(self.order):
            if user in self.held:
                self.order.remove(user)
                self.aside.append(user)
            elif user != self.busy:
                return user
        pinned = [user for user in self.covered if user not in self.window]
        late = [user for user in reversed(self.window) if user in self.pages]
        return next((user for user in pinned + late if user != self.busy), None)

    def _cut(self, user: str, pages: int) -> None:
        self.pages[user] -= pages
        if self.pages[user]:
            self._cover()
            return
        del self.pages[user]
        (self.aside if user in self.aside else self.order).remove(user)
        self.held.discard(user)
        self._drop_pin(user)

    def _use_pin(self, user: str) -> None:
        if user in self.pinned and user in self.pages:
            if user in self.pins:
                self.pins.remove(user)
            self.pins.append(user)
            self._cover()

    def _drop_pin(self, user: str) -> None:
        if user in self.pins:
            self.pins.remove(user)
        self._cover()

    def _cover(self) -> None:
        """The latest of the pins that fit the budget together."""
        before, self.covered, room = self.covered, [], self.budget
        for user in reversed(self.pins):
            room -= self.pages[user]
            if room < 0:
                break
            self.covered.insert(0, user)
        for user in [*before, *reversed(self.covered)]:
            self.shield(user)
