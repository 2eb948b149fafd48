"""Where requests found their prefixes, as shares: one definition for replays and simulations."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mtserve.trace.csr import rank_in_group
from mtserve.trace.schema import SmallInts

TIER_NAMES = ("cold", "host", "gpu")


class Found(Protocol):
    """N requests, those that are `done` with where their prefixes were; `tier` [N] is an index into TIER_NAMES."""

    @property
    def done(self) -> npt.NDArray[np.bool_]: ...
    @property
    def tier(self) -> npt.NDArray[np.int8]: ...
    @property
    def prefix_tokens(self) -> npt.NDArray[Any]: ...
    @property
    def gpu_tokens(self) -> npt.NDArray[Any]: ...
    @property
    def host_tokens(self) -> npt.NDArray[Any]: ...


def tiers_of(gpu_tokens: npt.NDArray[Any], host_tokens: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """int8 [N]: the slowest tier that each prefix came from, as `ScoreResult.tier` says it, by its index in TIER_NAMES."""
    warm = np.where(gpu_tokens > 0, TIER_NAMES.index("gpu"), TIER_NAMES.index("cold"))
    return np.where(host_tokens > 0, TIER_NAMES.index("host"), warm).astype(np.int8)


def hit_ratio(run: Found, among: npt.NDArray[np.bool_] | None = None) -> dict[str, dict[str, float]]:
    """By request and by token, per tier and in total; `among` [N] picks requests."""
    picked = run.done if among is None else run.done & among
    requests = max(1, int(picked.sum()))
    tokens = max(1, int(run.prefix_tokens[picked].sum(dtype=np.int64)))
    by_request = {
        name: float((run.tier[picked] == TIER_NAMES.index(name)).sum()) / requests for name in ("gpu", "host")
    }
    by_token = {
        name: int(column[picked].sum(dtype=np.int64)) / tokens
        for name, column in (("gpu", run.gpu_tokens), ("host", run.host_tokens))
    }
    return {
        "request": {**by_request, "total": sum(by_request.values())},
        "token": {**by_token, "total": sum(by_token.values())},
    }


def asked_before(user: SmallInts) -> npt.NDArray[np.bool_]:
    """[N] whether each request's user, int32 [N], has asked before."""
    order = np.argsort(user, kind="stable")
    result = np.empty(len(user), dtype=np.bool_)
    result[order] = rank_in_group(user[order]) > 0
    return result
