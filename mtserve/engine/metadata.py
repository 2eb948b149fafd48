"""The int32 metadata of one batch in one pinned buffer, so that one copy brings it to the device.

A bucket is how many rows the captured graph works on; its sections lie at fixed places, and what a
batch does not fill says "nothing here": limit 0, no target, no splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mtserve.kernels.attention.work import ITEM_WORDS, AttentionWork, WorkPlan, plan_work, work_capacity
from mtserve.kernels.plan import HostPlan

SMALLEST_BUCKET = 64
STEPS_AN_OCTAVE = 8


def bucket_rows(rows: int) -> int:
    """The bucket of `rows` rows: multiples of 64 up to 512, then 8 steps an octave, so at most 1/8 is padding."""
    if rows <= SMALLEST_BUCKET * STEPS_AN_OCTAVE:
        step = SMALLEST_BUCKET
    else:
        step = 1 << ((rows - 1).bit_length() - STEPS_AN_OCTAVE.bit_length())
    return max(SMALLEST_BUCKET, -(-rows // step) * step)


@dataclass(frozen=True)
class Section:
    """Where one array lies in the buffer, in int32 words."""

    first: int
    shape: tuple[int, ...]

    @property
    def last(self) -> int:
        return self.first + int(np.prod(self.shape))


class Metadata:
    """Pinned buffers and their device twin, for batches of up to `rows` rows in `slots` slots of `width` pages.

    There are two pinned buffers, in turn: the copy out of one has ended when `fill` comes to it again, because
    the loop answers a batch before it plans the one after the next. The device has one: copies and graphs that
    read it follow each other on one stream.
    """

    def __init__(self, rows: int, slots: int, width: int, device: torch.device) -> None:
        self._slots, self._width = slots, max(1, width)
        self._known: dict[int, dict[str, Section]] = {}  # sections of the buckets seen, of which there are few
        words = max(section.last for section in self._sections(bucket_rows(rows)).values())
        self._pinned = [torch.zeros(words, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(words, dtype=torch.int32, device=device)

    def _sections(self, rows: int) -> dict[str, Section]:
        if rows not in self._known:
            self._known[rows] = self._lay_out(rows)
        return self._known[rows]

    def _lay_out(self, rows: int) -> dict[str, Section]:
        shapes = {
            "count": (4,),
            "slots": (self._slots, 4),
            "page_table": (self._slots, self._width),
            "limit": (rows,),
            "group": (rows,),
            "target": (rows,),
            "splits": (rows,),
            "work": (work_capacity(rows, self._slots), ITEM_WORDS),
        }
        sections, first = {}, 0
        for name, shape in shapes.items():
            sections[name] = Section(first, shape)
            first = -(-sections[name].last // 4) * 4
        return sections

    def turn(self) -> None:
        """Start a new batch: take the other pinned buffer."""
        self._pinned.reverse()

    def fill(self, plan: HostPlan, bucket: int, *, heads: int, head_dim: int, sms: int, pieces: int = 0) -> WorkPlan:
        """Write `plan` into the pinned buffer as a batch of `bucket` rows, its attention work included."""
        host = {name: self._view(section) for name, section in self._sections(bucket).items()}
        slots, rows = len(plan.slots), plan.rows
        host["slots"][:slots] = plan.slots
        host["page_table"][:slots, : plan.page_table.shape[1]] = plan.page_table
        for name, nothing in (("limit", 0), ("group", 0), ("target", -1)):
            host[name][:rows] = getattr(plan, name)
            host[name][rows:] = nothing
        work = plan_work(
            host["slots"][:slots], host["limit"][:rows], heads=heads, head_dim=head_dim, sms=sms, deterministic=False,
            out_work=host["work"], out_splits=host["splits"], pieces=pieces,
        )  # fmt: skip
        host["count"][0] = work.items
        return work

    def upload(self, bucket: int) -> None:
        """Start the one copy to the device, on the current stream."""
        words = self._sections(bucket)["work"].last
        self._device[:words].copy_(self._pinned[0][:words], non_blocking=True)

    def on_device(self, bucket: int, name: str) -> torch.Tensor:
        """The device's view of one section of a bucket."""
        section = self._sections(bucket)[name]
        return self._device[section.first : section.last].view(section.shape)

    def work(self, bucket: int, tile_rows: int) -> AttentionWork:
        """The attention's view of a bucket."""
        names = ("slots", "page_table", "limit", "work", "splits")
        views = {name: self.on_device(bucket, name) for name in names}
        return AttentionWork(**views, count=self.on_device(bucket, "count")[:1], tile_rows=tile_rows)

    def _view(self, section: Section) -> npt.NDArray[np.int32]:
        view: npt.NDArray[np.int32] = self._pinned[0][section.first : section.last].view(section.shape).numpy()
        return view
