"""Whether cached scores are what they must be: against the run without a cache, and against the fp32 truth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mtserve.model.cut import cut_history
from mtserve.model.ranking import RankingModel
from mtserve.trace.replay.features import TraceRows
from mtserve.trace.replay.run_log import RunLog
from mtserve.trace.schema import Ints

FLOAT32_TOLERANCE = 1e-5
REFERENCE_RATIO = 1.2
"""How much further from the fp32 reference than the uncached scores the cached ones may be, in relative L2."""
CHANCE = 1.0
"""Of a sample of n requests, CHANCE / sqrt(n) times further still: what rounds alike is not alike in two requests."""

FORMAT_ERRORS = {"kv": 0.0, "kv8": 5e-3, "x8": 5e-3, "x4": 8e-2}
"""Relative L2 of the logits that a host format may add, by `host_format`. Small models with short histories have most of
it: over 20 behaviours and random weights x4 had 0.060 to 0.068; benchmarks/bench_formats.py measures far less."""

GPU_FORMAT_ERRORS = {"native": 0.0, "fp8": 5e-2}
"""As FORMAT_ERRORS, by `gpu_format`; it comes on top. Small models with short histories come near it."""

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """Two sets of logits of the same requests. Zeros when no request was compared."""

    requests: int = 0
    max_score: float = 0.0
    max_logit: float = 0.0
    max_relative_l2: float = 0.0  # the largest of a request
    relative_l2: float = 0.0  # of all logits together


@dataclass(frozen=True)
class Verification:
    """A sample of requests against a full fp32 recompute on the CPU."""

    requests: int
    skipped_longer: int  # requests too long to be in the sample
    longest_tokens: int
    cached: Difference
    uncached: Difference | None  # None without a baseline


@dataclass(frozen=True)
class Agreement:
    """The verdict and what it rests on. `broken` holds one line for each rule that does not hold."""

    compared: Difference
    verified: Verification
    broken: tuple[str, ...]
    tolerance: float | None  # on score differences; None where the rule is REFERENCE_RATIO

    @property
    def holds(self) -> bool:
        return not self.broken


def difference(ours: Logits, theirs: Logits, offsets: Ints) -> Difference:
    """Compare [C, tasks] logits, rows offsets[i]:offsets[i + 1] being request i's; `theirs` is what is relative to."""
    if len(offsets) < 2:
        return Difference()
    ours64, theirs64 = ours.astype(np.float64), theirs.astype(np.float64)
    gap = np.abs(ours64 - theirs64)
    squares = np.add.reduceat((gap**2).sum(1), offsets[:-1])
    norms = np.add.reduceat((theirs64**2).sum(1), offsets[:-1])
    return Difference(
        requests=len(offsets) - 1,
        max_score=float(np.abs(_sigmoid(ours64) - _sigmoid(theirs64)).max()),
        max_logit=float(gap.max()),
        max_relative_l2=float(np.sqrt(squares / np.maximum(norms, 1e-300)).max()),
        relative_l2=float(np.sqrt(squares.sum() / max(norms.sum(), 1e-300))),
    )


