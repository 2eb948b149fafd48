"""Whether tokens are better encoded in a batch that runs anyway than spared by a request that waits for another batch."""

from __future__ import annotations

from mtserve.engine.queue.pace import Pace
from mtserve.engine.request.sequence import UserSequence
from mtserve.restore.choice import user_work
from mtserve.restore.costs import Costs


class Passing:
    """Compares the two in seconds.

    A request that waits takes part in one batch more than it would have needed to, and so costs its share of what a batch
    costs however small it is. The tokens themselves cost what they lengthen the batch by: as calibrated, where that is
    known; where it is not, as batches of late were longer for more tokens.
    """

    def __init__(self, pace: Pace, layers: int) -> None:
        self._pace, self._layers = pace, layers
        self._costs: Costs | None = None
        self._frozen_sees_all = False

    def know(self, costs: Costs, *, frozen_sees_all: bool) -> None:
        """`costs` of this machine; `frozen_sees_all`: whether U and S rows see one another."""
        self._costs, self._frozen_sees_all = costs, frozen_sees_all

    def cheaper(self, sequence: UserSequence, first: int, last: int, *, users: int, token_s: float) -> bool:
        """Whether to encode tokens [first, last) of `sequence` rather than have it wait for a batch of `users` users.

        `token_s`: seconds a token of the best batch of late, 0 where nothing is known.
        """
        return self._longer_s(sequence, first, last, token_s) < self._batch_s() / max(1, users)

    def _batch_s(self) -> float:
        """What a batch takes however small it is: as of late, and at least what was calibrated."""
        known_s = 0.0 if self._costs is None else self._costs.batch_s + self._layers * self._costs.layer_s
        return max(known_s, self._pace.line().batch_s)

    def _longer_s(self, sequence: UserSequence, first: int, last: int, token_s: float) -> float:
        costs = self._costs
        if costs is None:
            line = self._pace.line()
            # Of larger batches than were seen, a line through small ones says nothing.
            return (last - first) * (line.token_s if last - first <= line.known_tokens else token_s)
        rows, pairs = user_work(first, last, 0, sequence.groups.frozen if self._frozen_sees_all else 0)
        return rows * costs.plan_row_s + self._layers * (rows * costs.row_s + pairs * costs.pair_s)
