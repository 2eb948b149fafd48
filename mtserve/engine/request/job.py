"""One request on its way through the engine."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mtserve import _core
from mtserve.engine.request.sequence import UserSequence
from mtserve.model.mask import Groups, candidate_limits
from mtserve.model.tokeniser import GAP_THRESHOLDS_MS
from mtserve.types import Rows, ScoreResult

# A search by numpy gives the interpreter's lock away, and may have to wait for it.
_GAPS = _core._GapBuckets(GAP_THRESHOLDS_MS)


@dataclass(eq=False)
class Job:
    """A request with all that scoring it needs; without candidates it only brings states onto the device.

    `limits`: prefix tokens that each candidate sees. `recency`: its exposure minus the last visible behaviour's time.
    `begun`: a batch with it was begun, which the cache's policies count as a use of the user.
    `found_gpu`, `found_host`: prefix tokens found in each tier, fixed when its first tokens are encoded.
    `loads`: onloads started for it; `loaded_from`: device tokens there before the first, -1 for none that succeeded.
    `overtaken`: batches with later arrivals that began while it waited.
    `replaces`: the generation that this one ended; without states of that, encoding is not worth it.
    """

    sequence: UserSequence
    candidates: Rows  # exposure times resolved, C-contiguous
    limits: npt.NDArray[np.int32]
    recency: npt.NDArray[np.int32]  # buckets
    future: Future[ScoreResult]
    arrived: float
    deadline: float | None = None
    begun: bool = False
    found_gpu: int = -1
    found_host: int = 0
    loads: int = 0
    loaded_from: int = -1
    passed_over: int = 0
    overtaken: int = 0
    replaces: UserSequence | None = None
    user_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.user_id = self.sequence.user_id

    @property
    def prefetch(self) -> bool:
        """Whether it only brings states: nobody waits for its scores."""
        return len(self.candidates) == 0

    @property
    def prefix(self) -> int:
        return self.sequence.groups.prefix

    def found(self, cached: int) -> None:
        """Record where its prefix was found, once: `cached` tokens are on the device now."""
        if self.found_gpu >= 0:
            return
        cached = min(cached, self.prefix)
        self.found_host = max(0, cached - self.loaded_from) if self.loaded_from >= 0 else 0
        self.found_gpu = cached - self.found_host

    def resolve(self, result: ScoreResult) -> bool:
        """Answer; False when the caller has cancelled meanwhile."""
        try:
            self.future.set_result(result)
        except InvalidStateError:
            return False
        return True

    def fail(self, error: BaseException) -> bool:
        """Answer with an error; False when the caller has cancelled meanwhile."""
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            return False
        return True


def make_job(
    sequence: UserSequence, candidates: Rows, future: Future[ScoreResult], now: float, deadline: float | None
) -> Job:
    """A job whose unset exposure times (-1) become "now", after every behaviour known."""
    candidates = np.ascontiguousarray(candidates)
    times, exposure = sequence.kept["time_ms"], candidates["time_ms"]
    last = int(times[-1]) if len(times) else -1
    unset = exposure < 0
    if unset.any():
        candidates = candidates.copy()
        candidates["time_ms"][unset] = max(int(now * 1000), last + 1)
        exposure = candidates["time_ms"]
    limits, recency = _visible(sequence.groups, times, last, exposure)
    buckets = np.empty(len(recency), dtype=np.int32)
    _GAPS.find(recency, buckets)
    return Job(sequence, candidates, limits, buckets, future, now, deadline)


def _visible(
    groups: Groups, times: npt.NDArray[np.int64], last: int, exposure: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Each candidate's limit, and ms from the last behaviour that it sees to its exposure (0 when it sees none)."""
    if len(exposure) and int(exposure.min()) > last:
        # All see all, as when scoring is live. A search would first copy the times out of their rows.
        recency = exposure - last if len(times) else np.zeros(len(exposure), np.int64)
        return np.full(len(exposure), groups.prefix, np.int32), recency
    limits = candidate_limits(groups, times[groups.static :], exposure)
    seen = limits - groups.user
    recency = np.where(seen > 0, exposure - times[seen - 1], 0) if len(times) else np.zeros(len(exposure), np.int64)
    return limits, recency
