"""What a trace asks of the cache, against a walk over the trace with the scalar rules."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from replay_world import small_trace
from small_models import CAUSAL, small_config

from mtserve.cache.keys import digest
from mtserve.config import ModelConfig
from mtserve.errors import InvalidArgument
from mtserve.model.cut import cut_history
from mtserve.trace.schema import Trace
from mtserve.trace.simulate.demand import COUNTS, Demand, demand_of
from mtserve.trace.working_set import working_set_pages

MODELS = [small_config(), small_config(max_history=60, max_realtime=7), small_config(**CAUSAL)]


def make_trace() -> Trace:
    return small_trace(users=9, requests=200, history=25)


@pytest.mark.parametrize("model", MODELS)
def test_every_request_needs_what_its_history_is_cut_to(model: ModelConfig) -> None:
    trace, user_tokens = make_trace(), 2
    demand = demand_of(trace, model, user_tokens)
    position = dict(enumerate(trace.history_lengths.tolist()))
    cuts: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for request in trace.iter_requests():
        found = []
        for clicks in (0, len(request.clicked)):
            position[request.user_index] += clicks
            cut = cut_history(position[request.user_index], model)
            known = cuts[request.user_index]
            if (cut.start, cut.static_end) not in known:
                known.append((cut.start, cut.static_end))
            frozen = user_tokens + cut.static_end - cut.start if model.static_attention == "full" else 0
            found.append((user_tokens + cut.kept, len(known) - 1, frozen))
        index = request.number
        assert (demand.tokens[index], demand.generation[index], demand.frozen[index]) == found[0]
        after = demand.tokens_after[index], demand.generation_after[index], demand.frozen_after[index]
        assert after == found[1]
        assert demand.candidates[index] == len(request.cand)
        assert demand.t_s[index] == request.t_ms / 1000
    assert max(map(len, cuts.values())) > 2
    np.testing.assert_array_equal(demand.user, trace.user)


@pytest.mark.parametrize("page_tokens", [1, 4, 32])
def test_the_working_set_is_that_of_a_replay(page_tokens: int) -> None:
    trace = make_trace()
    positions = trace.history_lengths + np.bincount(trace.user, trace.clicked_lengths, trace.users).astype(np.int64)
    for model in MODELS:
        expected = working_set_pages(trace.user, positions, model, 2, page_tokens)
        assert demand_of(trace, model, 2).working_set_pages(page_tokens) == expected


def test_users_without_a_request_need_nothing() -> None:
    trace = make_trace().first(1)
    demand = demand_of(trace, MODELS[0], 2)
    assert demand.users == 9
    assert demand.working_set_pages(1) == demand.tokens_after[0]


def test_the_first_requests_are_those_of_the_first_part_of_the_trace() -> None:
    trace = make_trace()
    part, whole = demand_of(trace.first(50), MODELS[0], 1), demand_of(trace, MODELS[0], 1)
    for name in ("t_s", *COUNTS):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole.first(50), name))
    with pytest.raises(InvalidArgument, match="201"):
        whole.first(201)


def test_keys_are_those_of_an_index() -> None:
    trace = make_trace()
    keys = demand_of(trace, MODELS[0], 1).keys
    assert keys is not None
    assert keys.tolist() == [digest(user.encode()) for user in trace.user_ids]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("users", 3), ("users", -1), ("user", np.array([0, -1], np.int32)), ("user", np.array([0, 1])),
        ("t_s", np.array([1.0, 0.5])), ("t_s", np.array([1.0, np.nan])), ("tokens", np.array([1, -1], np.int32)),
        ("tokens_after", np.array([1, 2**24 + 1], np.int32)), ("generation", np.zeros(3, np.int32)),
        ("keys", np.zeros(4, np.uint64)), ("candidates", np.zeros((2, 1), np.int32)),
    ],
)  # fmt: skip
def test_broken_columns_are_refused(column: str, value: Any) -> None:
    ones = np.ones(2, np.int32)
    demand = Demand(5, np.array([0, 4], np.int32), np.array([0.0, 0.0]), *([ones] * 7))
    with pytest.raises(InvalidArgument) as caught:
        replace(demand, **{column: value})
    assert caught.value.field == ("user" if (column, value) == ("users", 3) else column)
    with pytest.raises(ValueError, match="read-only"):
        demand.tokens[0] = 2
