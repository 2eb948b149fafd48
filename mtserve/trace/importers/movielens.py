"""MovieLens: each rating is a request in which the rated item was clicked among sampled others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mtserve.errors import InvalidArgument
from mtserve.trace.importers.assemble import Draft, number_users
from mtserve.trace.importers.config import ImportConfig, keeps
from mtserve.trace.schema import Ints, Progress, TraceLimits
from mtserve.trace.text import csv_columns

WANTED = {"userId": np.int64, "movieId": np.int64, "rating": np.float64, "timestamp": np.int64}
REDRAWS = 20
BLOCK = 1 << 18
MAX_TIMESTAMP = 1 << 40  # seconds; keeps ms within int64


def read(paths: Sequence[Path], config: ImportConfig, limits: TraceLimits, progress: Progress | None) -> Draft:
    """A click's action is twice the rating: 1 (half a star) to 10.

    `negatives` further candidates are drawn evenly from the file's items, none twice and none
    that the user rated at any time; users who rated nearly everything get some that they did
    (counted as negatives_rated). The rated item's place among them is drawn too. Uses
    negatives, user_share, seed.
    """
    blocks = [block for path in paths for block in csv_columns(path, WANTED, {}, progress)]
    columns = {name: np.concatenate([np.empty(0, kind), *(b[name] for b in blocks)]) for name, kind in WANTED.items()}
    catalogue = np.unique(columns["movieId"])
    kept = keeps(columns["userId"], config)
    user_ids, user = number_users(columns["userId"][kept])
    rating, seconds = columns["rating"][kept], columns["timestamp"][kept]
    _check("rating", (rating >= 0) & (rating <= 100))
    _check("timestamp", (seconds >= 0) & (seconds <= MAX_TIMESTAMP))
    item = np.searchsorted(catalogue, columns["movieId"][kept])
    negatives = min(config.negatives, max(len(catalogue) - 1, 0), limits.candidates - 1)
    cand, rated = _with_negatives(np.random.default_rng(config.seed), user, item, len(catalogue), negatives)
    ones = np.ones(len(user), dtype=np.int64)
    return Draft(
        user_ids=user_ids, user=user, t_ms=seconds * 1000,
        cand_lengths=ones * (negatives + 1), cand=catalogue[cand.reshape(-1)],
        clicked_lengths=ones, clicked=catalogue[item],
        actions=np.rint(rating * 2).astype(np.int64), changes={"negatives_rated": rated},
    )  # fmt: skip


def _check(name: str, right: npt.NDArray[np.bool_]) -> None:
    if not right.all():
        raise InvalidArgument(f"imported row {int(np.argmin(right)) + 1} is out of range", field=name)


def _with_negatives(rng: np.random.Generator, user: Ints, item: Ints, items: int, negatives: int) -> tuple[Ints, int]:
    """(item numbers [ratings, negatives + 1], how many negatives the user rated after all)."""
    seen = np.unique(user * items + item)
    cand = np.empty((len(user), negatives + 1), dtype=np.int64)
    rated = 0
    for first in range(0, len(user), BLOCK):
        part = slice(first, first + BLOCK)
        cand[part, 0] = item[part]
        rated += _draw(rng, user[part], cand[part], items, seen)
        # The rated item trades places with a drawn one, or stays.
        place = rng.integers(0, negatives + 1, len(cand[part]))
        rows = np.arange(first, first + len(place))
        cand[rows, 0], cand[rows, place] = cand[rows, place], cand[rows, 0].copy()
    return cand, rated


def _draw(rng: np.random.Generator, user: Ints, cand: Ints, items: int, seen: Ints) -> int:
    """Fill columns 1.. of `cand` with distinct items unlike column 0; returns how many of them `seen` holds."""
    cand[:, 1:] = rng.integers(0, items, (len(cand), cand.shape[1] - 1))
    active, redraws, rated_in_all = np.arange(len(cand)), 0, 0
    while len(active):
        rows = cand[active]
        rated = _is_seen(user[active], rows, items, seen)
        again = _repeats(rows) | (rated & (redraws < REDRAWS))
        unfinished = again.any(axis=1)
        rated_in_all += int(rated[~unfinished].sum())
        if redraws < REDRAWS:
            rows[again] = rng.integers(0, items, int(again.sum()))
        else:
            rows[again] = (rows[again] + 1) % items
        cand[active] = rows
        active, redraws = active[unfinished], redraws + 1
    return rated_in_all


def _repeats(cand: Ints) -> npt.NDArray[np.bool_]:
    """[rows, places] whether an earlier place of the row holds the same item."""
    order = np.argsort(cand, axis=1, kind="stable")
    ordered = np.take_along_axis(cand, order, axis=1)
    repeats = np.zeros(cand.shape, dtype=np.bool_)
    np.put_along_axis(repeats, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeats


def _is_seen(user: Ints, cand: Ints, items: int, seen: Ints) -> npt.NDArray[np.bool_]:
    """[rows, places] whether the user rated the item; False in place 0, the rated item itself."""
    keys = user[:, None] * items + cand
    found = seen[np.minimum(np.searchsorted(seen, keys), len(seen) - 1)] == keys
    found[:, 0] = False
    return found
