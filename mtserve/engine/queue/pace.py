"""How fast batches go: for judging what cannot meet its deadline any more, and what is better done in company."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

SAMPLES = 32
# A sample is believed for so long. One slow batch (the first, which compiles) must not make every later request
# look hopeless: with nothing left to run, nothing would ever correct it.
BELIEVED_S = 1.0
# Batches through which a line is drawn, at most, and at least in each of the outer thirds.
LINE_SAMPLES, FEWEST_OF_THIRD = 128, 3
# The line is drawn again once a share of its batches is new: sorting them takes as long as planning one.
NEW_SHARE = 1 / 8


class Line(NamedTuple):
    """Seconds of a batch by its tokens: `batch_s` however few they are and `token_s` for each, up to about `known_tokens`.

    Zeros where batches were too few or too much alike to tell.
    """

    batch_s: float = 0.0
    token_s: float = 0.0
    known_tokens: float = 0.0


class Pace:
    """What the batches that landed lately took. Times are seconds of the engine's clock."""

    def __init__(self) -> None:
        # (batch, when it landed, seconds a token), rates rising: one that a later one undercuts is of no use.
        self._samples: deque[tuple[int, float, float]] = deque()
        self._batches = 0
        self._last_landed = float("-inf")
        self._sizes: deque[tuple[int, float]] = deque(maxlen=LINE_SAMPLES)  # tokens and seconds
        self._line, self._line_until = Line(), 0  # through these, as good as new before so many batches

    def landed(self, began: float, now: float, tokens: int) -> None:
        """Note a batch of `tokens` rows. Where batches overlap, its time counts from the landing before it."""
        if tokens:
            seconds = max(0.0, now - max(began, self._last_landed))
            rate = seconds / tokens
            while self._samples and self._samples[-1][2] >= rate:
                self._samples.pop()
            self._batches += 1
            self._samples.append((self._batches, now, rate))
            self._sizes.append((tokens, seconds))
        self._last_landed = now

    def token_s(self, now: float) -> float:
        """The best recent rate, a lower bound of what a token takes; 0 where nothing is known."""
        samples = self._samples
        while samples and (samples[0][0] <= self._batches - SAMPLES or now - samples[0][1] > BELIEVED_S):
            samples.popleft()
        return samples[0][2] if samples else 0.0

    def line(self) -> Line:
        """What batches of late took by their tokens."""
        if self._batches >= self._line_until:
            self._line = resistant_line(self._sizes)
            self._line_until = self._batches + max(1, int(NEW_SHARE * len(self._sizes)))
        return self._line


def resistant_line(samples: Sequence[tuple[int, float]]) -> Line:
    """The line of (tokens, seconds) through the medians of the outer thirds (Tukey, Exploratory Data Analysis, 1977), as some
    batches take many times what is theirs: those that are captured, say. It is known up to the upper of these medians.
    """
    third = len(samples) // 3
    if third < FEWEST_OF_THIRD:
        return Line()
    ordered = sorted(samples)
    (left, left_s), (right, right_s) = (
        (median(tokens for tokens, _ in part), median(seconds for _, seconds in part))
        for part in (ordered[:third], ordered[-third:])
    )
    if left == right:
        return Line()
    slope = max(0.0, (right_s - left_s) / (right - left))
    return Line(max(0.0, median(seconds - slope * tokens for tokens, seconds in ordered)), slope, right)
