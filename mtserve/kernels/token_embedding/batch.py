"""Where the tokens of one batch come from and go to, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE_TOKENS = 128


@dataclass(frozen=True)
class TokenBatch:
    """Capacities may exceed the batch: only tokens of a tile count. "Token order" is sorted by kind.

    `tiles` int32 [n, 4]: kind, first token, tokens, 0: runs of at most TILE_TOKENS tokens of one kind; kind -1: none.
    `row` int32 [T]: the batch row of each token, in token order, as all that follow.
    `source` int32 [T]: byte offset of its feature row in `raw`, a multiple of 4.
    `position` int32 [T]: a behaviour's place from the generation's first.
    `bucket` int32 [T]: a behaviour's gap bucket, a candidate's recency bucket.
    `raw`: packed little-endian feature rows, in words of any type; starts at a multiple of 4 bytes.
    """

    tiles: torch.Tensor
    row: torch.Tensor
    source: torch.Tensor
    position: torch.Tensor
    bucket: torch.Tensor
    raw: torch.Tensor
