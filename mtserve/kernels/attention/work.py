"""The work list of one attention launch: which tile of rows meets which run of key blocks, planned once a batch.

A key block is 64 tokens of one slot: the pages of its cached prefix first (the last may be part
filled), then its new prefix tokens, 64 at a time from the first one. A tile is 128 or 192 rows of a
slot from its first one. Each row's visible blocks are cut into `splits[row]` runs; run s adds into
partial sum s of the row, and a single run (max_splits == 1) writes the output itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mtserve import _core
from mtserve.errors import InvalidArgument

BLOCK = 64
ITEM_WORDS = 8
MAX_SPLITS = 16
FIRST_HALF_SHIFT = 16
TILES = (128, 192)  # rows; the larger only up to a head dim
SMALLEST_TILE = TILES[0]
WIDEST_HEAD_OF_LARGE_TILES = 128

Int32Array = npt.NDArray[np.int32]


class WorkPlan(NamedTuple):
    """`items` of the work list are filled; partial sums a row: at most `max_splits`; tiles have `tile_rows` rows.

    A captured graph serves every batch of the same (rows of its buffers, max_splits == 1, tile_rows).
    """

    items: int
    max_splits: int
    tile_rows: int


@dataclass(frozen=True)
class AttentionWork:
    """One launch's metadata, int32 on the device, each of a fixed capacity; what lies behind a batch's own is not read.

    `slots` [B, 4]: cached, delta, first_row, rows of a user slot (its new prefix tokens, then candidates).
    `page_table` [B, W]: pages of the cached prefix. `limit` [T]: prefix tokens [0, limit) are what a row sees.
    `work` [items, 8]: slot, row, rows, begin block, end block, split, chunk, half (the last two of deterministic plans). `count` [1]: items of `work`.
    `splits` [T]: partial sums of the row; 0 where the batch has no such row. A deterministic plan says in bits 16 and
    up how many of them are the first half's: the row's sum is theirs, in order, plus that of the others.
    `tile_rows`: that of the plan which `work` came from.
    """

    slots: torch.Tensor
    page_table: torch.Tensor
    limit: torch.Tensor
    work: torch.Tensor
    count: torch.Tensor
    splits: torch.Tensor
    tile_rows: int

    def __post_init__(self) -> None:
        shapes = {"slots": (None, 4), "page_table": (None, None), "limit": (None,), "work": (None, ITEM_WORDS),
                  "count": (1,), "splits": (None,)}  # fmt: skip
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            fits = tensor.ndim == len(shape) and all(w in (None, g) for w, g in zip(shape, tensor.shape, strict=True))
            if not fits or tensor.dtype != torch.int32 or not tensor.is_contiguous():
                expected = [size or "n" for size in shape]
                raise InvalidArgument(f"expected contiguous int32 {expected}, got {tensor.dtype} {list(tensor.shape)}",
                                      field=name)  # fmt: skip


def work_capacity(rows: int, slots: int) -> int:
    """Items that any plan of `rows` rows in `slots` slots fits: every tile cut MAX_SPLITS times."""
    return (rows // SMALLEST_TILE + slots) * MAX_SPLITS


def plan_work(
    slots: Int32Array,
    limits: Int32Array,
    *,
    heads: int,
    head_dim: int,
    sms: int,
    deterministic: bool,
    out_work: Int32Array,
    out_splits: Int32Array,
    pieces: int = 0,
    tile_rows: int = 0,
) -> WorkPlan:
    """Fill `out_work` [items, 8] and `out_splits` [T or more] (0 behind row T) for `slots` [B, 4] and `limits` [T].

    The same lengths always give the same plan. With `deterministic` runs end only between chunks of blocks that
    follow from the slot alone, so that its sums do not depend on the batch's company, bit for bit. `pieces` (runs of
    every tile that has as many blocks; with `deterministic` no more than 1) and `tile_rows` override the choice by
    estimated time. Raises InvalidArgument naming what is malformed or too small.
    """
    return WorkPlan(
        *_core._plan_attention_work(
            slots, limits, heads, head_dim, sms, deterministic, out_work, out_splits, pieces, tile_rows
        )
    )


def build_work(
    slots: Int32Array,
    limits: Int32Array,
    page_table: torch.Tensor,
    *,
    heads: int,
    head_dim: int,
    sms: int,
    device: torch.device,
    deterministic: bool = False,
    pieces: int = 0,
    tile_rows: int = 0,
) -> tuple[AttentionWork, WorkPlan]:
    """Plan one batch and put it on `device`: for one-off use; a serving loop keeps its buffers."""
    work = np.zeros((work_capacity(len(limits), len(slots)), ITEM_WORDS), np.int32)
    splits = np.zeros(len(limits), np.int32)
    plan = plan_work(
        slots, limits, heads=heads, head_dim=head_dim, sms=sms, deterministic=deterministic,
        out_work=work, out_splits=splits, pieces=pieces, tile_rows=tile_rows,
    )  # fmt: skip

    def tensor(array: Int32Array) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return AttentionWork(
        slots=tensor(slots),
        page_table=page_table.to(device, torch.int32).contiguous(),
        limit=tensor(limits),
        work=tensor(work),
        count=tensor(np.array([plan.items], np.int32)),
        splits=tensor(splits),
        tile_rows=plan.tile_rows,
    ), plan


def sum_partial(partial: torch.Tensor, splits: torch.Tensor, *, halves: bool) -> torch.Tensor:
    """fp32 [T, w]: each row's partial sums [S, T, w], added as whoever reads a plan's `splits` has to.

    `halves`: splits are those of a deterministic plan.
    """
    count, first = splits & (1 << FIRST_HALF_SHIFT) - 1, splits >> FIRST_HALF_SHIFT if halves else splits
    sums = torch.zeros_like(partial[0]), torch.zeros_like(partial[0])
    for split, part in enumerate(partial):
        for half, mine in zip(sums, (split < first, (split >= first) & (split < count)), strict=True):
            half.copy_(torch.where(mine[:, None], half + part, half))
    return sums[0] + sums[1]
