"""A trace without its rows: who asks when, for how many candidates, and how the histories grow."""

from __future__ import annotations

from dataclasses import dataclass

from mtserve.trace.csr import earlier_in_group
from mtserve.trace.schema import Ints, SmallInts


@dataclass(frozen=True, eq=False)
class Outline:
    """N requests of U users in order of time: all that a demand is made of, in 28 bytes a request.

    user: int32 [N]. t_ms: int64 [N], since the epoch. cand_lengths, clicked_lengths: int64 [N]. history_lengths: int64
    [U], behaviours before the trace.
    """

    user_ids: tuple[str, ...]
    user: SmallInts
    t_ms: Ints
    cand_lengths: Ints
    clicked_lengths: Ints
    history_lengths: Ints

    @property
    def users(self) -> int:
        """How many users there are, those without a request included."""
        return len(self.user_ids)

    def prefix_lengths(self) -> Ints:
        """[N] behaviours each request's user has at that request: the history and every earlier click."""
        return earlier_in_group(self.user, self.clicked_lengths) + self.history_lengths[self.user]
