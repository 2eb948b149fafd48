"""From a request to its job, or to the error that says why there is none."""

from __future__ import annotations

from concurrent.futures import Future

from mtserve.config import EngineConfig
from mtserve.engine.checks import check_request
from mtserve.engine.request.job import Job, make_job
from mtserve.engine.request.sequence import UserSequence
from mtserve.engine.request.sequences import SequenceCache
from mtserve.errors import DeadlineExceeded, InvalidArgument, MtserveError, NotFound, ResourceExhausted, Unavailable
from mtserve.metrics import Metrics
from mtserve.model.schema import FeatureSchema
from mtserve.types import Clock, Request

REASONS = {
    ResourceExhausted: "queue_full",
    InvalidArgument: "invalid",
    NotFound: "not_found",
    Unavailable: "draining",
}
"""What `rejected_total` calls each error; a deadline that has passed is counted by itself."""


class Admission:
    """Makes jobs in the callers' threads, of histories as they stand then, and counts who was refused."""

    def __init__(
        self, config: EngineConfig, metrics: Metrics, clock: Clock, sequences: SequenceCache, schema: FeatureSchema
    ) -> None:
        self._config, self._metrics, self._clock = config, metrics, clock
        self._sequences, self._schema = sequences, schema

    def job(self, request: Request, *, waiting: int) -> Job:
        """Of `request`, while `waiting` others wait for a batch.

        Raises ResourceExhausted (too many wait), InvalidArgument, DeadlineExceeded (already past) and NotFound (no such
        user, no history sent).
        """
        if waiting >= self._config.max_queue:
            raise ResourceExhausted(
                f"{waiting} requests are waiting, max_queue is {self._config.max_queue}", field="queue"
            )
        check_request(request, self._schema, self._config.max_candidates)
        now, deadline = self._clock(), request.deadline
        if deadline is None and self._config.default_deadline_ms:
            deadline = now + self._config.default_deadline_ms / 1000
        if deadline is not None and deadline <= now:
            raise DeadlineExceeded(f"passed {(now - deadline) * 1000:.0f} ms before the request came", field="deadline")
        return make_job(self._sequence(request), request.candidates, Future(), now, deadline)

    def _sequence(self, request: Request) -> UserSequence:
        if request.history is None:
            return self._sequences.get(request.user_id)
        return self._sequences.builder.build(request.user_id, request.history)

    def refused(self, error: MtserveError) -> None:
        """Count what was raised instead of a job."""
        if isinstance(error, DeadlineExceeded):
            self._metrics.count("deadline_exceeded_total")
        elif type(error) in REASONS:
            self._metrics.count("rejected_total", 1, REASONS[type(error)])
