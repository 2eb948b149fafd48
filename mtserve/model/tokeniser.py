"""From feature rows to tokens: features embedded, concatenated, and an MLP to one token.

Position and time enter a behaviour's token in a way that later requests cannot change: the
position counts from the first behaviour of the generation, the time is absolute (hour of the
week) or relative to the behaviour before. What is relative to "now" belongs to the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import silu

from mtserve.kernels.token_embedding.reference import HOUR_MS, HOURS_OF_WEEK
from mtserve.model.embedding import HashedTables
from mtserve.model.schema import Feature
from mtserve.types import Rows

Array: TypeAlias = npt.NDArray[Any]

GAP_BUCKETS = 64


def _gap_threshold(bucket: int) -> int:
    """The smallest gap, ms, with 2 log2(1 + seconds) >= bucket: (1000 + gap)^2 >= 10^6 * 2^bucket, in integers."""
    return math.isqrt((10**6 << bucket) - 1) + 1 - 1000


# Whatever computes buckets compares with these, so that no two paths round differently.
GAP_THRESHOLDS_MS = np.array([_gap_threshold(bucket) for bucket in range(GAP_BUCKETS)], dtype=np.int64)


def gap_buckets(gap_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """int32 [n] in [0, 64): two buckets an octave of 1 + seconds; 0 for gaps under 415 ms or none."""
    return np.searchsorted(GAP_THRESHOLDS_MS[1:], gap_ms, side="right").astype(np.int32)


def hours_of_week(time_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64 [n] in [0, 168), UTC; hour 0 is where 1 January 1970 began."""
    return time_ms // HOUR_MS % HOURS_OF_WEEK


@dataclass(frozen=True)
class KindTokens:
    """Tokens of one kind; the last three are integers.

    `features` [n] feature rows (those of U feature k: the user's), candidates' `time_ms` resolved. `destinations`
    [n]: the row each token goes to. `position` [n]: a behaviour's place from its generation's first. `bucket` [n]:
    of a behaviour's gap to the one before (0 for a generation's first), or of a candidate's recency (its exposure
    minus the last visible behaviour's time).
    """

    features: Rows
    destinations: npt.NDArray[np.int64]
    position: npt.NDArray[np.integer]
    bucket: npt.NDArray[np.integer]


@dataclass(frozen=True)
class TokenInputs:
    """What the tokens of `rows` rows are made of: each U feature's, then behaviours, then candidates."""

    rows: int
    kinds: tuple[KindTokens, ...]


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
