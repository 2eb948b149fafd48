"""Values that cross module borders: what is asked, what is answered, what was found where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Rows: TypeAlias = npt.NDArray[np.void]
"""A structured array of feature rows, one row a behaviour, candidate or user; see `FeatureSchema`."""

Chain: TypeAlias = npt.NDArray[np.uint64]
"""uint64 [tokens]: entry t is the chained xxhash of tokens 0..t, so equal entries mean equal prefixes."""

Clock: TypeAlias = Callable[[], float]
"""Seconds since the epoch. An argument wherever time is read, so that tests own it."""

MAX_USER_ID_BYTES = 256


@dataclass(frozen=True)
class History:
    """One user's behaviours as they stood at one moment; never a mix of two.

    `position` counts every behaviour ever appended, so row i of `behaviours` is number
    `first + i` and `position == first + len(behaviours)`: rows before `first` are gone.
    """

    features: Rows | None  # one row of U features, None until PutUser brought some
    first: int
    behaviours: Rows  # [position - first], time_ms never decreasing

    @property
    def position(self) -> int:
        return self.first + len(self.behaviours)


@dataclass(frozen=True)
class Request:
    """One `Score`: rank `candidates` for `user_id`.

    `candidates`: rows of `FeatureSchema.candidate`, whose `time_ms` is the exposure time
    in ms since the epoch, or -1 for "now, after every behaviour known".
    `deadline`: seconds on the engine's clock, None for none.
    `history`: the whole history, for callers that keep it themselves; nothing is stored then.
    """

    user_id: str
    candidates: Rows
    deadline: float | None = None
    history: History | None = None


class ScoreResult(NamedTuple):
    """Scores of one request and where its prefix was found.

    `scores`: float32 [candidates, tasks], sigmoid of the logits. Tokens sum:
    gpu_tokens + host_tokens + encoded_tokens == prefix_tokens.
    """

    scores: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    tasks: tuple[str, ...]
    position: int
    prefix_tokens: int
    gpu_tokens: int
    host_tokens: int
    encoded_tokens: int
    latency_s: float

    @property
    def tier(self) -> str:
        """ "gpu", "host" or "cold": the slowest tier that this request's prefix came from."""
        if self.host_tokens:
            return "host"
        return "gpu" if self.gpu_tokens else "cold"
