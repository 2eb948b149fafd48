"""Feature rows to tokens, the truth: Linear2(SiLU(Linear1(features))) and the tables added, token by token."""

from __future__ import annotations

import torch

from mtserve.kernels.token_embedding.batch import TokenBatch
from mtserve.kernels.token_embedding.weights import Column, KindWeights, TokenWeights

HOUR_MS = 3_600_000
HOURS_OF_WEEK = 168
_WORD = (1 << 64) - 1


def token_embedding(weights: TokenWeights, batch: TokenBatch, x: torch.Tensor) -> None:
    """Writes x [rows, d] in the rows of the batch's tokens, and no others."""
    raw = batch.raw.cpu().numpy().tobytes()
    for kind, first, tokens, _ in batch.tiles.tolist():
        if kind < 0:
            continue
        for token in range(first, first + tokens):
            row = raw[int(batch.source[token]) :]
            value = _mlp(weights.kinds[kind], row)
            for table, index in _added(weights, kind, row, int(batch.position[token]), int(batch.bucket[token])):
                value = value + table[index].float().cpu()
            x[int(batch.row[token])] = value


def _mlp(kind: KindWeights, row: bytes) -> torch.Tensor:
    features = torch.cat([_values(column, row) for column in kind.columns])
    hidden = kind.input_weight.float().cpu() @ features + kind.input_bias.float().cpu()
    return kind.output_weight.float().cpu() @ (hidden * torch.sigmoid(hidden)) + kind.output_bias.float().cpu()


def _values(column: Column, row: bytes) -> torch.Tensor:
    """float32 [width] inputs of one column."""
    if column.table is None:
        cell = bytearray(row[column.offset : column.offset + 4 * column.width])
        return torch.frombuffer(cell, dtype=torch.float32)
    index = splitmix64(_int64(row, column.offset) & _WORD ^ column.salt) % len(column.table)
    return column.table[index].float().cpu()


def splitmix64(value: int) -> int:
    """The unsigned 64-bit hash of one (Steele, Lea, Flood, 2014)."""
    z = (value + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def _int64(row: bytes, offset: int) -> int:
    return int.from_bytes(row[offset : offset + 8], "little", signed=True)


def _added(weights: TokenWeights, kind: int, row: bytes, position: int, bucket: int) -> list[tuple[torch.Tensor, int]]:
    """The tables added to a token, each with its row."""
    if kind < weights.behaviours:
        return []
    hour = _int64(row, 0) // HOUR_MS % HOURS_OF_WEEK
    if kind == weights.behaviours:
        return [(weights.position, position), (weights.gap, bucket), (weights.hour, hour)]
    return [(weights.recency, bucket), (weights.hour, hour)]