def _sigmoid(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 0.5 * (1.0 + np.tanh(0.5 * logits))


def select(run: RunLog, requests: Ints) -> tuple[Logits, Ints]:
    """The logits of some requests, one after the other, and their offsets."""
    parts = [run.logits[run.cand_offsets[i] : run.cand_offsets[i + 1]] for i in requests.tolist()]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
    return np.concatenate(parts) if parts else run.logits[:0], offsets


def compare(cached: RunLog, baseline: RunLog) -> Difference:
    """Every request that both runs answered."""
    both = np.flatnonzero(cached.done[: baseline.requests] & baseline.done)
    ours, offsets = select(cached, both)
    return difference(ours, select(baseline, both)[0], offsets)


def misplaced(run: RunLog, rows: TraceRows) -> int:
    """Answered requests that were not scored on the history that the trace gives them."""
    expected = rows.trace.prefix_lengths()[: run.requests]
    return int((run.done & (run.position != expected)).sum())


def verify(
    model: RankingModel,
    rows: TraceRows,
    cached: RunLog,
    baseline: RunLog | None,
    *,
    requests: int,
    max_tokens: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Verification:
    """`requests` random answered requests of at most `max_tokens` prefix tokens against `reference.recompute`.

    model: as served; its weights are taken as they are, in fp32 on the CPU. The reference's cost grows
    with the square of the length.
    """
    from mtserve.model.reference import recompute

    answered = cached.done.copy()
    if baseline is not None:
        answered[baseline.requests :] = False
        answered[: baseline.requests] &= baseline.done
    short = np.flatnonzero(answered & (cached.prefix_tokens + rows.trace.cand_lengths[: cached.requests] <= max_tokens))
    picks = np.sort(np.random.default_rng(seed).permutation(short)[:requests])
    truth: list[Logits] = []
    reference = copy.deepcopy(model).to("cpu", torch.float32) if len(picks) else model
    with torch.inference_mode():
        for done, index in enumerate(picks.tolist(), 1):
            candidates = rows.candidates(rows.trace.request(index))
            history = rows.history_at(index)
            assert cut_history(history.position, model.config).kept <= max_tokens
            truth.append(recompute(reference, history, candidates).numpy())
            progress(done)
    ours, offsets = select(cached, picks)
    expected = np.concatenate(truth) if truth else ours
    uncached = None if baseline is None else difference(select(baseline, picks)[0], expected, offsets)
    return Verification(
        requests=len(picks),
        skipped_longer=int(answered.sum()) - len(short),
        longest_tokens=int(cached.prefix_tokens[picks].max(initial=0)),
        cached=difference(ours, expected, offsets),
        uncached=uncached,
    )


def added_error(host_format: str, gpu_format: str) -> tuple[float, str]:
    """Relative L2 of the logits that the two formats may add together, and the names of those that add any."""
    errors = {host_format: FORMAT_ERRORS[host_format], gpu_format: GPU_FORMAT_ERRORS[gpu_format]}
    return sum(errors.values()), " and ".join(name for name, error in errors.items() if error)


def allowed_ratio(requests: int) -> float:
    """REFERENCE_RATIO of a sample of so many requests, 1 or more."""
    return REFERENCE_RATIO * (1 + CHANCE / math.sqrt(requests))


def judge(
    dtype: str,
    compared: Difference,
    verified: Verification,
    misplaced_requests: int,
    failed: int,
    host_format: str = "kv",
    gpu_format: str = "native",
) -> Agreement:
    """The exactness contract, as far as this replay can tell.

    float32 and lossless: scores equal to FLOAT32_TOLERANCE, cached against uncached and against the reference. Else the
    cached logits' distance from the reference, over a sample, is at most `allowed_ratio` times the uncached ones' and what
    the formats may add; and, over all requests that both runs answered, they are no further from the uncached ones than
    both may be from the reference together.
    """
    added, formats = added_error(host_format, gpu_format)
    broken = []
    if misplaced_requests:
        broken.append(f"{misplaced_requests} requests were scored on another history than the trace gives them")
    if failed:
        broken.append(f"{failed} requests failed")
    if dtype == "float32" and not added:
        for what, found in (("the uncached run", compared), ("the fp32 reference", verified.cached)):
            if not found.max_score <= FLOAT32_TOLERANCE:
                broken.append(f"scores differ from {what} by {found.max_score:.3g}, more than {FLOAT32_TOLERANCE:g}")
        return Agreement(compared, verified, tuple(broken), FLOAT32_TOLERANCE)
    if verified.uncached is not None and verified.requests:
        ratio, rounding = allowed_ratio(verified.requests), verified.uncached.relative_l2
        beyond = f" and the {added:g} of {formats}" if added else ""
        for what, found, times in (
            ("the fp32 reference", verified.cached, ratio),
            ("the uncached ones, all requests together,", compared, 1 + ratio),
        ):
            if not found.relative_l2 <= times * rounding + added:
                broken.append(
                    f"the cached logits are {found.relative_l2:.3g} (relative L2) from {what} more than {times:.3g} times "
                    f"the uncached ones' {rounding:.3g} from the reference{beyond}"
                )
    elif dtype == "float32" and verified.requests and not verified.cached.relative_l2 <= added:
        broken.append(
            f"the logits are {verified.cached.relative_l2:.3g} (relative L2) from the fp32 reference, more than the "
            f"{added:g} of {formats}"
        )
    return Agreement(compared, verified, tuple(broken), None)
