"""Copies between the tiers: whole pages, exact bytes, each job finished exactly once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtserve import _core
from mtserve.cache.index import Copy
from mtserve.errors import ResourceExhausted, TransferFailed
from mtserve.transfer.arena import HostArena
from mtserve.transfer.mover import LOAD, STORE, Finished, SyncMover, runs
from mtserve.transfer.pool import PageShape, allocate_pool

SHAPE = PageShape(layers=2, page_tokens=3, heads=2, head_dim=8, dtype=torch.float32)
IDS = st.lists(st.integers(0, 30), unique=True, max_size=25)
# Pages of several users, as the allocators give them out: runs of neighbours, here and there.
RUNS = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90), st.integers(1, 40)), max_size=6)

Pieces = list[tuple[int, int, int]]


def _ids(values: list[int]) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def _runs(left: list[int], right: list[int], boundary: int = 0) -> Pieces:
    arrays = runs(_ids(left), _ids(right), boundary)
    assert {each.dtype for each in arrays} == {np.dtype(np.int64)}
    parts = ([_ids(each[:3]), _ids(each[3:])] for each in (left, right))
    assert _core._count_runs(*parts, boundary) == len(arrays[0])
    return list(zip(*(each.tolist() for each in arrays), strict=True))


def _tiers(pages: int = 31, arena_pages: int = 31) -> tuple[torch.Tensor, torch.Tensor]:
    pool = allocate_pool(SHAPE, pages, torch.device("cpu"), poison=False)
    arena = HostArena(SHAPE, arena_pages, device=None, poison=False).tensor
    generator = torch.Generator().manual_seed(3)
    for tier in (pool, arena):
        tier.copy_(torch.randn(tier.shape, generator=generator))
        tier[:, 0, 0, 0, 0, 0] = float("nan")  # bytes, not numbers, are what must arrive
    return pool, arena


def _assert_pieces(pieces: Pieces, left: list[int], right: list[int], boundary: int) -> None:
    """Every pair comes once, in its order, and a piece ends only where it must."""
    pairs = [(a + i, b + i) for a, b, count in pieces for i in range(count)]
    assert pairs == list(zip(left, right, strict=True))
    ends = {0}
    for a, b, count in pieces:
        assert count > 0
        assert not boundary or b // boundary == (b + count - 1) // boundary
        if (a, b) in ends:
            assert boundary and b % boundary == 0
        ends = {(a + count, b + count)}


@given(left=IDS, data=st.data(), boundary=st.sampled_from([0, 1, 2, 3, 16]))
def test_runs_cover_every_pair_once_in_the_longest_pieces(left: list[int], data: st.DataObject, boundary: int) -> None:
    right = data.draw(st.permutations(left)) if data.draw(st.booleans()) else [each + 7 for each in left]
    _assert_pieces(_runs(left, right, boundary), left, right, boundary)


@given(drawn=RUNS, boundary=st.sampled_from([0, 1, 7, 16, 64]))
def test_long_runs_are_cut_at_the_boundary_alone(drawn: Pieces, boundary: int) -> None:
    left = [a + i for a, _, count in drawn for i in range(count)]
    right = [b + i for _, b, count in drawn for i in range(count)]
    _assert_pieces(_runs(left, right, boundary), left, right, boundary)


def test_runs_by_hand() -> None:
    assert _runs([], []) == _runs([], [], 4) == []
    assert _runs([4], [9]) == [(4, 9, 1)]
    assert _runs([1, 2, 3, 7, 8], [5, 6, 7, 8, 9]) == [(1, 5, 3), (7, 8, 2)]
    assert _runs([3, 2, 1], [3, 2, 1]) == [(3, 3, 1), (2, 2, 1), (1, 1, 1)]
    assert _runs([1, 2, 3], [1, 2, 9]) == [(1, 1, 2), (3, 9, 1)]
    # A boundary counts on the right alone, and where a run begins at one it cuts nothing.
    assert _runs([0, 1, 2, 3, 4], [2, 3, 4, 5, 6], 4) == [(0, 2, 2), (2, 4, 3)]
    assert _runs([3, 4, 5, 6], [8, 9, 10, 11], 4) == [(3, 8, 4)]
    assert _runs([5, 6, 7], [5, 6, 7], 1) == [(5, 5, 1), (6, 6, 1), (7, 7, 1)]


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


def _one_page(ticket: int, inside: int, outside: int) -> Copy:
    return Copy(ticket, "", _ids([inside]), _ids([outside]), 0, 0)


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_a_copy_that_fails_in_the_middle_is_reported_once_and_the_rest_goes_on(together: bool) -> None:
    calls = []

    def second_fails(kind: str) -> None:
        calls.append(kind)
        if len(calls) == 2:
            raise TransferFailed("the cable fell out")

    pool, arena = _tiers()
    mover = SyncMover(pool, arena, second_fails)
    before = pool[1].clone()
    copies = [_one_page(ticket, ticket, ticket + 9) for ticket in range(3)]
    for submitted in [copies] if together else [[copy] for copy in copies]:
        mover.submit(LOAD, submitted)
    assert calls == [LOAD] * 3
    assert mover.pending() == 3
    finished = mover.poll()
    assert [each.ticket for each in finished] == [0, 1, 2]
    assert [each.error is None for each in finished] == [True, False, True]
    assert "cable" in str(finished[1].error)
    assert mover.poll() == []
    assert mover.pending() == 0
    assert pool[1].numpy().tobytes() == before.numpy().tobytes()
    assert pool[2].numpy().tobytes() == arena[11].numpy().tobytes()


def test_no_load_is_near_where_all_end_at_once() -> None:
    mover = SyncMover(*_tiers())
    mover.submit(LOAD, [_one_page(1, 2, 3)])
    assert not mover.near(1)
    assert not mover.near(9)
    mover.wait()
    assert [each.ticket for each in mover.poll()] == [1]
    assert not mover.near(1)


def test_poison_fills_its_pages_alone() -> None:
    pool, arena = _tiers()
    expected = pool.clone()
    expected[[3, 30]] = float("nan")
    mover = SyncMover(pool, arena)
    mover.poison(_ids([30, 3]))
    mover.poison(_ids([]))
    assert pool.numpy().tobytes() == expected.numpy().tobytes()


def test_poison_of_fp8_is_its_nan() -> None:
    shape = PageShape(layers=2, page_tokens=3, heads=2, head_dim=8, dtype=torch.float8_e4m3fn)
    pool = allocate_pool(shape, 31, torch.device("cpu"), poison=False)
    pool.fill_(1.0)
    SyncMover(pool, pool.clone()).poison(_ids([30, 3]))
    assert pool.float().isnan().flatten(1).all(1).nonzero().flatten().tolist() == [3, 30]
    assert int((pool.float() == 1).sum()) == 29 * shape.bytes
    assert allocate_pool(shape, 2, torch.device("cpu"), poison=True).float().isnan().all()


def test_tiers_of_other_shapes_or_types_are_our_bug() -> None:
    pool, arena = _tiers()
    for wrong in (arena[:, :1], arena.double(), arena[::2]):
        with pytest.raises(AssertionError):
            SyncMover(pool, wrong)
    SyncMover(pool, arena[:9]).wait()


def test_page_sizes_add_up() -> None:
    assert SHAPE.bytes == 2 * 2 * 3 * 2 * 8 * 4
    pool = allocate_pool(SHAPE, 5, torch.device("cpu"), poison=True)
    assert pool.shape == (5, *SHAPE.sizes)
    assert pool.nbytes == 5 * SHAPE.bytes
    assert torch.isnan(pool).all()


def test_memory_that_cannot_be_had_is_named() -> None:
    with pytest.raises(ResourceExhausted) as caught:
        allocate_pool(SHAPE, 2**50, torch.device("cpu"), poison=False)
    assert caught.value.field == "gpu_cache"
