"""How fast batches go, for judging what cannot meet its deadline any more."""

from __future__ import annotations

from collections import deque

SAMPLES = 32
# A sample is believed for so long. One slow batch (the first, which compiles) must not make every later request
# look hopeless: with nothing left to run, nothing would ever correct it.
BELIEVED_S = 1.0


class Pace:
    """Seconds a token of the batches that landed lately. Times are seconds of the engine's clock."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=SAMPLES)  # when it landed, seconds a token
        self._last_landed = float("-inf")

    def landed(self, began: float, now: float, tokens: int) -> None:
        """Note a batch of `tokens` rows. Where batches overlap, its time counts from the landing before it."""
        if tokens:
            self._samples.append((now, max(0.0, now - max(began, self._last_landed)) / tokens))
        self._last_landed = now

    def token_s(self, now: float) -> float:
        """The best recent rate, a lower bound of what a token takes; 0 where nothing is known."""
        return min((rate for at, rate in self._samples if now - at <= BELIEVED_S), default=0.0)
