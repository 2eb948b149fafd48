"""KuaiRand: one CSV row an exposure; a user's exposures less than a second apart are one request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mtserve.trace.csr import rank_in_group
from mtserve.trace.importers.assemble import Draft, number_users
from mtserve.trace.importers.config import ImportConfig, keeps
from mtserve.trace.schema import Ints, Progress, TraceLimits
from mtserve.trace.text import Columns, csv_columns

WANTED = {"user_id": np.int64, "video_id": np.int64, "time_ms": np.int64, "is_click": np.int64}
ACTION_BITS = {"is_click": 1, "is_like": 2, "is_follow": 4, "is_comment": 8, "is_forward": 16, "is_hate": 32,
               "long_view": 64}  # fmt: skip
"""Bits of a click's action; columns a file lacks stay 0."""


def read(paths: Sequence[Path], config: ImportConfig, limits: TraceLimits, progress: Progress | None) -> Draft:
    """All exposures of the files, in whatever order, grouped to requests.

    A request's time is that of its first exposure; a request of more than `limits.candidates`
    is split (counted as requests_split). Uses request_gap_ms, user_share, seed.
    """
    optional = {name: np.int64 for name in ACTION_BITS if name not in WANTED}
    blocks = [_exposures(block, config) for path in paths for block in csv_columns(path, WANTED, optional, progress)]
    ids, items, t_ms, actions = (
        np.concatenate([np.empty(0, dtype=np.int64), *(block[column] for block in blocks)]) for column in range(4)
    )
    del blocks
    user_ids, user = number_users(ids)
    order = np.lexsort((t_ms, user))
    return _grouped(user_ids, user[order], t_ms[order], items[order], actions[order], config, limits)


def _exposures(block: Columns, config: ImportConfig) -> tuple[Ints, Ints, Ints, Ints]:
    kept = keeps(block["user_id"], config)
    actions = np.zeros(int(kept.sum()), dtype=np.int64)
    for name, bit in ACTION_BITS.items():
        if name in block:
            actions |= np.where(block[name][kept] != 0, bit, 0)
    # Copies, so that the parsed block with all its columns can go.
    return block["user_id"][kept].copy(), block["video_id"][kept].copy(), block["time_ms"][kept].copy(), actions


def _grouped(
    user_ids: list[str], user: Ints, t_ms: Ints, items: Ints, actions: Ints, config: ImportConfig, limits: TraceLimits
) -> Draft:
    """The draft of exposures sorted by user and time."""
    starts = np.ones(len(user), dtype=np.bool_)
    starts[1:] = (np.diff(user) != 0) | (np.diff(t_ms) >= config.request_gap_ms)
    splits = rank_in_group(np.cumsum(starts)) % limits.candidates == 0
    first = np.flatnonzero(splits)
    request = np.cumsum(splits) - 1
    clicked = (actions & ACTION_BITS["is_click"]) != 0
    return Draft(
        user_ids=user_ids,
        user=user[first],
        t_ms=t_ms[first],
        cand_lengths=np.diff(first, append=len(user)),
        cand=items,
        clicked_lengths=np.bincount(request[clicked], minlength=len(first)),
        clicked=items[clicked],
        actions=actions[clicked],
        changes={"requests_split": int(splits.sum() - starts.sum())},
    )
