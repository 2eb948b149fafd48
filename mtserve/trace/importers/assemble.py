"""From the rows of somebody's log to a valid trace: sorted, clamped, and every change counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.errors import InvalidArgument
from mtserve.trace.csr import gather, offsets_of
from mtserve.trace.reshape import sessions_by_gap
from mtserve.trace.schema import CLICK, Ints, SmallInts, Trace, TraceLimits, TraceMeta


def no_ints() -> Ints:
    return np.empty(0, dtype=np.int64)


@dataclass
class Draft:
    """A log's rows in the log's own order. Users are numbers into `user_ids`.

    history_*: flat, one entry a behaviour. user, t_ms: one entry a request, whose items are the
    next cand_lengths[i] of cand and clicked_lengths[i] of clicked. `actions` None: all clicks;
    `session` None: drawn by pauses. `changes` holds what the importer changed already.
    """

    user_ids: Sequence[str]
    user: Ints
    t_ms: Ints
    cand_lengths: Ints
    cand: Ints
    clicked_lengths: Ints
    clicked: Ints
    actions: Ints | None = None
    session: Ints | None = None
    history_user: Ints = field(default_factory=no_ints)
    history_t_ms: Ints = field(default_factory=no_ints)
    history_items: Ints = field(default_factory=no_ints)
    changes: dict[str, int] = field(default_factory=dict)


def number_users(ids: npt.NDArray[Any]) -> tuple[list[str], Ints]:
    """(distinct ids in ascending order as strings, number of each entry)."""
    distinct, numbers = np.unique(ids, return_inverse=True)
    return [str(value) for value in distinct.tolist()], numbers.astype(np.int64).reshape(-1)


def assemble(draft: Draft, meta: TraceMeta, session_gap_ms: int, limits: TraceLimits) -> Trace:
    """A valid trace of the draft; `meta.changes` counts, where not 0:

    requests_without_candidates: dropped; requests_out_of_order, history_out_of_order: sorted by
    time, ties keeping the log's order; history_after_request: moved back to the time of the
    user's first request; users_without_requests: left out with their histories.
    Raises InvalidArgument for negative times and for what passes `limits`.
    """
    changes = dict(draft.changes)
    _check_limits(draft, limits)
    kept = draft.cand_lengths > 0
    changes["requests_without_candidates"] = int((~kept).sum())
    changes["requests_out_of_order"] = int((np.diff(draft.t_ms) < 0).sum())
    order = np.argsort(draft.t_ms, kind="stable")
    order = order[kept[order]]
    numbers, inverse = np.unique(draft.user[order], return_inverse=True)
    changes["users_without_requests"] = len(draft.user_ids) - len(numbers)
    t_ms, user = draft.t_ms[order], inverse.astype(np.int32).reshape(-1)
    clicks = gather(offsets_of(draft.clicked_lengths), order)
    actions = np.full(len(clicks), CLICK, dtype=np.int32)
    if draft.actions is not None:
        actions = draft.actions[clicks].astype(np.int32)
    history = _history(draft, numbers, user, t_ms, changes)
    session = sessions_by_gap(user, t_ms, session_gap_ms) if draft.session is None else draft.session[order]
    return Trace(
        user_ids=tuple(draft.user_ids[number] for number in numbers.tolist()),
        **history,
        user=user, t_ms=t_ms, session=session,
        cand_offsets=offsets_of(draft.cand_lengths[order]),
        cand_items=draft.cand[gather(offsets_of(draft.cand_lengths), order)],
        clicked_offsets=offsets_of(draft.clicked_lengths[order]),
        clicked_items=draft.clicked[clicks], clicked_actions=actions,
        meta=_with_changes(meta, changes),
    )  # fmt: skip


def _check_limits(draft: Draft, limits: TraceLimits) -> None:
    longest = max(draft.cand_lengths.max(initial=0), draft.clicked_lengths.max(initial=0))
    history = np.bincount(draft.history_user).max(initial=0)
    for name, found in (("candidates", longest), ("history", history), ("requests", len(draft.t_ms)),
                        ("users", len(draft.user_ids))):  # fmt: skip
        if found > getattr(limits, name):
            raise InvalidArgument(f"{found} is above the limit of {getattr(limits, name)}", field=name)
    for name in ("t_ms", "history_t_ms"):
        if getattr(draft, name).min(initial=0) < 0:
            raise InvalidArgument("a time is before the epoch", field=name)


def _history(draft: Draft, numbers: Ints, user: SmallInts, t_ms: Ints, changes: dict[str, int]) -> dict[str, Any]:
    """The history columns of the users `numbers` of the draft, in that order."""
    place = np.full(len(draft.user_ids), -1, dtype=np.int64)
    place[numbers] = np.arange(len(numbers))
    owner = place[draft.history_user]
    kept = np.flatnonzero(owner >= 0)
    by_owner = kept[np.argsort(owner[kept], kind="stable")]
    times = draft.history_t_ms[by_owner]
    same = np.diff(owner[by_owner]) == 0
    changes["history_out_of_order"] = int((same & (np.diff(times) < 0)).sum())
    order = by_owner[np.lexsort((times, owner[by_owner]))]
    # The first request of each user: requests are in time order, so the first occurrence.
    first_ms = np.zeros(len(numbers), dtype=np.int64)
    found, at = np.unique(user, return_index=True)
    first_ms[found] = t_ms[at]
    times, latest = draft.history_t_ms[order], first_ms[owner[order]]
    changes["history_after_request"] = int((times > latest).sum())
    return {
        "history_offsets": offsets_of(np.bincount(owner[order], minlength=len(numbers))),
        "history_items": draft.history_items[order],
        "history_t_ms": np.minimum(times, latest),
        "history_actions": np.full(len(order), CLICK, dtype=np.int32),
    }


def _with_changes(meta: TraceMeta, changes: dict[str, int]) -> TraceMeta:
    counted = {name: count for name, count in sorted(changes.items()) if count}
    return TraceMeta(meta.name, meta.source, meta.seed, meta.calibrated_synthetic, counted, meta.config)
