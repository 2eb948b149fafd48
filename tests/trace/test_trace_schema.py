"""The columnar trace: views, prefix lengths, cutting, folding, and what it refuses to be."""

from __future__ import annotations

import numpy as np
import pytest
from trace_samples import sample_trace, small, wide

from mtserve.errors import InvalidArgument
from mtserve.trace.csr import cuts, gather, rank_in_group
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.reshape import fold_history, sessions_by_gap


def test_views_show_requests_and_histories() -> None:
    trace = sample_trace()
    assert (trace.users, trace.requests) == (3, 3)
    last = trace.request(2)
    assert (last.number, last.user, last.user_index, last.t_ms, last.session) == (2, "7", 1, 20, -1)
    assert last.cand.tolist() == [4, 4, 5, 6]
    assert last.clicked.tolist() == [6]
    assert last.actions.tolist() == [70]
    history = trace.history(0)
    assert history.items.tolist() == [5, -4, 2**62]
    assert history.t_ms.tolist() == [10, 20, 20]
    assert history.actions.tolist() == [1, 1, 3]
    assert len(trace.history(1).items) == 0
    assert [request.number for request in trace.iter_requests(1)] == [1, 2]
    with pytest.raises(InvalidArgument, match="requests"):
        next(trace.iter_requests(2, 4))


def test_arrays_are_read_only() -> None:
    trace = sample_trace()
    with pytest.raises(ValueError, match="read-only"):
        trace.request(0).cand[0] = 1


def test_prefix_lengths_equal_a_replay() -> None:
    trace = generate(GeneratorConfig(users=13, requests=400, history_median=5, items=50))
    known = dict(zip(trace.user_ids, trace.history_lengths.tolist(), strict=True))
    expected = []
    for request in trace.iter_requests():
        expected.append(known[request.user])
        known[request.user] += len(request.clicked)
    assert trace.prefix_lengths().tolist() == expected


def test_first_is_a_prefix() -> None:
    trace = sample_trace()
    cut = trace.first(2)
    assert cut.requests == 2
    assert cut.request(1).cand.tolist() == trace.request(1).cand.tolist()
    assert trace.first(3) == trace
    assert cut != trace
    with pytest.raises(InvalidArgument):
        trace.first(4)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("user_ids", ("ann", "7", "7")),
        ("user_ids", ("ann", "7", "")),
        ("user_ids", ("ann", "7", "x" * 257)),
        ("history_offsets", wide(0, 4, 3, 5)),
        ("history_offsets", wide(0, 3, 3, 4)),
        ("history_offsets", wide(0, 3, 5)),
        ("history_t_ms", wide(10, 9, 20, 0, 99)),
        ("history_t_ms", wide(-1, 9, 20, 0, 99)),
        ("history_t_ms", wide(10, 20, 21, 0, 99)),
        ("history_t_ms", wide(10, 20, 20, 0)),
        ("history_actions", small(1, 1, -3, 1, 1)),
        ("user", small(1, 0, 3)),
        ("user", small(1, 0, -1)),
        ("user", wide(1, 0, 1)),
        ("t_ms", wide(21, 20, 20)),
        ("session", wide(1)),
        ("cand_offsets", wide(0, 2, 2, 7)),
        ("clicked_items", wide(1)),
        ("clicked_actions", small(1)),
        ("cand_items", np.zeros((7, 1), np.int64)),
    ],
)
def test_a_broken_column_is_named(column: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        sample_trace(**{column: value})
    blamed = {"history_t_ms": ("history_t_ms", "t_ms"), "clicked_items": ("clicked_offsets",)}
    blamed["cand_offsets"] = ("cand_offsets",)
    assert caught.value.field.split("[")[0] in blamed.get(column, (column,))


def test_sessions_start_after_a_pause() -> None:
    user, t_ms = small(0, 1, 0, 1, 0), wide(0, 5, 999, 1005, 1999)
    sessions = sessions_by_gap(user, t_ms, 1000).tolist()
    assert sessions[0] == sessions[2] != sessions[4]
    assert sessions[1] != sessions[3]
    assert len(set(sessions)) == 4


def test_folding_moves_early_clicks_to_history() -> None:
    trace = sample_trace()
    folded = fold_history(trace, 0.5)
    assert folded.requests == 2
    assert folded.history(1).items.tolist() == [2, 9]
    assert folded.history(1).t_ms.tolist() == [15, 15]
    assert folded.history(0).items.tolist() == trace.history(0).items.tolist()
    assert folded.request(1).clicked.tolist() == [6]
    assert fold_history(trace, 0.0) == trace
    assert fold_history(trace, 1.0).requests == 0
    with pytest.raises(InvalidArgument, match="history_share"):
        fold_history(trace, 1.1)


def test_folding_keeps_every_prefix() -> None:
    trace = generate(GeneratorConfig(users=9, requests=300, history_median=4, items=50))
    folded = fold_history(trace, 0.3)
    kept = trace.requests - folded.requests
    assert kept > 0
    prefix = dict(zip(zip(trace.user.tolist(), trace.t_ms.tolist(), strict=True), trace.prefix_lengths(), strict=True))
    for place, length in enumerate(folded.prefix_lengths()):
        assert prefix[int(folded.user[place]), int(folded.t_ms[place])] == length


def test_ragged_helpers() -> None:
    assert rank_in_group(wide(3, 3, 5, 5, 5, 3)).tolist() == [0, 1, 0, 1, 2, 0]
    assert gather(wide(0, 2, 2, 5), wide(2, 1, 0)).tolist() == [2, 3, 4, 0, 1]
    assert list(cuts(wide(0, 5, 6, 7, 8), 2, 3)) == [(0, 1), (1, 3), (3, 4)]
    assert list(cuts(wide(0), 2, 3)) == []
