"""From chosen slots to the frozen plan of one batch: which rows there are, where they read and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtserve.engine.job import Job
from mtserve.engine.scheduler import Slot
from mtserve.engine.tiers import Reservation
from mtserve.kernels.plan import HostPlan
from mtserve.model.mask import visible_limits
from mtserve.model.ranking import GROUP_C, GROUP_R, GROUP_S, GROUP_U, RankingModel
from mtserve.model.tokeniser import TokenInputs


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
class _Rows:
    """The rows of one slot: `delta` tokens from `cached` on, then its jobs' candidates; `stored` tokens get a page."""

    slot: Slot
    first: int
    cached: int
    stored: int
    pages: npt.NDArray[np.int32]
    jobs: tuple[Job, ...]

    @property
    def delta(self) -> int:
        return self.slot.encode_to - self.cached

    @property
    def candidates(self) -> int:
        return sum(len(job.candidates) for job in self.jobs)

    @property
    def end(self) -> int:
        return self.first + self.delta + self.candidates


class Planner:
    """Plans batches for one model. No decisions: slots say what to encode, the reservation where it goes."""

    def __init__(self, model: RankingModel, page_tokens: int) -> None:
        self._model = model
        self._page_tokens = page_tokens
        self._plain_norm = model.config.norm == "plain"

    def plan(self, slots: Sequence[Slot], reservation: Reservation | None) -> BatchPlan:
        """Lay the batch out; without a reservation (cache off) every prefix is encoded whole and not kept."""
        rows = self._lay_out(slots, reservation)
        scored, offset = [], 0
        for part in rows:
            for job in part.jobs:
                scored.append((job, offset, offset + len(job.candidates)))
                offset += len(job.candidates)
        return BatchPlan(self._inputs(rows), self._host_plan(rows), tuple(scored))

    def _lay_out(self, slots: Sequence[Slot], reservation: Reservation | None) -> list[_Rows]:
        rows: list[_Rows] = []
        first = 0
        for index, slot in enumerate(slots):
            cached, stored = 0, 0
            pages: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
            if reservation is not None:
                cached, stored = int(reservation.cached[index]), int(reservation.stored[index])
                pages = reservation.page_table[index, : -(-stored // self._page_tokens)]
                if slot.partial and stored < slot.encode_to:
                    slot.encode_to = slot.sequence.groups.prefix  # no room to keep the part: encode it all at once
            assert cached <= stored or reservation is None
            jobs = () if slot.partial else tuple(slot.jobs)
            rows.append(_Rows(slot, first, cached, stored, pages, jobs))
            first = rows[-1].end
        return rows

    def _inputs(self, rows: list[_Rows]) -> TokenInputs:
        schema = self._model.schema
        parts = [_slot_inputs(row) for row in rows]
        jobs = [job for row in rows for job in row.jobs]
        candidate_rows = [np.arange(row.first + row.delta, row.end) for row in rows]
        return TokenInputs(
            rows=rows[-1].end if rows else 0,
            user_rows=np.concatenate([row.slot.sequence.features for row in rows]),
            user_destinations=np.stack([part.user_destinations for part in parts]),
            behaviours=_join([part.behaviours for part in parts], schema.behaviour_dtype),
            positions=np.concatenate([part.positions for part in parts]),
            gap_ms=np.concatenate([part.gap_ms for part in parts]),
            behaviour_destinations=np.concatenate([part.destinations for part in parts]),
            candidates=_join([job.candidates for job in jobs], schema.candidate_dtype),
            recency_ms=_join([job.recency_ms for job in jobs], np.dtype(np.int64)),
            candidate_destinations=np.concatenate(candidate_rows),
        )

    def _host_plan(self, rows: list[_Rows]) -> HostPlan:
        static_attention = self._model.config.static_attention
        limits, groups, targets, slots = [], [], [], []
        for row in rows:
            sizes = row.slot.sequence.groups
            limits.append(visible_limits(sizes, static_attention, row.cached, row.slot.encode_to))
            limits.extend(job.limits for job in row.jobs)
            labels = np.repeat([GROUP_U, GROUP_S, GROUP_R], [sizes.user, sizes.static, sizes.realtime])
            groups.append(labels[row.cached : row.slot.encode_to])
            groups.append(np.full(row.candidates, GROUP_C))
            targets.append(_targets(row, self._page_tokens))
            slots.append((row.cached, row.delta, row.first, row.end - row.first))
        group = np.concatenate(groups).astype(np.int32)
        width = max((len(row.pages) for row in rows), default=0)
        table = np.full((len(rows), width), -1, dtype=np.int32)
        for index, row in enumerate(rows):
            table[index, : len(row.pages)] = row.pages
        return HostPlan(
            page_tokens=self._page_tokens,
            slots=np.array(slots, dtype=np.int32).reshape(-1, 4),
            page_table=table,
            limit=np.concatenate(limits).astype(np.int32),
            group=np.zeros_like(group) if self._plain_norm else group,
            target=np.concatenate(targets),
            candidate_rows=np.concatenate([np.arange(row.first + row.delta, row.end) for row in rows]),
        )


@dataclass(frozen=True)
class _SlotInputs:
    user_destinations: npt.NDArray[np.int64]
    behaviours: np.ndarray  # type: ignore[type-arg]
    positions: npt.NDArray[np.int64]
    gap_ms: npt.NDArray[np.int64]
    destinations: npt.NDArray[np.int64]


def _slot_inputs(row: _Rows) -> _SlotInputs:
    """Token inputs of the prefix tokens [cached, encode_to) of one slot."""
    sequence = row.slot.sequence
    users = sequence.groups.user
    tokens = np.arange(users)
    user_destinations = np.where(
        (tokens >= row.cached) & (tokens < row.slot.encode_to), row.first + tokens - row.cached, -1
    )
    begin, end = max(0, row.cached - users), max(0, row.slot.encode_to - users)
    times = sequence.kept["time_ms"]
    gaps = np.zeros(end - begin, dtype=np.int64)
    later = max(begin, 1)  # the generation's first behaviour follows nothing
    if end > later:
        gaps[later - begin :] = times[later:end] - times[later - 1 : end - 1]
    destinations = row.first + users + np.arange(begin, end) - row.cached
    return _SlotInputs(user_destinations, sequence.kept[begin:end], np.arange(begin, end), gaps, destinations)


def _targets(row: _Rows, page_tokens: int) -> npt.NDArray[np.int32]:
    """int32 [rows of the slot]: where each row's states are kept, -1 for nowhere."""
    targets = np.full(row.end - row.first, -1, dtype=np.int32)
    tokens = np.arange(row.cached, min(row.stored, row.slot.encode_to))
    targets[: len(tokens)] = row.pages[tokens // page_tokens] * page_tokens + tokens % page_tokens
    return targets


def _join(parts: list[np.ndarray], dtype: np.dtype) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
