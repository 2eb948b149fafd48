"""Traces made from traces: sessions drawn by pauses, early requests folded into history."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.errors import InvalidArgument
from mtserve.trace.csr import offsets_of, rank_in_group
from mtserve.trace.schema import Ints, SmallInts, Trace

SESSION_GAP_MS = 30 * 60 * 1000


def sessions_by_gap(user: SmallInts, t_ms: Ints, gap_ms: int) -> Ints:
    """[N] session numbers from 1: a user's pause of `gap_ms` or more starts one. `t_ms` never decreases."""
    order = np.argsort(user, kind="stable")
    ranks = rank_in_group(user[order])
    starts = (ranks == 0) | (np.diff(t_ms[order], prepend=0) >= gap_ms)
    session = np.empty(len(order), dtype=np.int64)
    session[order] = np.cumsum(starts)
    return session


def fold_history(trace: Trace, share: float) -> Trace:
    """The first `share` (0 to 1) of each user's requests turned into history: their clicks stay, the requests go.

    A user with n requests loses floor(share * n) of them.
    """
    if not 0 <= share <= 1:
        raise InvalidArgument(f"{share} is outside 0 to 1", field="history_share")
    order = np.argsort(trace.user, kind="stable")
    counts = np.bincount(trace.user, minlength=trace.users)
    folded = np.empty(trace.requests, dtype=np.bool_)
    folded[order] = rank_in_group(trace.user[order]) < np.floor(share * counts)[trace.user[order]]
    return replace(_folded_history(trace, folded), **_kept_requests(trace, ~folded))


def _folded_history(trace: Trace, folded: npt.NDArray[np.bool_]) -> Trace:
    clicks = np.repeat(folded, trace.clicked_lengths)
    user = np.repeat(trace.user, trace.clicked_lengths)[clicks]
    owner = np.concatenate([np.repeat(np.arange(trace.users, dtype=np.int32), trace.history_lengths), user])
    order = np.argsort(owner, kind="stable")
    times = np.concatenate([trace.history_t_ms, np.repeat(trace.t_ms, trace.clicked_lengths)[clicks]])
    history: dict[str, Any] = {
        "history_offsets": offsets_of(np.bincount(owner, minlength=trace.users)),
        "history_items": np.concatenate([trace.history_items, trace.clicked_items[clicks]])[order],
        "history_t_ms": times[order],
        "history_actions": np.concatenate([trace.history_actions, trace.clicked_actions[clicks]])[order],
    }
    # Without its requests, so that no intermediate value has a request before its user's history.
    return replace(trace.first(0), **history)


def _kept_requests(trace: Trace, kept: npt.NDArray[np.bool_]) -> dict[str, Any]:
    clicks = np.repeat(kept, trace.clicked_lengths)
    return {
        "user": trace.user[kept],
        "t_ms": trace.t_ms[kept],
        "session": trace.session[kept],
        "cand_offsets": offsets_of(trace.cand_lengths[kept]),
        "cand_items": trace.cand_items[np.repeat(kept, trace.cand_lengths)],
        "clicked_offsets": offsets_of(trace.clicked_lengths[kept]),
        "clicked_items": trace.clicked_items[clicks],
        "clicked_actions": trace.clicked_actions[clicks],
    }
