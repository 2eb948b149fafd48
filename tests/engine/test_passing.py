"""What encoding costs in a batch that runs anyway, held against a share of another batch."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import CAUSAL, SCHEMA, make_behaviours, small_config

from mtserve.engine.queue.pace import LINE_SAMPLES, Pace
from mtserve.engine.queue.passing import Passing
from mtserve.engine.request.sequence import SequenceBuilder, UserSequence
from mtserve.restore.costs import Costs
from mtserve.types import History

LAYERS, BATCH_S, TOKEN_S = 3, 0.5, 0.001
LONG = {"max_history": 20_000, "max_realtime": 20_000}
COSTS = Costs(
    link=(), load_s=0.0, batch_s=0.2, layer_s=0.1, row_s=1e-4, pair_s=1e-6, unpack_s=0.0, plan_row_s=1e-3
)  # fmt: skip


def sequence(tokens: int, **config: object) -> UserSequence:
    """A user whose prefix has so many tokens."""
    builder = SequenceBuilder(small_config(**{**LONG, **config}), SCHEMA, "weights")
    behaviours = make_behaviours(np.random.default_rng(0), tokens - len(SCHEMA.user))
    return builder.build("a", History(None, 0, behaviours))


def pace_of(largest: int) -> Pace:
    """Batches of up to `largest` tokens, each of which took BATCH_S and TOKEN_S for each."""
    pace, now = Pace(), 0.0
    for tokens in np.linspace(10, largest, LINE_SAMPLES).astype(int).tolist():
        began, now = now, now + BATCH_S + TOKEN_S * tokens
        pace.landed(began, now, tokens)
    return pace


@pytest.mark.parametrize(
    ("tokens", "users", "cheaper"), [(249, 2, True), (251, 2, False), (251, 1, True), (120, 4, True)]
)
def test_tokens_are_held_against_a_users_share_of_a_batch(tokens: int, users: int, cheaper: bool) -> None:
    passing = Passing(pace_of(1000), LAYERS)
    assert passing.cheaper(sequence(tokens), 0, tokens, users=users, token_s=0.002) == cheaper


def test_a_window_without_users_counts_as_one_user() -> None:
    assert Passing(pace_of(1000), LAYERS).cheaper(sequence(400), 0, 400, users=0, token_s=0.002)


def test_nobody_is_encoded_while_nothing_is_known_of_batches() -> None:
    assert not Passing(Pace(), LAYERS).cheaper(sequence(3), 0, 3, users=1, token_s=0.002)


def test_of_larger_batches_than_were_seen_the_best_rate_tells() -> None:
    """Small batches that all took the same say that tokens cost nothing, which is no reason to encode 20,000."""
    pace, now = Pace(), 0.0
    for tokens in range(10, 300):
        began, now = now, now + BATCH_S
        pace.landed(began, now, tokens)
    passing, rate = Passing(pace, LAYERS), pace.token_s(now)
    assert pace.line().token_s == 0
    assert passing.cheaper(sequence(200), 0, 200, users=8, token_s=rate)
    assert not passing.cheaper(sequence(20_000), 0, 20_000, users=1, token_s=rate)


def test_where_it_is_calibrated_what_encoding_costs_counts_rows_and_what_they_see() -> None:
    """300 causal tokens see 45,150 keys: 0.3 s of the loop, and in each layer 0.03 + 0.04515 s: 0.52545 s in all."""
    passing, user = Passing(Pace(), LAYERS), sequence(300, **CAUSAL)
    for batch_s, cheaper in ((0.225, False), (0.226, True)):  # and the layers' 0.3 s
        costs = Costs(**{**vars(COSTS), "batch_s": batch_s})
        passing.know(costs, frozen_sees_all=False)
        assert passing.cheaper(user, 0, 300, users=1, token_s=0.0) == cheaper
    assert passing.cheaper(user, 290, 300, users=8, token_s=0.0)  # ten tokens, which see 2,955 keys: 0.022 s


def test_static_histories_see_all_of_themselves() -> None:
    passing, user = Passing(Pace(), LAYERS), sequence(300, max_realtime=50)
    frozen = user.groups.frozen
    assert frozen > 100
    pairs = frozen * frozen + (300 * 301 - frozen * (frozen + 1)) // 2
    needed_s = 300 * COSTS.plan_row_s + LAYERS * (300 * COSTS.row_s + pairs * COSTS.pair_s)
    for less_s, cheaper in ((1e-9, False), (-1e-9, True)):
        costs = Costs(**{**vars(COSTS), "batch_s": needed_s - less_s - LAYERS * COSTS.layer_s})
        passing.know(costs, frozen_sees_all=True)
        assert passing.cheaper(user, 0, 300, users=1, token_s=0.0) == cheaper


def test_a_batch_costs_no_less_than_batches_of_late_did() -> None:
    """Clients, and graphs that are not captured yet, are in no calibration."""
    user = sequence(300, **CAUSAL)
    passing = Passing(pace_of(1000), LAYERS)
    passing.know(Costs(**{**vars(COSTS), "batch_s": 0.0, "layer_s": 0.0, "plan_row_s": 0.0}), frozen_sees_all=False)
    assert passing.cheaper(user, 0, 300, users=2, token_s=0.0)  # 0.225 s beside 0.25
    assert not passing.cheaper(user, 0, 300, users=3, token_s=0.0)
