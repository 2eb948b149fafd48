"""One planned batch: where each of its tokens lies, in arrays whose memory the runner chose.

There are two orders. Rows lie slot after slot: a slot's new prefix tokens, then its candidates. Tokens are sorted
by kind: U feature 0, U feature 1, ..., behaviours, candidates; inside a kind they are in the order of their rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mtserve.engine.request.job import Job
from mtserve.kernels.plan import HostPlan
from mtserve.kernels.token_embedding.batch import TILE_TOKENS
from mtserve.model.schema import FeatureSchema
from mtserve.model.tokeniser import KindTokens, TokenInputs
from mtserve.types import Rows

Int32s = npt.NDArray[np.int32]


def tile_capacity(rows: int, kinds: int) -> int:
    """Tiles that any batch of up to `rows` rows has at most."""
    return rows // TILE_TOKENS + kinds


class BatchSize(NamedTuple):
    """What a batch needs room for. `width`: pages of the widest page table; `tiles` may be a few more than it has."""

    rows: int
    slots: int
    width: int
    raw_bytes: int
    tiles: int


class BatchArrays(NamedTuple):
    """Where one batch is laid out: C-contiguous arrays that have room for B slots of W pages and T rows, or more.

    `slots` int32 [B, 4]: cached, delta, first row, rows.
    `page_table` int32 [B, W], `limit`, `group`, `target` int32 [T] in the order of the rows: as in HostPlan.
    Behind the batch's rows they say "nothing here": limit 0, group 0, target -1.
    `tiles` int32 [n, 4]: kind, first token, tokens, 0: runs of at most TILE_TOKENS tokens of one kind; kind -1
    behind the last.
    In the order of the tokens, int32 [T]:
    `row`: the token's row. `source`: where its feature row begins in `raw`, in bytes.
    `position`: a behaviour's place from its generation's first; 0 for others.
    `bucket`: the bucket of a behaviour's gap or of a candidate's recency; 0 for others.
    `raw` uint8 [bytes]: feature rows as packed by FeatureSchema: the user rows of all slots (where any U token is
    new), the new behaviours, the candidates; each section begins at a multiple of 16.
    """

    slots: Int32s
    page_table: Int32s
    limit: Int32s
    group: Int32s
    target: Int32s
    tiles: Int32s
    row: Int32s
    source: Int32s
    position: Int32s
    bucket: Int32s
    raw: npt.NDArray[np.uint8]

    @classmethod
    def empty(cls, size: BatchSize) -> BatchArrays:
        """Plain arrays of exactly `size`."""
        per_row = (np.empty(size.rows, dtype=np.int32) for _ in range(7))
        limit, group, target, row, source, position, bucket = per_row
        return cls(
            slots=np.empty((size.slots, 4), dtype=np.int32),
            page_table=np.empty((size.slots, size.width), dtype=np.int32),
            limit=limit,
            group=group,
            target=target,
            tiles=np.empty((size.tiles, 4), dtype=np.int32),
            row=row,
            source=source,
            position=position,
            bucket=bucket,
            raw=np.empty(size.raw_bytes, dtype=np.uint8),
        )


@dataclass(frozen=True)
class BatchPlan:
    """One batch, laid out in `arrays`, which the runner may use again once it has answered it.

    `tiles` of them are used. `first_token` [kinds + 1]: tokens of kind k are [first_token[k], first_token[k + 1]).
    `scored`: each job with its slice of the candidates, in the order of the runner's logits.
    """

    arrays: BatchArrays
    size: BatchSize
    page_tokens: int
    tiles: int
    first_token: tuple[int, ...]
    scored: tuple[tuple[Job, int, int], ...]

    @property
    def rows(self) -> int:
        return self.size.rows

    @property
    def tokens(self) -> int:
        return self.size.rows  # one a row

    @property
    def slots(self) -> int:
        return self.size.slots

    @property
    def raw_bytes(self) -> int:
        return self.size.raw_bytes

    @property
    def first_candidate(self) -> int:
        """The first candidate's token; candidates are the last kind."""
        return self.first_token[-2]

    @property
    def candidates(self) -> int:
        return self.first_token[-1] - self.first_token[-2]

    @cached_property
    def layout(self) -> HostPlan:
        """Views of the arrays, cut to the batch."""
        arrays, size = self.arrays, self.size
        return HostPlan(
            page_tokens=self.page_tokens,
            slots=arrays.slots[: size.slots],
            page_table=arrays.page_table[: size.slots, : size.width],
            limit=arrays.limit[: size.rows],
            group=arrays.group[: size.rows],
            target=arrays.target[: size.rows],
            candidate_rows=arrays.row[self.first_candidate : size.rows].astype(np.int64),
        )

    def inputs(self, schema: FeatureSchema) -> TokenInputs:
        """What the tokens are made of: views where the feature rows lie side by side."""
        dtypes = [*[schema.user_dtype] * len(schema.user), schema.behaviour_dtype, schema.candidate_dtype]
        return TokenInputs(self.rows, tuple(self._kind(kind, dtype) for kind, dtype in enumerate(dtypes)))

    def _kind(self, kind: int, dtype: np.dtype[np.void]) -> KindTokens:
        arrays, tokens = self.arrays, slice(self.first_token[kind], self.first_token[kind + 1])
        return KindTokens(
            features=self._features(arrays.source[tokens], dtype),
            destinations=arrays.row[tokens].astype(np.int64),
            position=arrays.position[tokens],
            bucket=arrays.bucket[tokens],
        )

    def _features(self, source: Int32s, dtype: np.dtype[np.void]) -> Rows:
        """The rows of `dtype` at `source`, which lie in one section."""
        if not len(source):
            return np.empty(0, dtype=dtype)
        first, last = int(source[0]), int(source[-1])
        section: Rows = self.arrays.raw[first : last + dtype.itemsize].view(dtype)
        if len(section) == len(source):
            return section
        return section[(source - first) // dtype.itemsize]  # of some slots only


@dataclass(frozen=True)
class EarlyLayers:
    """Layers [0, layers) of a batch, which run over the rows of `plan`: those of the batch's own plan and, ahead of them
    in each slot, rows of tokens whose later layers come from the host.
    """

    plan: BatchPlan
    layers: int

    def late_rows(self, late: BatchPlan) -> npt.NDArray[np.int64]:
        """int64 [late.rows]: of each row of the batch's own plan, the row of this one."""
        early = self.plan.layout.slots.astype(np.int64)
        _, _, first, rows = late.layout.slots.astype(np.int64).T
        shift = early[:, 2] + early[:, 3] - rows - first
        return np.arange(late.rows) + np.repeat(shift, rows)
