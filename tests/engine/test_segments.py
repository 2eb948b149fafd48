"""Which graphs make a part of a batch."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mtserve.engine.graphs import GraphKey, segments
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
