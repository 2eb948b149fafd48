"""Random token batches: rows of every kind laid out in one buffer, in tiles of odd lengths, some of them unused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mtserve.kernels.token_embedding.batch import TILE_TOKENS, TokenBatch
from mtserve.types import Rows

NAN = float("nan")


@dataclass(frozen=True)
class Made:
    """A batch of tokens; `first` [kinds + 1] of each kind's tokens, in token order."""

    batch: TokenBatch
    first: list[int]

    @property
    def tokens(self) -> int:
        return self.first[-1]

    def rows(self, kind: int) -> torch.Tensor:
        """int64: the batch rows of one kind's tokens."""
        return self.batch.row[self.first[kind] : self.first[kind + 1]].cpu().long()


def make_token_batch(
    rng: np.random.Generator,
    kinds: Sequence[Rows],
    capacity: int,
    *,
    positions: int,
    buckets: int,
    device: str,
    tile: int = TILE_TOKENS,
) -> Made:
    """One token for each row of `kinds`; `capacity` batch rows, of which it takes random ones; runs up to `tile`."""
    counts = [len(rows) for rows in kinds]
    first = np.cumsum([0, *counts])
    total = int(first[-1])
    source = np.zeros(capacity, np.int32)
    raw = bytearray(8)
    for kind, rows in enumerate(kinds):
        raw += bytes(4 * int(rng.integers(0, 5)))
        step = rows.dtype.itemsize
        assert step % 4 == 0
        source[first[kind] : first[kind + 1]] = len(raw) + step * np.arange(len(rows))
        raw += np.ascontiguousarray(rows).tobytes()
    tiles = [
        (kind, int(first[kind]) + start, min(tile, count - start), 0)
        for kind, count in enumerate(counts)
        for start in range(0, count, tile)
    ]
    row = np.zeros(capacity, np.int32)
    row[:total] = rng.permutation(capacity)[:total]

    def on_device(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    batch = TokenBatch(
        tiles=on_device(np.array([*tiles, (-1, 0, 0, 0), (-1, 7, 9, 0)], np.int32)),
        row=on_device(row),
        source=on_device(source),
        position=on_device(rng.integers(0, positions, capacity).astype(np.int32)),
        bucket=on_device(rng.integers(0, buckets, capacity).astype(np.int32)),
        raw=on_device(np.frombuffer(bytes(raw), np.uint8).copy()),
    )
    return Made(batch, first.tolist())


def random_rows(rng: np.random.Generator, dtype: np.dtype[np.void], count: int) -> Rows:
    """Ids over all of int64, its ends among them; times from 0 on; dense values normal."""
    rows = np.zeros(count, dtype)
    for name in dtype.names or ():
        shape = rows[name].shape
        if name == "time_ms":
            rows[name] = rng.integers(0, 2 * 10**12, shape)
            rows[name][: count // 4] = rng.integers(0, 5, count // 4) * 3_600_000 - np.arange(count // 4) % 2
            rows[name] = np.maximum(rows[name], 0)
        elif rows[name].dtype.kind == "f":
            rows[name] = rng.standard_normal(shape)
        else:
            rows[name] = rng.integers(-(2**63), 2**63 - 1, shape, endpoint=True)
            rows[name][:4] = [-(2**63), 2**63 - 1, -1, 0][:count]
    return rows
