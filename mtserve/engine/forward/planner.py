"""From chosen slots to the frozen plan of one batch: which rows there are, where they read and write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from mtserve import _core
from mtserve.engine.forward.batch import BatchArrays, BatchPlan, BatchSize, tile_capacity
from mtserve.engine.queue.filling import Slot
from mtserve.engine.request.job import Job
from mtserve.engine.tiers.tiers import Reservation
from mtserve.kernels.token_embedding.batch import TILE_TOKENS
from mtserve.model.ranking import RankingModel
from mtserve.model.tokeniser import GAP_THRESHOLDS_MS

# One thread lays out as many in 13 us (benchmarks/bench_host.py); half as many are done before another has woken.
ROWS_OF_PART = 4096
# Sections of the feature rows begin at multiples of this many bytes.
_ALIGNMENT = 16


class Planner:
    """Plans batches for one model. No decisions: slots say what to encode, the reservation where it goes.

    What is done once a token, a page or an array is done by the C++ core; here is only what slots and jobs say.
    """

    def __init__(self, model: RankingModel, page_tokens: int, *, rows_of_part: int = ROWS_OF_PART) -> None:
        """`rows_of_part`: batches of twice as many rows and more are laid out in parts of about so many, by several threads."""
        schema = model.schema
        self._page_tokens = page_tokens
        self._users = len(schema.user)
        self._row_bytes = (
            schema.user_dtype.itemsize, schema.behaviour_dtype.itemsize, schema.candidate_dtype.itemsize
        )  # fmt: skip
        self._layout = _core._BatchLayout(
            self._users,
            *self._row_bytes,
            page_tokens=page_tokens,
            tile_tokens=TILE_TOKENS,
            full_attention=model.config.static_attention == "full",
            plain_norm=model.config.norm == "plain",
            gap_thresholds=GAP_THRESHOLDS_MS,
            rows_of_part=rows_of_part,
        )

    def plan(
        self,
        slots: Sequence[Slot],
        reservation: Reservation | None,
        room: Callable[[BatchSize], BatchArrays],
        begins: list[int] | None = None,
    ) -> BatchPlan:
        """Lay the batch out in what `room` gives for its size.

        Without a reservation (cache off) every prefix is encoded whole and not kept. `begins` [B]: the token from which each
        slot is encoded, where that is not what the reservation has cached.
        """
        nothing = [0] * len(slots)
        cached = begins or (nothing if reservation is None else reservation.cached.tolist())
        stored = nothing if reservation is None else reservation.stored.tolist()
        spans: list[int] = []
        jobs: list[Job] = []
        for slot, begin, pages_to in zip(slots, cached, stored, strict=True):
            if reservation is not None:
                _widen(slot, pages_to)
            scored = [] if slot.partial else slot.jobs
            spans += (begin, slot.encode_to, slot.sequence.groups.frozen, pages_to, len(scored))
            jobs += scored
        candidates = [job.candidates for job in jobs]
        counts = [len(rows) for rows in candidates]
        size = self._size(cached, spans[1::5], max(stored, default=0), sum(counts))
        arrays = room(size)
        tiles, first_token = self._layout.plan(
            spans,
            [slot.sequence.features for slot in slots] if min(cached, default=0) < self._users else [],
            [slot.sequence.kept for slot in slots],
            candidates,
            [job.limits for job in jobs],
            [job.recency for job in jobs],
            None if reservation is None else reservation.page_table,
            arrays,
        )
        ends = list(accumulate(counts))
        slices = tuple(zip(jobs, [0, *ends], ends, strict=False))
        return BatchPlan(arrays, size, self._page_tokens, tiles, first_token, slices)

    def _size(self, cached: list[int], ends: list[int], stored: int, candidates: int) -> BatchSize:
        """Room for the new tokens [cached, ends) of each slot and for the candidates."""
        users, (user_bytes, behaviour_bytes, candidate_bytes) = self._users, self._row_bytes
        delta = sum(ends) - sum(cached)
        assert delta >= 0
        new_users = sum([min(end, users) - begin for begin, end in zip(cached, ends, strict=True) if begin < users])
        behaviours_at = _aligned(len(cached) * user_bytes if new_users else 0)
        candidates_at = _aligned(behaviours_at + (delta - new_users) * behaviour_bytes)
        return BatchSize(
            rows=delta + candidates,
            slots=len(cached),
            width=-(-stored // self._page_tokens),
            raw_bytes=candidates_at + candidates * candidate_bytes,
            tiles=tile_capacity(delta + candidates, users + 2),
        )


def _widen(slot: Slot, stored: int) -> None:
    """A part that has no room to be kept is no part: its prefix is encoded all at once."""
    if stored < slot.encode_to and slot.partial:
        slot.encode_to = slot.sequence.groups.prefix


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
