"""The frozen values that tell the kernels of one batch where everything is.

Rows of a batch are jagged: user slot b owns rows [row_offsets[b], row_offsets[b + 1]), first
its `delta[b]` newly encoded prefix tokens, then its candidates. Who owns which interval of a
slot's keys:

    tokens [0, cached)                 pages, through page_table
    tokens [cached, cached + delta)    the projection's output, rows row_offsets[b] + 0 .. delta
    a candidate itself                 the projection's output, its own row, for itself alone
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class HostPlan:
    """One batch as planned on the host; T rows, B slots.

    `slots` int32 [B, 4]: cached, delta, first row, rows.
    `page_table` int32 [B, W]: ids of the pages of the cached prefix and of new tokens, -1 where there is none.
    `limit` int32 [T]: prefix tokens [0, limit) are what the row sees (a candidate also sees itself).
    `group` int32 [T]: the row's token group (0 U, 1 S, 2 R, 3 C).
    `target` int32 [T]: where the row's K and V are kept, page * page_tokens + offset; -1: nowhere.
    `candidate_rows` int64 [c]: the rows whose outputs are scored.
    """

    page_tokens: int
    slots: npt.NDArray[np.int32]
    page_table: npt.NDArray[np.int32]
    limit: npt.NDArray[np.int32]
    group: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    candidate_rows: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        assert len(self.limit) == len(self.group) == len(self.target) == int(self.slots[:, 3].sum())
        assert len(self.page_table) == len(self.slots)

    @property
    def rows(self) -> int:
        return len(self.limit)


@dataclass(frozen=True)
class KernelPlan:
    """A host plan on the compute device, as the kernels of plain torch want it.

    `limit` int32 [T], `group` int64 [T], `page_table` int64 [B, W] and `candidate_rows` int64 [c] as in
    HostPlan. `write_rows`, `write_pages`, `write_offsets` int64 [w]: row write_rows[i] is stored at token
    write_offsets[i] of page write_pages[i].
    """

    row_offsets: tuple[int, ...]
    cached: tuple[int, ...]
    delta: tuple[int, ...]
    page_tokens: int
    page_table: torch.Tensor
    limit: torch.Tensor
    group: torch.Tensor
    write_rows: torch.Tensor
    write_pages: torch.Tensor
    write_offsets: torch.Tensor
    candidate_rows: torch.Tensor

    def __post_init__(self) -> None:
        assert len(self.row_offsets) == len(self.cached) + 1 == len(self.delta) + 1
        assert self.row_offsets[-1] == len(self.limit) == len(self.group)
        assert len(self.write_rows) == len(self.write_pages) == len(self.write_offsets)

    @property
    def rows(self) -> int:
        return self.row_offsets[-1]

    @cached_property
    def target(self) -> torch.Tensor:
        """int32 [T]: where each row is stored, page * page_tokens + offset; -1: nowhere."""
        target = torch.full((self.rows,), -1, dtype=torch.int32, device=self.limit.device)
        target[self.write_rows] = (self.write_pages * self.page_tokens + self.write_offsets).to(torch.int32)
        return target

    @classmethod
    def of(cls, plan: HostPlan, device: torch.device) -> KernelPlan:
        """`plan` on `device`."""
        written = np.flatnonzero(plan.target >= 0)
        pages, offsets = np.divmod(plan.target[written].astype(np.int64), plan.page_tokens)

        def tensor(values: npt.NDArray[np.integer]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        return cls(
            row_offsets=(*plan.slots[:, 2].tolist(), plan.rows),
            cached=tuple(plan.slots[:, 0].tolist()),
            delta=tuple(plan.slots[:, 1].tolist()),
            page_tokens=plan.page_tokens,
            page_table=tensor(plan.page_table.astype(np.int64)),
            limit=tensor(plan.limit),
            group=tensor(plan.group.astype(np.int64)),
            write_rows=tensor(written),
            write_pages=tensor(pages),
            write_offsets=tensor(offsets),
            candidate_rows=tensor(plan.candidate_rows),
        )
