"""Copies between the tiers: whole pages, exact bytes, each job finished exactly once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtserve.cache.index import Copy
from mtserve.errors import ResourceExhausted, TransferFailed
from mtserve.transfer.mover import LOAD, STORE, Finished, SyncMover, make_mover, runs
from mtserve.transfer.pool import PageShape, allocate_arena, allocate_pool

SHAPE = PageShape(layers=2, page_tokens=3, heads=2, head_dim=8, dtype=torch.float32)
IDS = st.lists(st.integers(0, 30), unique=True, max_size=25)


def _ids(values: list[int]) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(values, dtype=np.int32)


def _tiers(pages: int = 31, arena_pages: int = 31) -> tuple[torch.Tensor, torch.Tensor]:
    pool = allocate_pool(SHAPE, pages, torch.device("cpu"), poison=False)
    arena = allocate_arena(SHAPE, arena_pages, pinned=False, poison=False)
    generator = torch.Generator().manual_seed(3)
    for tier in (pool, arena):
        tier.copy_(torch.randn(tier.shape, generator=generator))
        tier[:, 0, 0, 0, 0, 0] = float("nan")  # bytes, not numbers, are what must arrive
    return pool, arena


@given(left=IDS, data=st.data())
def test_runs_cover_every_pair_once_in_the_longest_pieces(left: list[int], data: st.DataObject) -> None:
    right = data.draw(st.permutations(left)) if data.draw(st.booleans()) else [each + 7 for each in left]
    pieces = runs(_ids(left), _ids(right))
    pairs = [(a + i, b + i) for a, b, count in pieces for i in range(count)]
    assert pairs == list(zip(left, right, strict=True))
    for (a, b, count), (next_a, next_b, _) in pairwise(pieces):
        assert (a + count, b + count) != (next_a, next_b)


def test_runs_by_hand() -> None:
    assert runs(_ids([]), _ids([])) == []
    assert runs(_ids([4]), _ids([9])) == [(4, 9, 1)]
    assert runs(_ids([1, 2, 3, 7, 8]), _ids([5, 6, 7, 8, 9])) == [(1, 5, 3), (7, 8, 2)]
    assert runs(_ids([3, 2, 1]), _ids([3, 2, 1])) == [(3, 3, 1), (2, 2, 1), (1, 1, 1)]
    assert runs(_ids([1, 2, 3]), _ids([1, 2, 9])) == [(1, 1, 2), (3, 9, 1)]


@pytest.mark.parametrize("kind", [LOAD, STORE])
@given(pool_pages=IDS, data=st.data())
def test_copies_are_exact_and_touch_nothing_else(kind: str, pool_pages: list[int], data: st.DataObject) -> None:
    arena_pages = data.draw(st.permutations(range(31)))[: len(pool_pages)]
    pool, arena = _tiers()
    source, target = (arena, pool) if kind == LOAD else (pool, arena)
    kept, expected = source.numpy().tobytes(), target.clone()
    for inside, outside in zip(pool_pages, arena_pages, strict=True):
        into, out_of = (inside, outside) if kind == LOAD else (outside, inside)
        expected[into] = source[out_of]
    mover = SyncMover(pool, arena)
    mover.submit(kind, [Copy(5, "", _ids(pool_pages), _ids(list(arena_pages)), 0, 0)])
    assert mover.pending() == 1
    assert mover.poll() == [Finished(kind, 5, None)]
    assert target.numpy().tobytes() == expected.numpy().tobytes()
    assert source.numpy().tobytes() == kept


def test_a_copy_that_fails_in_the_middle_is_reported_once_and_the_rest_goes_on() -> None:
    calls = []

    def second_fails(kind: str) -> None:
        calls.append(kind)
        if len(calls) == 2:
            raise TransferFailed("the cable fell out")

    pool, arena = _tiers()
    mover = SyncMover(pool, arena, second_fails)
    before = pool[1].clone()
    for ticket in range(3):
        mover.submit(LOAD, [Copy(ticket, "", _ids([ticket]), _ids([ticket + 9]), 0, 0)])
    finished = mover.poll()
    assert [each.ticket for each in finished] == [0, 1, 2]
    assert [each.error is None for each in finished] == [True, False, True]
    assert "cable" in str(finished[1].error)
    assert mover.poll() == []
    assert mover.pending() == 0
    assert pool[1].numpy().tobytes() == before.numpy().tobytes()
    assert pool[2].numpy().tobytes() == arena[11].numpy().tobytes()


def test_tiers_of_other_shapes_or_types_are_our_bug() -> None:
    pool, arena = _tiers()
    with pytest.raises(AssertionError):
        make_mover(pool, arena[:, :1])
    with pytest.raises(AssertionError):
        make_mover(pool, arena.double())
    make_mover(pool, arena).wait()


def test_page_sizes_add_up() -> None:
    assert SHAPE.bytes == 2 * 2 * 3 * 2 * 8 * 4
    pool = allocate_pool(SHAPE, 5, torch.device("cpu"), poison=True)
    assert pool.shape == (5, *SHAPE.sizes)
    assert pool.nbytes == 5 * SHAPE.bytes
    assert torch.isnan(pool).all()
    assert torch.isnan(allocate_arena(SHAPE, 2, pinned=False, poison=True)).all()
    assert len(allocate_arena(SHAPE, 0, pinned=False, poison=True)) == 0


def test_memory_that_cannot_be_had_is_named() -> None:
    with pytest.raises(ResourceExhausted) as caught:
        allocate_pool(SHAPE, 2**50, torch.device("cpu"), poison=False)
    assert caught.value.field == "gpu_cache"
    with pytest.raises(ResourceExhausted) as caught:
        allocate_arena(SHAPE, 2**50, pinned=False, poison=False)
    assert caught.value.field == "host_cache"
