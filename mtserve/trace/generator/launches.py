"""Items that appear during the trace, are popular at once, and then less and less."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from mtserve.config import Config, option
from mtserve.trace.calendar import HOUR_MS
from mtserve.trace.csr import cuts
from mtserve.trace.generator.draft import Draft
from mtserve.trace.generator.tastes import repeats
from mtserve.trace.schema import Floats, Ints

MAX_LAUNCHES = 10_000
MOST_TOGETHER = 0.9  # share of candidates that all launched items take at most
OLD = 50.0  # half-lives after which an item is never seen again
BLOCK_REQUESTS = 1 << 17
BLOCK_CANDIDATES = 1 << 21


@dataclass(frozen=True)
class LaunchConfig(Config):
    """How many items appear, and how popular they are."""

    items: int = option(0, "items that appear during the trace, at drawn times", low=0, high=MAX_LAUNCHES)
    share: float = option(
        0.02, "share of all candidates that an item takes when it appears; no request lists it twice", low=0.0, high=1.0
    )
    half_life_hours: float = option(24.0, "time after which that share has halved", low=0.1, high=10_000.0, unit="h")


def launch(rng: np.random.Generator, config: LaunchConfig, draft: Draft, window_ms: int, items: int) -> Draft:
    """The draft with launched items in place of some candidates; what was clicked there stays clicked.

    Item number j, in the order of appearance, has the id items + 1 + j. Ids above `items` are not replaced.
    """
    born = np.sort(rng.random(config.items) * window_ms)
    half_ms = config.half_life_hours * HOUR_MS
    together = _together(born, half_ms)
    cand = draft.cand.copy()
    for first, last in cuts(draft.offsets, BLOCK_REQUESTS, BLOCK_CANDIDATES):
        part = slice(draft.offsets[first], draft.offsets[last])
        row = np.repeat(np.arange(first, last), np.diff(draft.offsets[first : last + 1]))
        t_ms = draft.t_ms[row]
        latest = np.searchsorted(born, t_ms, side="right") - 1
        age_ms = np.maximum(t_ms - born[latest], 0.0)
        share = config.share * together[latest] * np.exp2(-age_ms / half_ms)
        shown = (rng.random(len(row)) < np.minimum(share, MOST_TOGETHER)) & (latest >= 0)
        places = np.flatnonzero(shown & (cand[part] <= items))
        if not len(places):
            continue
        which = _which(rng.random(len(places)), latest[places], born, half_ms)
        again = repeats(row[places], which, config.items)
        kept = np.delete(np.arange(len(places)), again)
        cand[part.start + places[kept]] = items + 1 + which[kept]
    return dataclasses.replace(draft, cand=cand)


def _together(born: Floats, half_ms: float) -> Floats:
    """[n] popularity of all items at the moment when each appears, in units of a new one's."""
    sums = np.empty(len(born))
    total = 0.0
    for number, fade in enumerate(np.exp2(-np.diff(born, prepend=born[:1]) / half_ms)):
        total = total * fade + 1
        sums[number] = total
    return sums


def _which(draw: Floats, latest: Ints, born: Floats, half_ms: float) -> Ints:
    """[n] an item for each uniform `draw`, by popularity among those up to `latest` [n], which never decreases.

    All fade alike, so their shares among one another depend on the latest one alone.
    """
    chosen = np.empty(len(draw), dtype=np.int64)
    newest, starts = np.unique(latest, return_index=True)
    for number, start, end in zip(newest, starts, [*starts[1:], len(draw)], strict=True):
        oldest = np.searchsorted(born, born[number] - OLD * half_ms)
        sums = np.cumsum(np.exp2((born[oldest : number + 1] - born[number]) / half_ms))
        picks = np.searchsorted(sums, draw[start:end] * sums[-1], side="right")
        chosen[start:end] = oldest + np.minimum(picks, number - oldest)
    return chosen
