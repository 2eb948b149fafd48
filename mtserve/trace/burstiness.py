"""How bursty arrivals are, hour by hour, so that the daily curve does not count as bursts."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtserve.trace.calendar import HOUR_S
from mtserve.trace.schema import Floats, Ints

WINDOWS_S = (1, 10, 60, 300)


def burst_figures(times_s: Floats, block_s: float = HOUR_S) -> dict[str, Any]:
    """Figures of arrivals at ascending `times_s` [N] seconds, over blocks of `block_s` pooled.

    `dispersion`: by window in seconds, variance over mean of the counts (1: Poisson); it grows with the
    rate. `load_variance`: what is left of the counts' variance after a Poisson process's, over the squared
    mean: that of the load itself relative to its mean, at any rate. `gap_scv`: squared coefficient of
    variation of the inter-arrival times (1: Poisson). `minute_correlation`: lag-1 autocorrelation of minute
    counts. A figure is None where there are too few arrivals for it. Every variance is about the mean of
    its own block.
    """
    block = (times_s // block_s).astype(np.int64)
    within = times_s - block * block_s
    variances = {window: _variances(block, within, window, block_s) for window in WINDOWS_S}
    return {
        "dispersion": {str(window): _ratio(*parts[:2]) for window, parts in variances.items()},
        "load_variance": {str(window): _ratio(parts[0] - parts[1], parts[2]) for window, parts in variances.items()},
        "gap_scv": _gap_scv(times_s, block),
        "minute_correlation": _minute_correlation(block, within, int(block_s // 60)),
    }


def _variances(block: Ints, within: Floats, window: int, block_s: float) -> tuple[float, float, float]:
    """Sums over blocks of the counts' variance, their mean, and their squared mean (without its own error)."""
    windows = int(block_s // window)
    if windows < 2:
        return 0.0, 0.0, 0.0
    whole = within < windows * window
    keys, counts = np.unique(block[whole] * windows + (within[whole] // window).astype(np.int64), return_counts=True)
    _, rows = np.unique(keys // windows, return_inverse=True)
    means = np.bincount(rows, weights=counts) / windows
    # Windows without an arrival add nothing to the squares.
    variances = (np.bincount(rows, weights=counts**2.0) - windows * means**2) / (windows - 1)
    squares = float((means**2).sum())
    known = squares - float(variances.sum()) / windows
    return float(variances.sum()), float(means.sum()), known if known > 1e-9 * squares else 0.0


def _gap_scv(times_s: Floats, block: Ints) -> float | None:
    inside = np.diff(block) == 0
    gaps, rows = np.diff(times_s)[inside], block[1:][inside]
    if len(gaps) < 2:
        return None
    _, rows, counts = np.unique(rows, return_inverse=True, return_counts=True)
    means = (np.bincount(rows, weights=gaps) / counts)[rows]
    return float(np.var(gaps[means > 0] / means[means > 0])) if (means > 0).any() else None


def _minute_correlation(block: Ints, within: Floats, minutes: int) -> float | None:
    whole = within < minutes * 60
    if not whole.any():
        return None
    _, rows = np.unique(block[whole], return_inverse=True)
    keys = rows * minutes + (within[whole] // 60).astype(np.int64)
    counts = np.bincount(keys, minlength=(int(rows[-1]) + 1) * minutes).reshape(-1, minutes)
    off = counts - counts.mean(axis=1, keepdims=True)
    return _ratio(float((off[:, 1:] * off[:, :-1]).sum()), float((off**2).sum()))


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None
