"""What the loop's thread spends its time on."""

from __future__ import annotations

import time

PHASES = ("outside", "copies", "planning", "device", "answers", "idle")


class Stopwatch:
    """Seconds by phase; a lap ends what went on since the lap before it.

    `outside`: between steps, mostly admitting requests; `copies`: index and mover, both ways; `planning`: choosing,
    laying out and launching batches; `device`: waiting for a batch; `answers`: publishing and answering; `idle`: asleep.
    `batch_s`: seconds in which any batch was under way.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.batch_s = 0.0
        self._since = time.perf_counter()
        self._batches_to = 0.0

    def lap(self, phase: str) -> float:
        """Book what went on since the last lap; the time now."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._since
        self._since = now
        return now

    def landed(self, began: float, now: float) -> None:
        """A batch launched at `began` has ended; times as told by `lap`. Where batches overlap, that counts once."""
        self.batch_s += max(0.0, now - max(began, self._batches_to))
        self._batches_to = now
