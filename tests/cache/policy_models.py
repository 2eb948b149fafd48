"""The replacement policies once more, plainly: lists, oldest first, and dicts. What the C++ core is compared with."""

from __future__ import annotations

from collections.abc import Collection

MASK = 2**64 - 1


class Model:
    """What all share: pages and key of every listed slot, the most pages since its last use, and the time of the call."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pages: dict[int, int] = {}
        self.keys: dict[int, int] = {}
        self.most: dict[int, int] = {}
        self.cost = 1.0  # of the entry inserted last
        self.now = 0.0

    def insert(self, slot: int, key: int, pages: int, now: float = 0.0, cost: float = 1.0) -> None:
        self.pages[slot], self.keys[slot], self.most[slot] = pages, key, pages
        self.now, self.cost = now, cost
        self.inserted(slot)

    def access(self, slot: int, now: float = 0.0) -> None:
        self.most[slot] = self.pages[slot]
        self.now = now
        self.accessed(slot)

    def refresh(self, slot: int, now: float = 0.0) -> None:
        self.now = now
        self.refreshed(slot)

    def victim(self, pinned: Collection[int] = (), now: float = 0.0) -> int | None:
        self.now = now
        return self.choose(pinned)

    def resize(self, slot: int, pages: int) -> None:
        self.pages[slot] = pages
        self.most[slot] = max(self.most[slot], pages)
        self.resized(slot)

    def remove(self, slot: int, evicted: bool) -> None:
        self.removed(slot, evicted)
        del self.pages[slot], self.keys[slot], self.most[slot]

    def grow(self, pages: int) -> None:
        self.capacity += pages

    def weigh(self, slots: Collection[int]) -> int:
        return sum(self.pages[slot] for slot in slots)

    def inserted(self, slot: int) -> None: ...
    def accessed(self, slot: int) -> None: ...
    def refreshed(self, slot: int) -> None: ...
    def choose(self, pinned: Collection[int]) -> int | None: ...
    def resized(self, slot: int) -> None: ...
    def removed(self, slot: int, evicted: bool) -> None: ...


def renew(queue: list[int], slot: int) -> None:
    queue.remove(slot)
    queue.append(slot)


def first(queue: list[int], pinned: Collection[int]) -> int | None:
    return next((slot for slot in queue if slot not in pinned), None)


class Lru(Model):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queue: list[int] = []

    def inserted(self, slot: int) -> None:
        self.queue.append(slot)

    def accessed(self, slot: int) -> None:
        renew(self.queue, slot)

    refreshed = accessed

    def removed(self, slot: int, evicted: bool) -> None:
        self.queue.remove(slot)

    def choose(self, pinned: Collection[int]) -> int | None:
        return first(self.queue, pinned)


class Sieve(Model):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queue: list[int] = []
        self.visited: set[int] = set()
        self.hand = 0  # a place in the queue

    def inserted(self, slot: int) -> None:
        self.queue.append(slot)

    def accessed(self, slot: int) -> None:
        self.visited.add(slot)

    def removed(self, slot: int, evicted: bool) -> None:
        place = self.queue.index(slot)
        del self.queue[place]
        self.visited.discard(slot)
        self.hand -= place < self.hand
        if self.hand == len(self.queue):
            self.hand = 0

    def choose(self, pinned: Collection[int]) -> int | None:
        if set(self.queue) <= set(pinned):
            return None
        while True:
            slot = self.queue[self.hand]
            if slot not in pinned:
                if slot not in self.visited:
                    return slot
                self.visited.remove(slot)
            self.hand = (self.hand + 1) % len(self.queue)


class S3Fifo(Model):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.small: list[int] = []
        self.main: list[int] = []
        self.uses: dict[int, int] = {}
        self.ghosts: dict[int, int] = {}  # pages by key

    def inserted(self, slot: int) -> None:
        self.uses[slot] = 0
        (self.small if self.ghosts.pop(self.keys[slot], None) is None else self.main).append(slot)

    def accessed(self, slot: int) -> None:
        self.uses[slot] = min(3, self.uses[slot] + 1)

    def removed(self, slot: int, evicted: bool) -> None:
        if slot in self.main:
            self.main.remove(slot)
            return
        self.small.remove(slot)
        if evicted:
            self.ghosts.pop(self.keys[slot], None)
            self.ghosts[self.keys[slot]] = self.most[slot]
            while sum(self.ghosts.values()) > self.capacity - self.capacity // 10:
                del self.ghosts[next(iter(self.ghosts))]

    def choose(self, pinned: Collection[int]) -> int | None:
        while self.weigh(self.small) * 10 >= self.capacity and first(self.small, pinned) is not None:
            slot = first(self.small, pinned)
            if self.uses[slot] < 2:
                return slot
            self.small.remove(slot)
            self.main.append(slot)
            self.uses[slot] = 0
        while (slot := first(self.main, pinned)) is not None:
            if self.uses[slot] == 0:
                return slot
            self.uses[slot] -= 1
            renew(self.main, slot)
        return first(self.small, pinned)


class Arc(Model):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.lists: tuple[list[int], list[int]] = ([], [])
        self.ghosts: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.target = 0.0

    def inserted(self, slot: int) -> None:
        once, again = (sum(ghosts.values()) for ghosts in self.ghosts)
        key, pages = self.keys[slot], self.pages[slot]
        known = True
        if self.ghosts[0].pop(key, None):
            self.target = min(self.capacity, self.target + max(1.0, again / max(1, once)) * pages)
        elif self.ghosts[1].pop(key, None):
            self.target = max(0.0, self.target - max(1.0, 1 / (again / max(1, once))) * pages)
        else:
            known = False
        self.lists[known].append(slot)
        self.trim()

    def accessed(self, slot: int) -> None:
        self.lists[slot in self.lists[1]].remove(slot)
        self.lists[1].append(slot)

    def refreshed(self, slot: int) -> None:
        renew(self.lists[slot in self.lists[1]], slot)

    def resized(self, slot: int) -> None:
        self.trim()

    def removed(self, slot: int, evicted: bool) -> None:
        which = slot in self.lists[1]
        self.lists[which].remove(slot)
        if evicted:
            self.ghosts[which].pop(self.keys[slot], None)
            self.ghosts[which][self.keys[slot]] = self.most[slot]
            self.trim()

    def trim(self) -> None:
        listed = [self.weigh(queue) for queue in self.lists]
        once, again = self.ghosts
        while once and sum(once.values()) + listed[0] > self.capacity:
            del once[next(iter(once))]
        while again and sum(once.values()) + sum(again.values()) + sum(listed) > 2 * self.capacity:
            del again[next(iter(again))]

    def choose(self, pinned: Collection[int]) -> int | None:
        order = self.lists if self.weigh(self.lists[0]) > self.target else self.lists[::-1]
        slots = [first(queue, pinned) for queue in order]
        return slots[1] if slots[0] is None else slots[0]


class Gdsf(Model):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.clock = 0.0
        self.turn = 0
        self.uses: dict[int, int] = {}
        self.last: dict[int, tuple[float, int]] = {}  # clock and number of the last use

    def inserted(self, slot: int) -> None:
        self.uses[slot] = 1
        self.refreshed(slot)

    def accessed(self, slot: int) -> None:
        self.uses[slot] += 1
        self.refreshed(slot)

    def refreshed(self, slot: int) -> None:
        self.turn += 1
        self.last[slot] = self.clock, self.turn

    def priority(self, slot: int) -> tuple[float, int]:
        clock, turn = self.last[slot]
        cost = self.pages[slot] + self.pages[slot] ** 2 / 64
        return clock + self.uses[slot] * cost / self.pages[slot], turn

    def removed(self, slot: int, evicted: bool) -> None:
        if evicted:
            self.clock = max(self.clock, self.priority(slot)[0])

    def choose(self, pinned: Collection[int]) -> int | None:
        return min((slot for slot in self.pages if slot not in pinned), key=self.priority, default=None)


class WTinyLfu(Model):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.window: list[int] = []
        self.probation: list[int] = []
        self.protected: list[int] = []
        self.counters: dict[tuple[int, ...], int] = {}
        self.uses = 0
        self.made_room = False

    @property
    def window_share(self) -> int:
        return max(1, self.capacity // 100)

    def places(self, key: int) -> list[tuple[int, ...]]:
        """The key's counters: block, row and place in the row. Blocks are twice as many as long as they are too few."""
        mixed = key * 0x9E3779B97F4A7C15 & MASK
        mixed ^= mixed >> 32
        bits = (mixed * 0xC2B2AE3D27D4EB4F & MASK) >> 44
        return [(mixed % self.blocks, row, bits >> 5 * row & 31) for row in range(4)]

    @property
    def blocks(self) -> int:
        blocks = 1
        while blocks * 16 < self.capacity:
            blocks *= 2
        return blocks

    def grow(self, pages: int) -> None:
        before = self.blocks
        super().grow(pages)
        self.made_room = False
        old = self.counters
        self.counters = {
            (block, *place): count
            for (first_block, *place), count in old.items()
            for block in range(first_block, self.blocks, before)
        }

    def count(self, slot: int) -> None:
        for place in self.places(self.keys[slot]):
            self.counters[place] = min(15, self.counters.get(place, 0) + 1)
        self.uses += 1
        if self.uses >= 10 * max(16, len(self.window) + len(self.probation) + len(self.protected)):
            self.counters = {place: count // 2 for place, count in self.counters.items()}
            self.uses = 0

    def frequency(self, slot: int) -> int:
        return min(self.counters.get(place, 0) for place in self.places(self.keys[slot]))

    def inserted(self, slot: int) -> None:
        self.count(slot)
        self.window.append(slot)
        while self.weigh(self.window) > self.window_share and not self.made_room:
            main = self.weigh(self.probation) + self.weigh(self.protected)
            if main + self.pages[self.window[0]] > self.capacity - self.window_share:
                break
            self.probation.append(self.window.pop(0))
        self.made_room = False

    def accessed(self, slot: int) -> None:
        self.count(slot)
        if slot not in self.probation:
            self.refreshed(slot)
            return
        self.probation.remove(slot)
        self.protected.append(slot)
        while self.weigh(self.protected) > (self.capacity - self.window_share) * 4 // 5:
            self.probation.append(self.protected.pop(0))

    def queue_of(self, slot: int) -> list[int]:
        return next(queue for queue in (self.window, self.probation, self.protected) if slot in queue)

    def refreshed(self, slot: int) -> None:
        renew(self.queue_of(slot), slot)

    def removed(self, slot: int, evicted: bool) -> None:
        self.queue_of(slot).remove(slot)

    def choose(self, pinned: Collection[int]) -> int | None:
        self.made_room = True
        entering, leaving = first(self.window, pinned), first(self.probation + self.protected, pinned)
        if leaving is None:
            return entering
        if self.weigh(self.window) <= self.window_share or entering is None:
            return leaving
        if self.frequency(entering) <= self.frequency(leaving):
            return entering
        self.window.remove(entering)
        self.probation.append(entering)
        return leaving
