"""From feature rows to tokens: features embedded, concatenated, and an MLP to one token.

Position and time enter a behaviour's token in a way that later requests cannot change: the
position counts from the first behaviour of the generation, the time is absolute (hour of the
week) or relative to the behaviour before. What is relative to "now" belongs to the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import silu

from mtserve.model.embedding import HashedTables
from mtserve.model.schema import Feature
from mtserve.types import Rows

Array: TypeAlias = npt.NDArray[Any]
Upload: TypeAlias = Callable[[Sequence[Array]], list[torch.Tensor]]
"""Brings arrays to the model's device, in their order."""

GAP_BUCKETS = 64
HOURS_OF_WEEK = 168
_HOUR_MS = 3_600_000


def gap_buckets(gap_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64 [n] in [0, 64): two buckets an octave of seconds; 0 for gaps under 1 s or none."""
    seconds = np.maximum(gap_ms, 0) / 1000.0
    return np.minimum(2.0 * np.log2(1.0 + seconds), GAP_BUCKETS - 1).astype(np.int64)


def hours_of_week(time_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64 [n] in [0, 168), UTC; hour 0 is where 1 January 1970 began."""
    return time_ms // _HOUR_MS % HOURS_OF_WEEK


@dataclass(frozen=True)
class TokenInputs:
    """What the tokens of one batch are made of, and the row each goes to. Destinations are int64.

    `user_rows` [u] with `user_destinations` [u, U features], -1 where that token is cached.
    `behaviours` [b] with `positions` [b] (from the generation's first behaviour), `gap_ms` [b]
    (to the behaviour before, 0 for the generation's first) and `behaviour_destinations` [b].
    `candidates` [c], `time_ms` resolved, with `recency_ms` [c] (exposure minus the last visible
    behaviour's time) and `candidate_destinations` [c].
    """

    rows: int
    user_rows: Rows
    user_destinations: npt.NDArray[np.int64]
    behaviours: Rows
    positions: npt.NDArray[np.int64]
    gap_ms: npt.NDArray[np.int64]
    behaviour_destinations: npt.NDArray[np.int64]
    candidates: Rows
    recency_ms: npt.NDArray[np.int64]
    candidate_destinations: npt.NDArray[np.int64]


class Tokeniser(nn.Module):
    """[n] feature rows to [n, d] tokens: embed, concatenate, Linear, SiLU, Linear."""

    def __init__(self, features: tuple[Feature, ...], d: int) -> None:
        super().__init__()
        self.features = features
        self.input = nn.Linear(sum(feature.encoded_width for feature in features), d)
        self.output = nn.Linear(d, d)

    def feed(self, rows: Rows, tables: HashedTables) -> list[Array]:
        """One array a feature, in their order: int64 [n] rows of its table, or float32 [n, width] values."""
        return [
            tables.indices(feature.table, rows[feature.name])
            if feature.kind == "categorical"
            else np.ascontiguousarray(rows[feature.name])
            for feature in self.features
        ]

    def forward(self, columns: Sequence[torch.Tensor], tables: HashedTables) -> torch.Tensor:
        """[n, d] tokens of what `feed` gave, on the device."""
        parts = [
            tables(feature.table, column) if feature.kind == "categorical" else column.to(self.input.weight.dtype)
            for feature, column in zip(self.features, columns, strict=True)
        ]
        tokens: torch.Tensor = self.output(silu(self.input(torch.cat(parts, dim=-1))))
        return tokens
