"""Least squares whose coefficients may not be negative."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def fit_nonnegative(terms: Floats, values: Floats) -> Floats:
    """float64 [m]: c >= 0 of the least |terms c - values|; `terms` float64 [n, m], `values` float64 [n], m small.

    Exact: of the ordinary solutions over each subset of the terms, those without a negative coefficient are compared;
    the constrained optimum is one of them, namely that over the terms which it uses.
    """
    n, m = terms.shape
    assert values.shape == (n,)
    best, least = np.zeros(m), float(values @ values)
    for size in range(1, m + 1):
        for chosen in map(list, combinations(range(m), size)):
            found = np.linalg.lstsq(terms[:, chosen], values, rcond=None)[0]
            rest = terms[:, chosen] @ found - values
            if (found >= 0).all() and float(rest @ rest) < least:
                best, least = np.zeros(m), float(rest @ rest)
                best[chosen] = found
    return best
