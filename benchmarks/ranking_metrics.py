"""How well candidates are ranked, and how alike two rankings are: AUC and Kendall's tau in plain numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


def auc(scores: Floats, labels: npt.NDArray[np.bool_]) -> float:
    """Chance that a positive of `labels` [n] scores above a negative, ties counting half (Mann and Whitney, 1947).

    Raises ValueError without a positive or without a negative.
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        raise ValueError(f"labels: {positives} positives and {negatives} negatives; needs one of each at least")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of equal scores the mean of their ranks
    return float((ranks[place][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def kendall_tau(ours: Floats, theirs: Floats) -> float:
    """Kendall's tau-b of two scores [n] of the same candidates: 1 for the same order, -1 for the opposite (1945).

    Raises ValueError where one of them tells no two candidates apart.
    """
    above, below = (np.sign(scores[:, None] - scores[None, :]) for scores in (ours, theirs))
    told = float((above**2).sum() * (below**2).sum())
    if not told:
        raise ValueError("scores: all equal; they have no order")
    return float((above * below).sum() / np.sqrt(told))
