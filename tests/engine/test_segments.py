"""Which graphs make a part of a batch, and which there are before the first one."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mtserve.engine.forward.graph_key import LOADED_ROWS, GraphKey, segments, usual_keys
from mtserve.engine.forward.metadata import bucket_rows
from mtserve.transfer.cuda_mover import layer_groups


def whole(layers: int) -> GraphKey:
    return GraphKey(64, 128, direct=True, gated=True, first=0, last=layers)


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8, 16])
def test_a_batch_that_is_not_split_is_one_graph(layers: int) -> None:
    assert segments(whole(layers), layer_groups(layers), layers) == [whole(layers)]


@pytest.mark.parametrize("layers", [2, 3, 5, 8, 16])
def test_both_parts_of_a_split_cover_their_layers_in_order(layers: int) -> None:
    groups = layer_groups(layers)
    for split in range(1, layers):
        early = segments(whole(layers)._replace(last=split, gated=False, early=True), groups, layers)
        taken, *late = segments(whole(layers)._replace(first=split), groups, layers)
        assert taken == GraphKey(64, 0, direct=False, gated=False, first=0, last=0)
        run = [*early, *late]
        assert (run[0].first, run[-1].last) == (0, layers)
        assert all(before.last == after.first for before, after in pairwise(run))
        assert all(each.last > each.first and each.early == (each.last <= split) for each in run)
        assert all(each.gated for each in late) and not any(each.gated for each in early)
        # None reaches beyond a group: it would be good for this split alone.
        assert all(not each.first < group < each.last for each in run for group in groups)


def test_wherever_batches_are_split_most_of_their_graphs_are_the_same() -> None:
    layers, groups = 16, layer_groups(16)
    seen = {
        each
        for split in range(1, layers)
        for part in (
            whole(layers)._replace(last=split, gated=False, early=True),
            whole(layers)._replace(first=split),
        )
        for each in segments(part, groups, layers)
    }
    at_groups = {each for each in seen if each.first in groups and each.last in (*groups, layers)}
    assert len(at_groups) == 2 * (len(groups) - 1) + 1
    assert len(seen) == 31


@pytest.mark.parametrize("rows", [1, 64, 500, 1025, 9000, 16_384])
def test_the_usual_graphs_serve_batches_of_any_number_of_rows(rows: int) -> None:
    keys = list(usual_keys(rows, 8, 128, deterministic=False, loads=True))
    assert len(set(keys)) == len(keys)
    assert [key.rows for key in keys] == sorted(key.rows for key in keys)
    whole = [key for key in keys if key.last]
    for some in {1, rows // 3 + 1, rows}:
        kinds = {(key.tile_rows, key.direct) for key in whole if key.rows == bucket_rows(some) and not key.gated}
        assert kinds == {(128, False), (128, True), (192, False), (192, True)}
    assert max(key.rows for key in keys) == bucket_rows(rows)
    loaded = {key.rows for key in keys if key.rows <= LOADED_ROWS}
    assert {key.rows for key in whole if key.gated} == {key.rows for key in keys if not key.last} == loaded
    assert all((key.first, key.last, key.early) == (0, 8, False) for key in whole)
    split = GraphKey(bucket_rows(1), 128, direct=False, gated=True, first=2, last=8)
    assert segments(split, layer_groups(8), 8)[0] in keys


def test_the_usual_graphs_are_only_those_that_a_model_can_have() -> None:
    def kinds(head_dim: int, **options: bool) -> set[tuple[int, bool, bool]]:
        keys = usual_keys(64, 2, head_dim, **options)
        return {(key.tile_rows, key.direct, key.gated) for key in keys}

    assert kinds(256, deterministic=True, loads=False) == {(128, False, False)}
    assert kinds(256, deterministic=False, loads=True) == {
        (128, False, False), (128, True, False), (128, False, True), (0, False, False)
    }  # fmt: skip
    assert kinds(64, deterministic=True, loads=False) == {(128, False, False), (192, False, False)}
