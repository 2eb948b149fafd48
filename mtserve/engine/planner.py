"""From chosen slots to the frozen plan of one batch: which rows there are, where they read and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.engine.job import Job
from mtserve.engine.scheduler import Slot
from mtserve.engine.tiers import Reservation
from mtserve.kernels.plan import HostPlan
from mtserve.model.mask import token_limits
from mtserve.model.ranking import GROUP_C, RankingModel
from mtserve.model.tokeniser import TokenInputs

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """One batch. `scored`: each job with its slice of the candidate rows, in the order of `logits`."""

    inputs: TokenInputs
    layout: HostPlan
    scored: tuple[tuple[Job, int, int], ...]

    @property
    def tokens(self) -> int:
        return self.layout.rows


@dataclass(frozen=True)
class _Lengths:
    """Slot by slot, int64 [B]: cached + delta = encoded prefix; delta + candidates = rows, from `first` on.

    `stored`: prefix tokens that have a page; `frozen`: tokens of U and S.
    """

    cached: Int64s
    delta: Int64s
    candidates: Int64s
    stored: Int64s
    frozen: Int64s

    @property
    def rows(self) -> Int64s:
        return self.delta + self.candidates

    @property
    def first(self) -> Int64s:
        return np.cumsum(self.rows) - self.rows


class Planner:
    """Plans batches for one model. No decisions: slots say what to encode, the reservation where it goes.

    Everything ragged is one array over the whole batch: a batch of many small slots costs little more than one.
    """

    def __init__(self, model: RankingModel, page_tokens: int) -> None:
        self._model = model
        self._page_tokens = page_tokens
        self._users = len(model.schema.user)
        self._plain_norm = model.config.norm == "plain"

    def plan(self, slots: Sequence[Slot], reservation: Reservation | None) -> BatchPlan:
        """Lay the batch out; without a reservation (cache off) every prefix is encoded whole and not kept."""
        jobs = [() if self._is_part(slot, index, reservation) else tuple(slot.jobs) for index, slot in enumerate(slots)]
        lengths = self._lengths(slots, jobs, reservation)
        tokens = _ragged(lengths.cached, lengths.delta)  # prefix tokens to encode, slot after slot
        owner = np.repeat(np.arange(len(slots)), lengths.delta)
        token_rows = _ragged(lengths.first, lengths.delta)
        candidate_rows = _ragged(lengths.first + lengths.delta, lengths.candidates)
        every = [job for slot_jobs in jobs for job in slot_jobs]
        layout = self._layout(lengths, tokens, owner, token_rows, candidate_rows, every, reservation)
        inputs = self._inputs(slots, lengths, tokens, token_rows, candidate_rows, every)
        return BatchPlan(inputs, layout, _slices(every))

    def _is_part(self, slot: Slot, index: int, reservation: Reservation | None) -> bool:
        """Whether the slot encodes a part of its prefix. One that has no room to be kept is encoded all at once."""
        if slot.partial and reservation is not None and reservation.stored[index] < slot.encode_to:
            slot.encode_to = slot.sequence.groups.prefix
        return slot.partial

    def _lengths(
        self, slots: Sequence[Slot], jobs: Sequence[tuple[Job, ...]], reservation: Reservation | None
    ) -> _Lengths:
        nothing = np.zeros(len(slots), dtype=np.int64)
        cached = nothing if reservation is None else reservation.cached.astype(np.int64)
        stored = nothing if reservation is None else reservation.stored.astype(np.int64)
        encode_to = np.array([slot.encode_to for slot in slots], dtype=np.int64)
        assert (cached <= encode_to).all()
        return _Lengths(
            cached=cached,
            delta=encode_to - cached,
            candidates=np.array([sum(len(job.candidates) for job in each) for each in jobs], dtype=np.int64),
            stored=stored,
            frozen=np.array([slot.sequence.groups.frozen for slot in slots], dtype=np.int64),
        )

    def _layout(
        self, lengths: _Lengths, tokens: Int64s, owner: Int64s, token_rows: Int64s, candidate_rows: Int64s,
        jobs: Sequence[Job], reservation: Reservation | None,
    ) -> HostPlan:  # fmt: skip
        total = len(tokens) + len(candidate_rows)
        limit, group = np.empty(total, dtype=np.int32), np.full(total, GROUP_C, dtype=np.int32)
        target = np.full(total, -1, dtype=np.int32)
        frozen = lengths.frozen[owner]
        limit[token_rows] = token_limits(tokens, frozen, self._model.config.static_attention)
        # GROUP_U, GROUP_S, GROUP_R are 0, 1, 2
        group[token_rows] = (tokens >= self._users).astype(np.int32) + (tokens >= frozen)
        limit[candidate_rows] = _join([job.limits for job in jobs], np.dtype(np.int32))
        table = np.empty((len(lengths.cached), 0), dtype=np.int32)
        if reservation is not None:
            widest = int(lengths.stored.max(initial=0))
            table = reservation.page_table[:, : -(-widest // self._page_tokens)].copy()
            kept = np.flatnonzero(tokens < lengths.stored[owner])
            page, offset = np.divmod(tokens[kept], self._page_tokens)
            target[token_rows[kept]] = table[owner[kept], page] * self._page_tokens + offset
        slots = np.stack((lengths.cached, lengths.delta, lengths.first, lengths.rows), axis=1)
        return HostPlan(
            page_tokens=self._page_tokens,
            slots=slots.astype(np.int32),
            page_table=table,
            limit=limit,
            group=np.zeros_like(group) if self._plain_norm else group,
            target=target,
            candidate_rows=candidate_rows,
        )

    def _inputs(
        self, slots: Sequence[Slot], lengths: _Lengths, tokens: Int64s, token_rows: Int64s, candidate_rows: Int64s,
        jobs: Sequence[Job],
    ) -> TokenInputs:  # fmt: skip
        schema, users = self._model.schema, self._users
        begin = np.maximum(lengths.cached - users, 0)
        end = np.maximum(lengths.cached + lengths.delta - users, 0)
        spans = [slot.sequence.kept[a:b] for slot, a, b in zip(slots, begin.tolist(), end.tolist(), strict=True)]
        behaviours = _join(spans, schema.behaviour_dtype)
        is_behaviour = tokens >= users
        user_tokens = np.arange(users)
        cached, encoded = lengths.cached[:, None], (lengths.cached + lengths.delta)[:, None]
        new = (user_tokens >= cached) & (user_tokens < encoded)
        return TokenInputs(
            rows=len(tokens) + len(candidate_rows),
            user_rows=_join([slot.sequence.features for slot in slots], schema.user_dtype),
            user_destinations=np.where(new, lengths.first[:, None] + user_tokens - cached, -1),
            behaviours=behaviours,
            positions=tokens[is_behaviour] - users,
            gap_ms=_gaps(behaviours["time_ms"], slots, begin, end),
            behaviour_destinations=token_rows[is_behaviour],
            candidates=_join([job.candidates for job in jobs], schema.candidate_dtype),
            recency_ms=_join([job.recency_ms for job in jobs], np.dtype(np.int64)),
            candidate_destinations=candidate_rows,
        )


def _ragged(first: Int64s, counts: Int64s) -> Int64s:
    """first[b], first[b] + 1, ... (counts[b] of them) for each b, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(first - (ends - counts), counts)


def _gaps(times: Int64s, slots: Sequence[Slot], begin: Int64s, end: Int64s) -> Int64s:
    """ms from each behaviour to the one before; 0 for a generation's first, which follows nothing."""
    gaps = np.diff(times, prepend=times[:1])
    counts = end - begin
    starts = np.cumsum(counts) - counts
    for index in np.flatnonzero(counts).tolist():
        at, start = int(begin[index]), int(starts[index])
        gaps[start] = times[start] - slots[index].sequence.kept["time_ms"][at - 1] if at else 0
    return gaps


def _slices(jobs: Sequence[Job]) -> tuple[tuple[Job, int, int], ...]:
    scored, offset = [], 0
    for job in jobs:
        scored.append((job, offset, offset + len(job.candidates)))
        offset += len(job.candidates)
    return tuple(scored)


def _join(parts: Sequence[npt.NDArray[Any]], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Rows of `dtype` one after the other. Joined as plain bytes: numpy takes long to agree on structured types."""
    if not parts:
        return np.empty(0, dtype=dtype)
    if dtype.names is None or not dtype.itemsize:
        return np.concatenate(parts)
    plain = np.dtype((np.void, dtype.itemsize))
    return np.concatenate([part.view(plain) for part in parts]).view(dtype)
