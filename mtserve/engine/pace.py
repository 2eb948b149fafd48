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
        # (batch, when it landed, seconds a token), rates rising: one that a later one undercuts is of no use.
        self._samples: deque[tuple[int, float, float]] = deque()
        self._batches = 0
        self._last_landed = float("-inf")

    def landed(self, began: float, now: float, tokens: int) -> None:
        """Note a batch of `tokens` rows. Where batches overlap, its time counts from the landing before it."""
        if tokens:
            rate = max(0.0, now - max(began, self._last_landed)) / tokens
            while self._samples and self._samples[-1][2] >= rate:
                self._samples.pop()
            self._batches += 1
            self._samples.append((self._batches, now, rate))
        self._last_landed = now

    def token_s(self, now: float) -> float:
        """The best recent rate, a lower bound of what a token takes; 0 where nothing is known."""
        samples = self._samples
        while samples and (samples[0][0] <= self._batches - SAMPLES or now - samples[0][1] > BELIEVED_S):
            samples.popleft()
        return samples[0][2] if samples else 0.0
