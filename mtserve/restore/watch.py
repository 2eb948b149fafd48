"""Whether batches that restored states took as long as they were predicted to."""

from __future__ import annotations

import logging
from collections import Counter, deque
from statistics import median
from typing import Any, NamedTuple

from mtserve.restore.choice import LOAD, RECOMPUTE, SPLIT

log = logging.getLogger(__name__)

WINDOW = 256
# Batches of a way, from which it is learned what the model leaves out. Those that the window has lost do not count: a
# way whose few batches were slow (the first, which compile) is tried again.
RECENT = 16


class _Sample(NamedTuple):
    predicted_s: float
    actual_s: float
    way: str
    offset_s: float

    @property
    def error(self) -> float:
        return abs(self.predicted_s - self.actual_s) / self.actual_s

    @property
    def beyond_s(self) -> float:
        """What it took beyond the model."""
        return self.actual_s - self.predicted_s + self.offset_s


class PredictionWatch:
    """Predicted and actual seconds of the last `window` batches that restored states. One thread notes, any reads."""

    def __init__(self, window: int = WINDOW) -> None:
        self._samples: deque[_Sample] = deque(maxlen=window)
        self.offsets: dict[str, float] = {}

    def note(self, predicted_s: float, actual_s: float, way: str, offset_s: float = 0.0) -> None:
        """A batch took `actual_s`; one that took no time by the clock says nothing. `offset_s`: part of the prediction
        that was learned here before.
        """
        if actual_s <= 0:
            return
        sample = _Sample(predicted_s, actual_s, way, offset_s)
        self._samples.append(sample)
        self._learn()
        log.debug(
            "%s: predicted %.3f ms, took %.3f ms, off by %.0f%%",
            way, predicted_s * 1e3, actual_s * 1e3, sample.error * 100,
        )  # fmt: skip

    def _learn(self) -> None:
        """`offsets`: seconds to add to the model of each way; to ways not seen of late, what the others take in the median.

        What batches take beside the layers is much the same whichever way their states come.
        """
        beyond: dict[str, list[float]] = {}
        for sample in reversed(self._samples):
            values = beyond.setdefault(sample.way, [])
            if len(values) < RECENT:
                values.append(sample.beyond_s)
        known = {way: median(values) for way, values in beyond.items()}
        self.offsets = {**dict.fromkeys((LOAD, SPLIT, RECOMPUTE), median(known.values())), **known}

    def error(self) -> float | None:
        """Median of |predicted - actual| / actual over the window; None where it is empty."""
        return _median([sample.error for sample in tuple(self._samples)])

    def stats(self) -> dict[str, Any]:
        """JSON-able, of the window: `batches`, and `by_way` how many each; `error` as above; `actual_over_predicted`:
        median of the quotient, above 1 where batches take longer than predicted. None where there were none.
        """
        samples = tuple(self._samples)
        quotients = [sample.actual_s / sample.predicted_s for sample in samples if sample.predicted_s > 0]
        return {
            "batches": len(samples),
            "by_way": dict(Counter(sample.way for sample in samples)),
            "error": _median([sample.error for sample in samples]),
            "actual_over_predicted": _median(quotients),
        }


def _median(values: list[float]) -> float | None:
    return median(values) if values else None
