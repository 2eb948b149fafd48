"""Small demands without a trace."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtserve.trace.simulate.demand import Demand


def demand(user: list[int], tokens: list[int], *, users: int | None = None) -> Demand:
    """One request a second of one generation; `tokens` are each request's prefix."""
    count = len(user)
    column = np.array(tokens, dtype=np.int32)
    zeros = np.zeros(count, dtype=np.int32)
    return Demand(
        users=max(user) + 1 if users is None else users,
        user=np.array(user, dtype=np.int32),
        t_s=np.arange(count, dtype=np.float64),
        candidates=np.ones(count, dtype=np.int32),
        tokens=column,
        generation=zeros,
        frozen=zeros,
        tokens_after=column,
        generation_after=zeros,
        frozen_after=zeros,
    )


def growing(rng: np.random.Generator, users: int, requests: int, longest: int = 200) -> Demand:
    """Users of very different activity, whose prefixes grow by up to 30 tokens from request to request."""
    share = rng.permutation((1.0 + np.arange(users)) ** -1.0)
    user = rng.choice(users, requests, p=share / share.sum())
    now: npt.NDArray[np.int64] = rng.integers(1, longest, users)
    tokens = []
    for number in user.tolist():
        tokens.append(int(now[number]))
        now[number] += rng.integers(0, 30)
    return demand(user.tolist(), tokens, users=users)
