"""Hit ratio by size of one tier, for all sizes: miss-ratio curves, and what memory a target takes.

LRU's curve is that of every size at once, from how deep the sampled users' states lie when they are asked for again
(reuse.py), unless users are pinned. That of another policy is simulated at a few sizes, the sample in a tier scaled down like it (Waldspurger et
al., USENIX ATC 2017). sampling.py says why whole users are sampled, and what that leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mtserve.trace.hits import asked_before
from mtserve.trace.schema import Ints, Progress
from mtserve.trace.simulate.demand import Demand
from mtserve.trace.simulate.optimum import OPTIMUM, optimum
from mtserve.trace.simulate.reuse import lru_hits
from mtserve.trace.simulate.rounds import Rounds
from mtserve.trace.simulate.run import BatchLimits, simulate
from mtserve.trace.simulate.sampling import Sample, everybody, most_pages

LRU = "lru"
TARGETS = (0.90, 0.95, 0.99, 0.995)
POINTS = {True: 200, False: 16}  # of a curve; where all sizes come in one pass they cost nothing
SMALLEST_SHARE = 0.005  # of the pages that hold everything, where curves begin
BISECTIONS = 7  # of the step between two points in which a target is reached

Hits = Callable[[int], int]
"""Prefix tokens that are found in one tier, by its pages."""


class Answer(NamedTuple):
    """Pages of a tier that reaches `target`, a token hit ratio; None where not even one that holds everything does."""

    target: float
    pages: int | None


@dataclass(frozen=True)
class Curve:
    """Of one tier under `policy`: `ratio` float64 [P], the token hit ratio of a tier of `pages` int64 [P], rising.

    `after_first`: what to multiply a ratio with for that without each user's first request, which finds nothing in any
    tier. `answers` and `best`, the ratio of a tier that holds everything, are such.
    """

    policy: str
    pages: Ints
    ratio: npt.NDArray[np.float64]
    after_first: float
    answers: tuple[Answer, ...]

    @property
    def best(self) -> float:
        return float(self.ratio[-1]) * self.after_first


def curves(
    policies: Sequence[str], sample: Sample, demand: Demand, page_tokens: int, limits: BatchLimits, rounds: Rounds,
    progress: Progress,
) -> list[Curve]:  # fmt: skip
    """One of each of `policies`, of which OPTIMUM may be one, from `sample` of `demand`.

    progress: called with (points of all curves done, in all).
    """
    everything = int(most_pages(demand, page_tokens).sum())
    after_first = _after_first(demand)
    jobs = [
        partial(
            _curve, policy, sample, everything, after_first, partial(_hits, policy, sample.demand, page_tokens, limits)
        )
        for policy in policies
    ]
    return rounds.run(jobs, POINTS[False] + BISECTIONS * len(TARGETS), progress)


def lru_ratio(sample: Sample, pages: Ints, page_tokens: int) -> npt.NDArray[np.float64]:
    """float64 [P]: the token hit ratio of one tier of `pages` int64 [P] under LRU."""
    hits = lru_hits(sample.demand, page_tokens)
    scaled = np.array([sample.pages(size) for size in pages.tolist()])
    return hits[np.minimum(scaled, len(hits) - 1)] * sample.ratio_per_token


def sampling_error(sample: Sample, demand: Demand, page_tokens: int) -> float:
    """Mean |sampled - exact| of LRU's token hit ratio over the sizes of its curve; `sample` is of `demand`."""
    pages = _sizes(int(most_pages(demand, page_tokens).sum()), POINTS[True])
    apart = lru_ratio(sample, pages, page_tokens) - lru_ratio(everybody(demand), pages, page_tokens)
    return float(np.abs(apart).mean())


def _curve(
    policy: str, sample: Sample, everything: int, after_first: float, prepare: Callable[[], Hits], progress: Progress
) -> Curve:
    total = POINTS[False] + BISECTIONS * len(TARGETS)
    known: dict[int, float] = {}
    hits_of = prepare()

    def ratio(pages: int) -> float:
        scaled = sample.pages(pages)
        if scaled not in known:
            known[scaled] = hits_of(scaled) * sample.ratio_per_token
            progress(min(len(known), total - 1), total)
        return known[scaled]

    pages = _sizes(everything, POINTS[_in_one_pass(policy, sample.demand)])
    ratios = [ratio(size) for size in pages.tolist()]
    answers = tuple(Answer(target, _least(target / after_first, pages.tolist(), ratios, ratio)) for target in TARGETS)
    progress(total, total)
    return Curve(policy, pages, np.array(ratios), after_first, answers)


def _in_one_pass(policy: str, demand: Demand) -> bool:
    """Whether LRU decides alone, so that what is found in one size is found in any larger one."""
    return policy == LRU and demand.pins is None


def _sizes(everything: int, points: int) -> Ints:
    """int64: up to `points` sizes, each the same factor above the one before; the last holds `everything`."""
    return np.unique(np.geomspace(max(1.0, SMALLEST_SHARE * everything), everything, points).round().astype(np.int64))


def _hits(policy: str, demand: Demand, page_tokens: int, limits: BatchLimits) -> Hits:
    if _in_one_pass(policy, demand):
        hits = lru_hits(demand, page_tokens)
        return lambda pages: int(hits[min(pages, len(hits) - 1)])
    if policy == OPTIMUM:
        return lambda pages: int(optimum(demand, pages, page_tokens).sum(dtype=np.int64))

    def simulated(pages: int) -> int:
        run = simulate(demand, policy=policy, gpu_pages=pages, host_pages=0, page_tokens=page_tokens, limits=limits)
        return int(run.gpu_tokens.sum(dtype=np.int64))

    return simulated


def _after_first(demand: Demand) -> float:
    """All prefix tokens over those of requests that are not their user's first; 1 where there are no such."""
    repeats = asked_before(demand.user)
    tokens = demand.tokens.astype(np.int64)
    return float(tokens.sum() / tokens[repeats].sum()) if repeats.any() else 1.0


def _least(target: float, pages: Sequence[int], ratios: Sequence[float], ratio: Callable[[int], float]) -> int | None:
    """The least pages, to a 2^BISECTIONS-th of a step, with a `ratio` of `target`."""
    reached = next((place for place, found in enumerate(ratios) if found >= target), None)
    if reached is None:
        return None
    low, high = pages[reached - 1] if reached else 0, pages[reached]
    for _ in range(BISECTIONS):
        middle = (low + high) // 2
        if not low < middle < high:
            break
        low, high = (low, middle) if ratio(middle) >= target else (middle, high)
    return high
