"""All that one batch brings to the device, in one pinned buffer, so that one copy takes it there.

A bucket is how many rows the captured graph works on; its sections lie at fixed places, and what a
batch does not fill says "nothing here": limit 0, no target, no splits, tiles of no kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mtserve.engine.forward.batch import BatchArrays, BatchPlan, tile_capacity
from mtserve.kernels.attention.work import ITEM_WORDS, AttentionWork, WorkPlan, plan_work, work_capacity
from mtserve.model.schema import FeatureSchema

SMALLEST_BUCKET = 64
STEPS_AN_OCTAVE = 8
ALIGNMENT = 4  # words: sections begin at multiples of 16 bytes
RAW_SECTIONS = 3  # of feature rows: users, behaviours, candidates


def bucket_rows(rows: int) -> int:
    """The bucket of `rows` rows: multiples of 64 up to 512, then 8 steps an octave, so at most 1/8 is padding."""
    if rows <= SMALLEST_BUCKET * STEPS_AN_OCTAVE:
        step = SMALLEST_BUCKET
    else:
        step = 1 << ((rows - 1).bit_length() - STEPS_AN_OCTAVE.bit_length())
    return max(SMALLEST_BUCKET, -(-rows // step) * step)


class Capacity(NamedTuple):
    """The largest batch: `rows`, `slots`, pages of a slot; `kinds` of tokens; bytes of a feature row of each."""

    rows: int
    slots: int
    width: int
    kinds: int
    user_bytes: int
    row_bytes: int

    @classmethod
    def of(cls, schema: FeatureSchema, rows: int, slots: int, width: int) -> Capacity:
        """Of batches of `schema`'s features; `rows` is rounded up to a bucket."""
        row_bytes = max(schema.behaviour_dtype.itemsize, schema.candidate_dtype.itemsize)
        kinds = len(schema.user) + 2
        return cls(bucket_rows(rows), slots, max(1, width), kinds, schema.user_dtype.itemsize, row_bytes)


@dataclass(frozen=True)
class Section:
    """Where one array lies in the buffer, in int32 words."""

    first: int
    shape: tuple[int, ...]

    @property
    def last(self) -> int:
        return self.first + math.prod(self.shape)


class Host(NamedTuple):
    """A pinned buffer's arrays as a bucket has them: the planner's, and what the attention's work is planned into."""

    arrays: BatchArrays
    splits: npt.NDArray[np.int32]
    work: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]


class Metadata:
    """Pinned buffers and their device twin.

    There are two pinned buffers, in turn: the copy out of one has ended when its turn comes again, because
    the loop answers a batch before it plans the one after the next. The device has one: copies and graphs that
    read it follow each other on one stream.
    """

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        self.capacity = capacity
        self._known: dict[int, dict[str, Section]] = {}  # sections of the buckets seen, of which there are few
        words = self._sections(capacity.rows)["raw"].last
        self._pinned = [torch.zeros(words, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(words, dtype=torch.int32, device=device)
        self._views: list[dict[int, Host]] = [{}, {}]
        self._turn = 0

    def _sections(self, rows: int) -> dict[str, Section]:
        if rows not in self._known:
            self._known[rows] = self._lay_out(rows)
        return self._known[rows]

    def _lay_out(self, rows: int) -> dict[str, Section]:
        size = self.capacity
        raw_bytes = size.slots * size.user_bytes + rows * size.row_bytes + RAW_SECTIONS * 4 * ALIGNMENT
        shapes = {
            "counts": (4,),
            "slots": (size.slots, 4),
            "page_table": (size.slots, size.width),
            **dict.fromkeys(("limit", "group", "target", "splits", "row", "source", "position", "bucket"), (rows,)),
            "tiles": (tile_capacity(rows, size.kinds), 4),
            "work": (work_capacity(rows, size.slots), ITEM_WORDS),
            "raw": (-(-raw_bytes // 4),),  # last: a batch's copy ends where its feature rows do
        }
        sections, first = {}, 0
        for name, shape in shapes.items():
            sections[name] = Section(first, shape)
            first = -(-sections[name].last // ALIGNMENT) * ALIGNMENT
        return sections

    def room(self, bucket: int) -> BatchArrays:
        """Where the next batch is to be laid out: the other pinned buffer, as a batch of `bucket` rows."""
        self._turn ^= 1
        return self._host(bucket).arrays

    def plan_attention(
        self, bucket: int, plan: BatchPlan, *, heads: int, head_dim: int, sms: int, deterministic: bool, pieces: int = 0
    ) -> WorkPlan:
        """Plan the attention's work of the batch that was laid out in `room`."""
        host = self._host(bucket)
        work = plan_work(
            host.arrays.slots[: plan.slots], host.arrays.limit[: plan.rows], heads=heads, head_dim=head_dim, sms=sms,
            deterministic=deterministic, out_work=host.work, out_splits=host.splits, pieces=pieces,
        )  # fmt: skip
        host.counts[:] = work.items, plan.slots, plan.first_candidate, plan.candidates
        return work

    def to_copy(self, bucket: int, raw_bytes: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The one copy to make: the device's buffer, the pinned one, and how many bytes from the start of each."""
        return self._device, self._pinned[self._turn], 4 * self._sections(bucket)["raw"].first + raw_bytes

    def nothing(self, bucket: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """As `to_copy`, of a batch that has no row: none is made, seen, written or scored. While no batch is under way."""
        host = self._host(bucket)
        for array in (*host.arrays, host.splits, host.work, host.counts):
            array.fill(0)
        host.arrays.target.fill(-1)
        host.arrays.tiles[:, 0] = -1
        return self.to_copy(bucket, 0)

    def on_device(self, bucket: int, name: str) -> torch.Tensor:
        """The device's view of one section of a bucket."""
        section = self._sections(bucket)[name]
        return self._device[section.first : section.last].view(section.shape)

    @property
    def slots(self) -> torch.Tensor:
        """The device's view of the batch's slots, which lie in the same place in every bucket."""
        return self.on_device(SMALLEST_BUCKET, "slots")

    def work(self, bucket: int, tile_rows: int) -> AttentionWork:
        """The attention's view of a bucket."""
        names = ("slots", "page_table", "limit", "work", "splits")
        views = {name: self.on_device(bucket, name) for name in names}
        return AttentionWork(**views, count=self.on_device(bucket, "counts")[:1], tile_rows=tile_rows)

    def _host(self, bucket: int) -> Host:
        views = self._views[self._turn]
        if bucket not in views:
            buffer = self._pinned[self._turn].numpy()
            host = {
                name: buffer[section.first : section.last].reshape(section.shape)
                for name, section in self._sections(bucket).items()
            }
            arrays = {name: host[name] for name in BatchArrays._fields if name != "raw"}
            raw = host["raw"].view(np.uint8)
            views[bucket] = Host(BatchArrays(**arrays, raw=raw), host["splits"], host["work"], host["counts"])
        return views[bucket]
