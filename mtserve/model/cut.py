"""Where a history is cut into what is dropped, the static S and the real-time R.

A pure function of how many behaviours there are, so that a restart, a replica and a caller who
sends the whole history agree without a word. With m = max_realtime and h = max_history:

    R holds the last 1..m behaviours; when an append would pass m, R is folded into S.
    S + R hold at most h; when an append would pass h, the oldest are dropped down to the
    low-water mark, in steps that are multiples of m, so that both cuts fall together.

A new cut is a new generation: its states have nothing in common with the old ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtserve.config import ModelConfig


@dataclass(frozen=True)
class Cut:
    """Behaviours [start, static_end) are S, [static_end, end) are R; those before `start` are not used."""

    start: int
    static_end: int
    end: int

    @property
    def kept(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Cuts:
    """The cuts of N histories: int64 [N] each, as in Cut."""

    start: npt.NDArray[np.int64]
    static_end: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]

    @property
    def kept(self) -> npt.NDArray[np.int64]:
        return self.end - self.start


def recut_step(config: ModelConfig) -> int:
    """How many behaviours one re-cut drops."""
    step = max(1, round(config.max_history * (1.0 - config.history_low_water)))
    if config.static_history:
        step = -(-step // config.max_realtime) * config.max_realtime
    return min(step, config.max_history)


def cut_history(position: int, config: ModelConfig, first: int = 0) -> Cut:
    """The cut of a history of `position` behaviours of which those before `first` are gone."""
    assert 0 <= first <= position
    step = recut_step(config)
    over = max(0, position - config.max_history)
    start = max(first, -(-over // step) * step)
    if not config.static_history:
        return Cut(start, start, position)
    folded = (position - 1) // config.max_realtime * config.max_realtime if position else 0
    return Cut(start, max(start, folded), position)


def cut_histories(positions: npt.NDArray[np.int64], config: ModelConfig) -> Cuts:
    """`cut_history` of each of `positions` [N], of which nothing is gone."""
    step = recut_step(config)
    over = np.maximum(0, positions - config.max_history)
    start = -(-over // step) * step
    if not config.static_history:
        return Cuts(start, start, positions)
    folded = np.maximum(0, positions - 1) // config.max_realtime * config.max_realtime
    return Cuts(start, np.maximum(start, folded), positions)
