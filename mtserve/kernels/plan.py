"""The frozen value that tells the kernels of one batch where everything is.

Rows of a batch are jagged: user slot b owns rows [row_offsets[b], row_offsets[b + 1]), first
its `delta[b]` newly encoded prefix tokens, then its candidates. Who owns which interval of a
slot's keys:

    tokens [0, cached)                 pages, through page_table
    tokens [cached, cached + delta)    the projection's output, rows row_offsets[b] + 0 .. delta
    a candidate itself                 the projection's output, its own row, for itself alone
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KernelPlan:
    """Lengths, page tables and visibility of one batch; T rows, B slots. Tensors live on the compute device.

    `limit` int32 [T]: prefix tokens [0, limit) are what the row sees (a candidate also sees itself).
    `group` int64 [T]: the row's token group (0 U, 1 S, 2 R, 3 C).
    `page_table` int64 [B, W]: ids of the pages of the cached prefix, -1 where there is none.
    `write_rows`, `write_pages`, `write_offsets` int64 [w]: row write_rows[i] is stored at token
    write_offsets[i] of page write_pages[i].
    `candidate_rows` int64 [c]: the rows whose outputs are scored.
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
