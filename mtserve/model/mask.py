"""Visibility: which token of a user's sequence sees which.

Tokens are U, then S, then R, then the candidates. Every visible set is a prefix of U + S + R
(plus oneself, for a candidate), because times never decrease along R. So one integer a row
says it all, and kernels need no mask: `visible_limits` is that integer, `visible` the
definition in words, and a test draws both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Groups:
    """Lengths of the token groups of one sequence; they sum to the `prefix`. `frozen`: tokens of the generation, U + S."""

    user: int
    static: int
    realtime: int
    frozen: int = field(init=False)
    prefix: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", self.user + self.static)
        object.__setattr__(self, "prefix", self.user + self.static + self.realtime)


def visible(groups: Groups, static_attention: str, i: int, j: int, seen_realtime: int | None = None) -> bool:
    """Whether token i sees token j. For a candidate, `seen_realtime` R rows happened before its exposure."""
    if i >= groups.prefix:
        assert seen_realtime is not None
        return j == i or j < groups.frozen + seen_realtime
    if i < groups.frozen and static_attention == "full":
        return j < groups.frozen
    return j <= i


def visibility(groups: Groups, static_attention: str, seen_realtime: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """bool [tokens, tokens] picture of `visible`: U, S, R, then one candidate an entry of `seen_realtime`."""
    tokens = groups.prefix + len(seen_realtime)
    i, j = np.ogrid[:tokens, :tokens]
    picture: npt.NDArray[np.bool_] = j <= i
    if static_attention == "full":
        picture[: groups.frozen] = j < groups.frozen
    candidates = i[groups.prefix :]
    picture[groups.prefix :] = (j == candidates) | (j < groups.frozen + seen_realtime[:, None])
    return picture


def visible_limits(groups: Groups, static_attention: str, first: int, last: int) -> npt.NDArray[np.int32]:
    """int32 [last - first]: prefix token i in [first, last) sees tokens [0, limit)."""
    return token_limits(np.arange(first, last), groups.frozen, static_attention)


def token_limits(
    tokens: npt.NDArray[np.int64], frozen: int | npt.NDArray[np.int64], static_attention: str
) -> npt.NDArray[np.int32]:
    """int32 [n]: prefix token tokens[i] sees [0, limit); `frozen`: tokens of U + S, of all or of each one's own user."""
    limits = tokens + 1
    if static_attention == "full":
        limits = np.where(tokens < frozen, frozen, limits)
    return limits.astype(np.int32)


def candidate_limits(
    groups: Groups, realtime_ms: npt.NDArray[np.int64], exposure_ms: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """int32 [candidates]: prefix tokens each candidate sees: U, S and the R rows strictly before its exposure.

    `realtime_ms` int64 [realtime], never decreasing; `exposure_ms` int64 [candidates].
    """
    assert len(realtime_ms) == groups.realtime
    return (groups.frozen + np.searchsorted(realtime_ms, exposure_ms, side="left")).astype(np.int32)
