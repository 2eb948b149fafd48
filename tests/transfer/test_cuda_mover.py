"""The mover on CUDA over a driver that the tests drive: what it queues, in which order, and what it says of it."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fake_driver import UNKNOWN, FakeDriver, FakeStream

from mtserve import _core
from mtserve.cache.index import Copy
from mtserve.errors import InvalidArgument, TransferFailed
from mtserve.transfer import cuda_mover
from mtserve.transfer.cuda_mover import CudaMover
from mtserve.transfer.mover import LOAD, STORE, Fault, Finished
from mtserve.transfer.pool import PageShape, allocate_pool

SHAPE = PageShape(layers=4, page_tokens=2, heads=1, head_dim=8, dtype=torch.float32)  # 512 bytes
CHUNK_PAGES = 16
BOUNDS = (
    "GROUPED_PIECE_BYTES",
    "GROUPED_LOAD_BYTES",
    "SUBMISSION_BYTES",
    "QUEUED_BYTES",
    "ANNOUNCED_BYTES",
    "SPLIT_GROUP_BYTES",
    "STRIDED_BYTES",
)
KINDS = (LOAD, STORE)


class Link:
    """A pool, an arena whose chunks are pinned apart, and the mover between them."""

    def __init__(
        self,
        driver: FakeDriver,
        shape: PageShape,
        pool_pages: int,
        arena_pages: int,
        fault: Fault | None,
        chunk_pages: int,
    ) -> None:
        self.driver = driver
        self.pool = allocate_pool(shape, pool_pages, torch.device("cpu"), poison=False)
        self.arena = allocate_pool(shape, arena_pages, torch.device("cpu"), poison=False)
        for seed, tier in enumerate((self.pool, self.arena)):
            tier.copy_(torch.randn(tier.shape, generator=torch.Generator().manual_seed(seed)))
        driver.register(self.pool)
        for first in range(0, arena_pages, CHUNK_PAGES):
            driver.register(self.arena[first : first + CHUNK_PAGES])
        self.mover = CudaMover(self.pool, self.arena, fault, chunk_pages=chunk_pages)

    def stream(self, kind: str) -> FakeStream:
        return self.driver.streams[self.mover._lanes[kind].stream.cuda_stream]

    def after(self, kind: str, copies: Sequence[Copy]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool and arena once these copies have ended."""
        pool, arena = self.pool.clone(), self.arena.clone()
        for copy in copies:
            inside, outside = [torch.from_numpy(pages.astype(np.int64)) for pages in (copy.gpu_pages, copy.host_pages)]
            if kind == LOAD:
                pool[inside] = arena[outside]
            else:
                arena[outside] = pool[inside]
        return pool, arena

    def holds(self, expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
        return torch.equal(self.pool, expected[0]) and torch.equal(self.arena, expected[1])

    def end(self) -> list[Finished]:
        """Wait for all copies; all are told, once, and what the mover keeps of them is as at its start."""
        pending = self.mover.pending()
        assert self.mover.wait()
        finished = self.mover.poll()
        assert (len(finished), self.mover.poll(), self.mover.pending()) == (pending, [], 0)
        self.check()
        assert not self.mover._loads
        assert [lane.queued_bytes for lane in self.mover._lanes.values()] == [0, 0]
        assert sum(len(lane._free) for lane in self.mover._lanes.values()) == len(self.driver.all_events)
        return finished

    def check(self) -> None:
        """No event is free twice, or free while it is waited for."""
        lanes = self.mover._lanes.values()
        free = [id(event) for lane in lanes for event in lane._free]
        assert len(set(free)) == len(free)
        for submission in [each for lane in lanes for each in lane.under_way]:
            used = {*submission.events, *submission.others}
            assert set(free).isdisjoint(map(id, used))
            assert submission.announced in {None, *used}


Make = Callable[..., Link]


@pytest.fixture
def make_link(monkeypatch: pytest.MonkeyPatch) -> Make:
    """`scaled`: the mover's bounds count our pages as it does those of 1 MiB."""

    def make(
        pool_pages: int = 128,
        arena_pages: int = 160,
        fault: Fault | None = None,
        *,
        shape: PageShape = SHAPE,
        scaled: bool = True,
        chunk_pages: int = CHUNK_PAGES,
    ) -> Link:
        driver = FakeDriver()
        driver.install(monkeypatch)
        for name in BOUNDS if scaled else ():
            monkeypatch.setattr(cuda_mover, name, getattr(cuda_mover, name) * shape.bytes >> 20)
        return Link(driver, shape, pool_pages, arena_pages, fault, chunk_pages)

    return make


def _copy(ticket: int, inside: Any, outside: Any) -> Copy:
    return Copy(ticket, "", np.asarray(inside, dtype=np.int32), np.asarray(outside, dtype=np.int32), 0, 0)


def _long(ticket: int, first: int, pages: int = 16) -> Copy:
    """Neighbours, which on the arena's side fill a chunk each where `first` is the first of one."""
    return _copy(ticket, np.arange(first, first + pages), np.arange(first, first + pages))


def _singles(count: int) -> list[Copy]:
    """One page each, none the neighbour of the one before."""
    return [_copy(ticket, [ticket], [count - 1 - ticket]) for ticket in range(count)]


# Bytes


LENGTHS = {"scattered": [1] * 60, "threes": [3] * 20, "chunks": [16] * 4, "long": [100], "mixed": [1, 40, 3, 16, 20]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_bytes_are_exact_and_come_no_sooner_than_the_stream(make_link: Make, kind: str, lengths: list[int]) -> None:
    """The driver refuses what crosses the end of a chunk, which most of these runs would."""
    link, rng = make_link(), np.random.default_rng(1)
    firsts = np.cumsum([0, *lengths])[:-1]
    parts = [(firsts[place], lengths[place]) for place in rng.permutation(len(lengths))]
    inside = np.concatenate([np.arange(first, first + length) for first, length in parts])
    copies = [_copy(0, inside[:50], inside[:50] + 27), _copy(1, inside[50:], inside[50:] + 27)]
    before, expected = link.after(kind, []), link.after(kind, copies)
    link.mover.submit(kind, copies)
    assert link.stream(kind).queued > 0
    assert link.mover.poll() == []
    assert link.holds(before)
    assert link.end() == [Finished(kind, ticket, None) for ticket in range(2)]
    assert link.holds(expected)


def test_the_driver_refuses_what_crosses_the_end_of_a_chunk(make_link: Make) -> None:
    """What the mover would run into, did it not cut there."""
    link = make_link(chunk_pages=0)
    before = link.after(LOAD, [])
    link.mover.submit(LOAD, [_long(1, 0, 7), _long(2, 8)])  # together: both fail
    link.mover.submit(LOAD, [_long(3, 100, 7)])
    errors = [each.error for each in link.end()]
    assert [error is None for error in errors] == [True, False, True]
    assert "load of 16 pages: cuMemcpyBatchAsync: error 1" in str(errors[1])
    assert not link.holds(before)


@pytest.mark.parametrize("kind", KINDS)
def test_jobs_end_in_their_order_each_once(make_link: Make, kind: str) -> None:
    link = make_link()
    copies = [_copy(ticket, np.arange(3) + 4 * ticket, np.arange(3) + 3 * ticket) for ticket in range(20)]
    for copy in copies:
        link.mover.submit(kind, [copy])
    told: list[int] = []
    while link.mover.pending():
        link.stream(kind).run(2)
        ended = [each.ticket for each in link.mover.poll()]
        assert len(ended) <= 2
        told += ended
    assert told == list(range(20))
    assert link.end() == []


# How much at once


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize(("scaled", "most"), [(False, cuda_mover.QUEUED_PAGES), (True, cuda_mover.QUEUED_BYTES >> 20)])
def test_of_thousands_of_copies_the_driver_has_no_more_than_it_takes(
    make_link: Make, scaled: bool, most: int, together: bool
) -> None:
    link = make_link(5000, 5000, scaled=scaled)
    copies = _singles(5000)
    for kind in KINDS:
        expected = link.after(kind, copies)
        for some in [copies] if together else [[copy] for copy in copies]:
            link.mover.submit(kind, some)
        assert link.mover.pending() == 5000
        assert link.stream(kind).queued == most
        link.stream(kind).run()
        finished = link.mover.poll()
        assert (len(finished), link.stream(kind).queued) == (most, most)
        finished += link.end()
        assert finished == [Finished(kind, ticket, None) for ticket in range(5000)]
        assert link.stream(kind).most_queued == most
        assert link.holds(expected)


def test_copies_of_a_few_pages_keep_to_it_as_well(make_link: Make) -> None:
    link = make_link(5000, 5000, scaled=False)
    parts = np.split(np.arange(4999), np.arange(7, 4999, 7))
    link.mover.submit(STORE, [_copy(ticket, pages, pages[::-1]) for ticket, pages in enumerate(parts)])
    assert {each.error for each in link.end()} == {None}
    assert link.stream(STORE).most_queued <= cuda_mover.QUEUED_PAGES


# What a batch may begin over


def test_a_long_load_over_an_idle_link_comes_by_groups_of_layers(make_link: Make) -> None:
    link = make_link()
    expected = link.after(LOAD, [_long(1, 16)])
    link.mover.submit(LOAD, [_long(1, 16)])
    arrivals = link.mover.arrivals([1])
    assert len(arrivals.events) == 4
    near = []
    for layer, event in enumerate(arrivals.events):
        assert link.mover.poll() == []
        near.append(link.mover.near(1))
        assert not event.passed()
        assert not torch.equal(link.pool[:, layer], expected[0][:, layer])
        link.stream(LOAD).run(1)
        assert event.passed()
        assert torch.equal(link.pool[:, layer], expected[0][:, layer])
    assert near == [False, False, True, True]
    assert link.end() == [Finished(LOAD, 1, None)]
    assert not link.mover.near(1)


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 6, 8])
def test_loads_by_groups_are_exact_for_any_number_of_layers(make_link: Make, layers: int) -> None:
    link = make_link(shape=PageShape(layers, 2, 1, 8, torch.float32))
    copy = _copy(1, np.arange(100), np.arange(100) + 16)
    expected = link.after(LOAD, [copy])
    link.mover.submit(LOAD, [copy])
    assert len(set(map(id, link.mover.arrivals([1]).events))) == min(4, layers)
    assert link.end() == [Finished(LOAD, 1, None)]
    assert link.holds(expected)


def test_behind_another_a_long_load_comes_whole_and_is_announced(make_link: Make) -> None:
    link = make_link()
    copies = [_long(1, 0), _long(2, 16, 48)]
    expected = link.after(LOAD, copies)
    for copy in copies:
        link.mover.submit(LOAD, [copy])
    assert len(link.mover.arrivals([2]).events) == 4
    assert link.mover.arrivals([2, 1]).events == link.mover.arrivals([2]).events
    link.stream(LOAD).run(4)  # the first one's groups
    link.stream(LOAD).run(1)  # 16 of 48 pages
    assert not link.mover.near(2)
    link.stream(LOAD).run(1)
    assert not link.mover.near(2)  # the first was not told yet
    assert [each.ticket for each in link.mover.poll()] == [1]
    assert link.mover.near(2)
    assert not link.holds(expected)
    link.mover.arrivals([2]).wait()
    assert link.holds(expected)
    assert [each.ticket for each in link.end()] == [2]


def test_short_loads_stores_and_strangers_are_never_near(make_link: Make) -> None:
    link = make_link()
    link.mover.submit(LOAD, [_copy(1, np.arange(7), np.arange(7))])
    link.mover.submit(STORE, [_long(2, 32)])
    for _ in range(3):
        assert not any(map(link.mover.near, (1, 2, 3)))
        for kind in KINDS:
            link.stream(kind).run(1)
    link.end()


# Failures


def _refuse(link: Link, *calls: int) -> None:
    """Of the calls that copy from now on, these fail, counted from 0."""
    numbers = iter(range(1 << 30))
    link.driver.refuses = lambda: next(numbers) in calls


def test_a_submission_that_the_driver_refuses_half_way_fails_once_and_the_rest_goes_on(make_link: Make) -> None:
    link = make_link()
    copies = [_copy(ticket, np.arange(4) + 5 * ticket, np.arange(4) + 4 * ticket) for ticket in range(6)]
    for turn in range(3):
        for kind in KINDS:
            _refuse(link, 1)
            expected = link.after(kind, [*copies[:2], *copies[4:]])
            for first in (0, 2, 4):
                link.mover.submit(kind, copies[first : first + 2])
            finished = link.end()
            assert [each.ticket for each in finished] == list(range(6))
            assert [each.error is not None for each in finished] == [False, False, True, True, False, False]
            assert "of 4 pages: cuMemcpyBatchAsync: error 999" in str(finished[2].error)
            rest = torch.ones(len(link.pool if kind == LOAD else link.arena), dtype=torch.bool)
            for copy in copies[2:4]:  # may hold anything
                rest[torch.from_numpy((copy.gpu_pages if kind == LOAD else copy.host_pages).astype(np.int64))] = False
            side = 0 if kind == LOAD else 1
            assert torch.equal((link.pool, link.arena)[side][rest], expected[side][rest]), turn
    assert len(link.driver.all_events) == 3 * len(KINDS)  # used again and again


@pytest.mark.parametrize("call", range(4))
def test_a_load_by_groups_that_the_driver_refuses_half_way_is_never_near(make_link: Make, call: int) -> None:
    link = make_link()
    _refuse(link, call)
    link.mover.submit(LOAD, [_long(1, 16)])
    link.mover.submit(LOAD, [_long(2, 48)])
    link.stream(LOAD).run(3)
    assert not link.mover.near(1)
    first, second = link.end()
    assert "load of 16 pages: cuMemcpy2DAsync_v2: error 999" in str(first.error)
    assert second == Finished(LOAD, 2, None)
    expected = link.after(LOAD, [_long(1, 16)])
    link.mover.submit(LOAD, [_long(1, 16)])
    assert link.end() == [Finished(LOAD, 1, None)]
    assert link.holds(expected)


@pytest.mark.parametrize("call", [1, 2], ids=["its first pages", "its last pages"])
def test_an_announced_load_that_the_driver_refuses_is_never_near(make_link: Make, call: int) -> None:
    link = make_link()
    link.mover.submit(LOAD, [_copy(1, [0], [0])])
    _refuse(link, call - 1)
    link.mover.submit(LOAD, [_long(2, 16, 48)])
    link.stream(LOAD).run(1)
    assert [each.ticket for each in link.mover.poll()] == [1]
    while link.stream(LOAD).queued:
        assert not link.mover.near(2)
        link.stream(LOAD).run(1)
    assert not link.mover.near(2)
    (finished,) = link.end()
    assert "load of 48 pages: cuMemcpyBatchAsync: error 999" in str(finished.error)


def test_waiting_ends_in_time_where_a_stream_does_not(make_link: Make) -> None:
    link = make_link()
    link.mover.submit(LOAD, [_long(1, 16)])
    link.mover.submit(STORE, [_long(2, 48)])
    link.stream(LOAD).stuck = True
    began = link.driver.now
    assert not link.mover.wait(0.25)
    assert 0.25 <= link.driver.now - began < 0.26
    assert link.mover.poll() == [Finished(STORE, 2, None)]
    assert link.mover.pending() == 1
    link.stream(LOAD).stuck = False
    assert link.mover.wait(0.25)
    assert link.end() == [Finished(LOAD, 1, None)]


def test_poison_fills_its_pages_alone_before_what_is_queued_later(make_link: Make) -> None:
    link = make_link()
    pool, arena = link.after(LOAD, [])
    pool[[3, 30]] = float("nan")
    link.mover.poison(np.array([30, 3], dtype=np.int32))
    assert link.pool.numpy().tobytes() == pool.numpy().tobytes()
    assert torch.equal(link.arena, arena)
    streams = (link.mover._unpacking, *map(link.stream, KINDS))
    assert [stream.waited_for for stream in streams] == [[link.mover._poisoning]] * 3


# What a batch begins over at once: loads of some layers


class PageList(ctypes.Structure):
    """What the kernel is given."""

    _fields_ = [(name, ctypes.c_int) for name in ("last", "count", "first", "unused")] + [("pages", ctypes.c_int * 128)]


class Unpacking:
    """States that are twice what the pool has, made in the order of a stream; counts its calls.

    `queues`: by a kernel that the queue's thread launches, which `fate.refuses`; else by `unpack`, which `raises`.
    """

    def __init__(self, link: Link, *, queues: bool = True) -> None:
        self.link, self.states = link, torch.zeros_like(link.pool)
        self.calls: list[tuple[list[int], int, int]] = []
        self.fate = SimpleNamespace(refuses=False)
        self.raises: dict[int, Exception] = {}  # by the number of the call
        self.kernel: _core._PageKernel | None = self._kernel(self.states, self.calls, self.fate) if queues else None
        link.mover.unpacker = self

    def _kernel(self, states: torch.Tensor, calls: list[Any], fate: SimpleNamespace) -> _core._PageKernel:
        """Holds what it works with and not us."""
        driver, pool = self.link.driver, self.link.pool
        address = 1000 + len(driver.kernels)

        def launch(parameters: Any, grid: int, stream: int) -> int:
            given = PageList.from_address(parameters[1])
            pages, layers = given.pages[: given.count], slice(given.first, given.last)
            assert grid == 2 * given.count * (given.last - given.first)
            calls.append((pages, given.first, given.last))
            if fate.refuses:
                return UNKNOWN
            driver.streams[stream].push(lambda: _double(states, pool, pages, layers))
            return 0

        driver.kernels[address] = launch
        fields = [getattr(PageList, name).offset for name in ("first", "last", "count", "pages")]
        return _core._PageKernel(
            address, 256, 0, [bytes(8), bytes(PageList())], paged=1, fields=fields, most_pages=128, tile_pages=1,
            column_tiles=2, most_blocks=0,
        )  # fmt: skip

    def unpack(self, pages: npt.NDArray[np.int32], first: int, last: int, stream: int) -> None:
        assert self.kernel is None
        self.calls.append((pages.tolist(), first, last))
        failure = self.raises.pop(len(self.calls) - 1, None)
        if failure is not None:
            raise failure
        states, pool = self.states, self.link.pool  # nothing that is queued holds us
        self.link.driver.streams[stream].push(lambda: _double(states, pool, pages.tolist(), slice(first, last)))

    @property
    def stream(self) -> FakeStream:
        return self.link.driver.streams[self.link.mover._unpacking.cuda_stream]


def _double(states: torch.Tensor, pool: torch.Tensor, pages: list[int], layers: slice) -> None:
    states[pages, layers] = 2 * pool[pages, layers]


EIGHT = PageShape(layers=8, page_tokens=2, heads=1, head_dim=8, dtype=torch.float32)
RUNS = {"strided": [60, 68], "pages of a batch": [2] * 64}


def _three_users(lengths: Sequence[int]) -> list[Copy]:
    """Runs of 128 pages in all, shared by three users in turn; neighbours stay neighbours on both sides."""
    firsts = np.cumsum([0, *lengths])[:-1]
    pages = [np.arange(first, first + length) for first, length in zip(firsts, lengths, strict=True)]
    users = [np.concatenate([np.empty(0, dtype=np.int64), *pages[user::3]]) for user in range(3)]
    return [_copy(ticket, own, own + 16) for ticket, own in enumerate(users) if len(own)]


@pytest.mark.parametrize("first_layer", range(8))
@pytest.mark.parametrize("lengths", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("packed", [False, True], ids=["states", "packed"])
def test_a_split_brings_whole_pages_and_behind_them_the_last_group_by_group(
    make_link: Make, packed: bool, lengths: list[int], first_layer: int
) -> None:
    link = make_link(shape=EIGHT)
    unpacking = Unpacking(link) if packed else None
    loads = _three_users(lengths)
    (before, _), (after, arena) = link.after(LOAD, []), link.after(LOAD, loads)
    after[:, :first_layer] = before[:, :first_layer]
    pieces = link.mover.split_pieces(loads)
    assert pieces[:4] == (128, (0, 2, 4, 6), 32, 4 if packed else 1)
    firsts = [first_layer, *(first for first in pieces.groups if first > first_layer)]
    pages = np.concatenate([load.gpu_pages for load in loads])
    bulk = np.array_split(pages[:96], pieces.parts) if len(firsts) > 1 else []
    grouped = torch.from_numpy(pages[96:] if bulk else pages).long()
    arrivals = link.mover.submit_split(loads, first_layer)
    # One event for each of the runner's groups: the piece that brings its last layer.
    events = [arrivals.events[min(7, last - 1) // 2] for last in (*firsts[1:], 8)]
    assert len(arrivals.events) == 4 and len(set(map(id, events))) == len(events)
    for place, (event, last) in enumerate(zip(events, (*firsts[1:], 8), strict=True)):
        assert not event.passed()
        assert torch.equal(link.pool[grouped, firsts[place] :], before[grouped, firsts[place] :])
        while not event.passed():
            link.stream(LOAD).run(1)
            if unpacking is not None:
                unpacking.stream.run()
        assert torch.equal(link.pool[:, :last], after[:, :last])
        if unpacking is not None:
            assert torch.equal(unpacking.states[:, first_layer:last], 2 * after[:, first_layer:last])
            assert not unpacking.states[:, :first_layer].any()
    arrivals.wait()
    assert link.end() == [Finished(LOAD, load.ticket, None) for load in loads]
    assert link.holds((after, arena))
    if unpacking is not None:
        parts = [(part.tolist(), first_layer, 8) for part in bulk]
        groups = [(grouped.tolist(), *each) for each in zip(firsts, (*firsts[1:], 8), strict=True)]
        assert unpacking.calls == parts + groups


@pytest.mark.parametrize("call", range(2))
def test_a_split_fails_whichever_of_its_parts_the_driver_refuses(make_link: Make, call: int) -> None:
    link = make_link(shape=EIGHT)
    _refuse(link, call)
    link.mover.submit_split([_long(1, 0, 128)], 0).wait()
    (finished,) = link.end()
    assert "load of 128 pages: cuMemcpy" in str(finished.error)


def test_a_short_split_comes_in_one_piece(make_link: Make) -> None:
    link = make_link(shape=EIGHT)
    arrivals = link.mover.submit_split([_long(1, 0, 8), _long(2, 16, 8)], 3)
    assert len(set(map(id, arrivals.events))) == 1
    link.end()


def test_a_split_goes_ahead_of_what_still_waits(make_link: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    link = make_link()
    monkeypatch.setattr(cuda_mover, "QUEUED_BYTES", 16 * SHAPE.bytes)
    waiting = [_long(ticket, 16 * ticket) for ticket in range(3)]
    expected = link.after(LOAD, waiting)
    for load in waiting:
        link.mover.submit(LOAD, [load])
    split = _long(9, 64)
    arrivals = link.mover.submit_split([split], 1)
    expected[0][64:80, 1:] = link.arena[64:80, 1:]
    arrivals.wait()
    assert torch.equal(link.pool[64:80], expected[0][64:80])
    assert not torch.equal(link.pool[32:48], expected[0][32:48])
    assert [each.ticket for each in link.end()] == [0, 9, 1, 2]
    assert link.holds(expected)


def test_of_a_split_one_user_fails_and_the_others_come(make_link: Make) -> None:
    fates = iter([False, True, False])

    def fault(kind: str) -> None:
        if next(fates):
            raise TransferFailed(kind)

    link = make_link(fault=fault)
    unpacking = Unpacking(link)
    loads = [_long(ticket, 16 * ticket) for ticket in range(3)]
    expected = link.after(LOAD, [loads[0], loads[2]])
    expected[0][:, :1] = link.pool[:, :1]
    link.mover.submit_split(loads, 1)
    assert not link.mover.near(1)
    assert [each.error is None for each in link.end()] == [True, False, True]
    assert link.holds(expected)
    pages = np.concatenate([loads[0].gpu_pages, loads[2].gpu_pages]).tolist()
    assert {page for called, *_ in unpacking.calls for page in called} == set(pages)


def test_a_split_of_which_all_fail_ends_and_moves_nothing(make_link: Make) -> None:
    def fault(kind: str) -> None:
        raise TransferFailed(kind)

    link = make_link(fault=fault)
    unpacking, before = Unpacking(link), link.after(LOAD, [])
    link.mover.submit_split([_long(1, 0), _long(2, 16)], 1).wait()
    assert [each.error is None for each in link.end()] == [False, False]
    assert link.holds(before)
    assert unpacking.calls == []


@pytest.mark.parametrize("call", range(4))
def test_a_split_that_the_driver_refuses_half_way_fails_for_all_its_users(make_link: Make, call: int) -> None:
    link = make_link(shape=EIGHT)
    loads = [_long(1, 0, 64), _long(2, 64, 64)]
    _refuse(link, call)
    arrivals = link.mover.submit_split(loads, 1)
    link.mover.submit(LOAD, [_long(3, 0)])
    arrivals.wait()
    assert not any(map(link.mover.near, (1, 2)))
    finished = link.end()
    assert [each.error is None for each in finished] == [False, False, True]
    assert "load of 64 pages: cuMemcpy2DAsync_v2: error 999" in str(finished[0].error)
    expected = link.after(LOAD, loads)
    link.mover.submit_split(loads, 0)
    assert {each.error for each in link.end()} == {None}
    assert link.holds(expected)


def test_whole_loads_are_unpacked_once_they_are_there_and_stores_never(make_link: Make) -> None:
    link = make_link()
    unpacking = Unpacking(link)
    short, long = [_copy(1, [3, 90], [7, 2]), _copy(2, [5], [9])], _long(3, 16, 48)
    expected = link.after(LOAD, [*short, long])
    link.mover.submit(STORE, [_long(4, 100)])
    link.mover.submit(LOAD, short)
    link.mover.submit(LOAD, [long])
    assert [each[1:] for each in unpacking.calls] == [(0, 4), (0, 4)]
    assert unpacking.calls[0][0] == [3, 90, 5]
    unpacking.stream.run()
    assert not unpacking.states.any()  # the bytes are not there
    link.stream(LOAD).run()
    assert link.mover.poll() == []  # the bytes are, the states are not
    arrivals = link.mover.arrivals([3])
    arrivals.wait()
    assert torch.equal(unpacking.states[16:64], 2 * expected[0][16:64])
    assert {each.error for each in link.end()} == {None}
    assert torch.equal(link.pool, expected[0])
    rows = torch.tensor([3, 90, 5])
    assert torch.equal(unpacking.states[rows], 2 * expected[0][rows])


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_loads_whose_states_cannot_be_made_fail(make_link: Make, split: bool) -> None:
    link = make_link()
    unpacking = Unpacking(link)
    unpacking.fate.refuses = True
    if split:
        link.mover.submit_split([_long(1, 0)], 1)
    else:
        link.mover.submit(LOAD, [_long(1, 0)])
    link.mover.submit(STORE, [_long(2, 100)])
    finished = {each.kind: each.error for each in link.end()}
    assert finished[STORE] is None
    assert "load of 16 pages: cuLaunchKernelEx: error 999" in str(finished[LOAD])


def test_poison_reaches_states_as_well(make_link: Make) -> None:
    link = make_link()
    unpacking = Unpacking(link)
    link.mover.poison(np.array([30, 3], dtype=np.int32))
    assert sorted(set(torch.nonzero(unpacking.states.isnan())[:, 0].tolist())) == [3, 30]
    assert unpacking.states[[3, 30]].isnan().all()


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ([range(8), range(8, 16)], 16.0),  # neighbours, of two users
        ([range(8), range(20, 24)], 6.0),
        ([range(0, 26, 2)], 1.0),
        ([[0, 1, 2], [8]], 2.0),
        ([range(4, 20)], 8.0),  # cut at the end of a chunk
    ],
)
def test_pages_of_a_run(make_link: Make, pages: list[Any], expected: float) -> None:
    link = make_link()
    loads = [_copy(ticket, list(own), list(own)) for ticket, own in enumerate(pages)]
    count = sum(map(len, pages))
    assert link.mover.split_pieces(loads) == (count, (0,), count, 1, expected)


# What goes wrong while a submission is put together


@pytest.mark.parametrize("calls", range(4))
@pytest.mark.parametrize("failure", [InvalidArgument("of no page", field="pages"), torch.OutOfMemoryError("no memory")])
def test_what_raises_half_way_fails_its_jobs_alone_and_leaves_nothing_behind(
    make_link: Make, failure: Exception, calls: int
) -> None:
    link = make_link(shape=EIGHT)
    unpacking = Unpacking(link, queues=False)
    unpacking.raises = {calls: failure}
    loads = [_long(1, 0, 64), _long(2, 64, 64)]
    arrivals = link.mover.submit_split(loads, 1)
    assert len(arrivals.events) == 4
    assert not any(map(link.mover.near, (1, 2)))
    assert link.mover.poll() == []  # what was queued before has to end first
    arrivals.wait()
    assert link.stream(LOAD).queued == unpacking.stream.queued == 0
    finished = link.end()
    assert [each.ticket for each in finished] == [1, 2]
    assert all(str(failure) in str(each.error) for each in finished)
    expected = link.after(LOAD, loads)
    link.mover.submit_split(loads, 0)
    assert {each.error for each in link.end()} == {None}
    assert link.holds(expected)
    assert torch.equal(unpacking.states, 2 * expected[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [-1, 200])
def test_pages_that_there_are_not_fail_their_job_alone(make_link: Make, kind: str, wrong: int) -> None:
    link = make_link()
    Unpacking(link)
    good, bad = _copy(1, [3, 4], [5, 6]), _copy(2, [7, 8], [9, wrong])
    expected = link.after(kind, [good])
    link.mover.submit(kind, [bad])
    link.mover.submit(kind, [good])
    first, second = link.end()
    assert f"{kind} of 2 pages: host_pages: page {wrong} is not within 0..159" in str(first.error)
    assert second == Finished(kind, 1, None)
    assert link.holds(expected)


def test_a_whole_load_whose_unpacking_raises_is_not_found_in_the_next(make_link: Make) -> None:
    link = make_link()
    unpacking = Unpacking(link, queues=False)
    unpacking.raises = {0: InvalidArgument("of no page", field="pages")}
    link.mover.submit(LOAD, [_long(1, 0, 3)])
    link.mover.submit(LOAD, [_long(2, 16, 48)])
    link.mover.submit(LOAD, [_long(3, 64, 2)])
    assert [each.error is None for each in link.end()] == [False, True, True]
    assert not unpacking.states[:16].any()


def test_a_split_of_which_all_fail_comes_behind_the_states_of_earlier_loads(make_link: Make) -> None:
    """A batch over both waits for the last one alone."""
    fates = iter([False, True])

    def fault(kind: str) -> None:
        if next(fates):
            raise TransferFailed(kind)

    link = make_link(fault=fault)
    unpacking = Unpacking(link)
    link.mover.submit(LOAD, [_long(1, 16)])
    link.mover.submit_split([_long(2, 32)], 1).wait()
    assert torch.equal(unpacking.states[16:32], 2 * link.pool[16:32])
    assert unpacking.states[16:32].any()
    assert [each.error is None for each in link.end()] == [True, False]


@pytest.mark.parametrize("at", ["queued", "under way"])
def test_an_unpacker_lives_until_its_last_load_has_ended(make_link: Make, at: str) -> None:
    """The device reads the memory that it owns, whatever model is served meanwhile."""
    link = make_link()
    unpacking = weakref.ref(Unpacking(link))
    link.mover._lanes[LOAD].queue.late = at == "queued"
    link.mover.submit(LOAD, [_long(1, 16)])
    link.mover.unpacker = None
    gc.collect()
    assert unpacking() is not None
    assert link.end() == [Finished(LOAD, 1, None)]
    gc.collect()
    assert unpacking() is None


# While the driver is still being given what was submitted


def _hold(link: Link) -> None:
    for lane in link.mover._lanes.values():
        lane.queue.late = True


def test_events_used_before_mean_nothing_until_the_driver_has_the_list(make_link: Make) -> None:
    link = make_link()
    for kind in KINDS:
        link.mover.submit(kind, [_long(1, 16), _long(2, 48)])
    link.end()
    _hold(link)
    loads = [_long(3, 0), _long(4, 32, 48)]
    expected = link.after(LOAD, loads)
    for load in loads:
        link.mover.submit(LOAD, [load])
    link.mover.submit(STORE, [_long(5, 96)])
    assert link.mover.poll() == []  # though every event of theirs has passed before
    assert not any(map(link.mover.near, (3, 4)))
    link.mover._lanes[LOAD].queue.work(1)
    link.stream(LOAD).run()
    assert link.mover.near(3)
    assert not link.mover.near(4)
    assert link.mover.poll() == [Finished(LOAD, 3, None)]
    assert not link.mover.near(4)
    arrivals = link.mover.arrivals([4])
    arrivals.wait()
    assert torch.equal(link.pool, expected[0])
    assert {(each.kind, each.ticket) for each in link.end()} == {(LOAD, 4), (STORE, 5)}


def test_waiting_ends_in_time_where_the_driver_hangs(make_link: Make) -> None:
    link = make_link()
    link.mover._lanes[LOAD].queue.late = True
    link.mover.submit(LOAD, [_long(1, 16)])
    link.mover.submit(STORE, [_long(2, 48)])
    assert not link.mover.wait(0.25)
    assert link.mover.poll() == [Finished(STORE, 2, None)]
    assert link.mover.pending() == 1
    link.mover._lanes[LOAD].queue.work()
    assert link.end() == [Finished(LOAD, 1, None)]


# All at once


class Storm:
    """Random copies both ways over a driver that is late, and fails, at random; each side mirrored.

    `late`: so is the thread that feeds it.
    """

    def __init__(self, make_link: Make, seed: int, late: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.link = make_link(96, 112, self._fault)
        self.link.driver.refuses = lambda: self.rng.random() < 0.03
        if late:
            _hold(self.link)
        self.expected = self.link.after(LOAD, [])
        self.busy = [np.zeros(len(tier), dtype=bool) for tier in self.expected]  # pages of copies under way
        self.open: dict[str, dict[int, Copy]] = {LOAD: {}, STORE: {}}
        self.failed = self.ended = self.near = 0

    def _fault(self, kind: str) -> None:
        if self.rng.random() < 0.05:
            raise TransferFailed(kind)

    def submit(self, ticket: int) -> int:
        """Up to three copies, submitted together; returns the next ticket."""
        kind, copies = KINDS[self.rng.integers(2)], []
        for _ in range(self.rng.integers(1, 4)):
            pages = self._pages(int(self.rng.choice([1, 5, 16, 40])))
            if pages is not None:
                copies.append(_copy(ticket, *pages))
                self.open[kind][ticket] = copies[-1]
                ticket += 1
        if copies:
            self.link.mover.submit(kind, copies)
        return ticket

    def _pages(self, most: int) -> list[npt.NDArray[np.int64]] | None:
        """As many idle pages of each side, marked as busy: neighbours where there are any, or scattered."""
        idle = [np.flatnonzero(~busy) for busy in self.busy]
        count = min(most, *map(len, idle))
        if not count:
            return None
        if self.rng.random() < 0.3:
            idle = [self.rng.permutation(pages) for pages in idle]
        taken = [pages[:count] for pages in idle]
        for busy, pages in zip(self.busy, taken, strict=True):
            busy[pages] = True
        return taken

    def poll(self) -> None:
        for each in self.link.mover.poll():
            oldest = next(iter(self.open[each.kind]))
            assert oldest == each.ticket
            self._ended(each, self.open[each.kind].pop(oldest))
        assert self.link.mover.pending() == sum(map(len, self.open.values()))
        self.link.check()

    def _ended(self, each: Finished, copy: Copy) -> None:
        self.ended += 1
        side, into = (0, copy.gpu_pages) if each.kind == LOAD else (1, copy.host_pages)
        actual, pages = (self.link.pool, self.link.arena)[side], torch.from_numpy(into.astype(np.int64))
        if each.error is None:
            out_of = torch.from_numpy((copy.host_pages if each.kind == LOAD else copy.gpu_pages).astype(np.int64))
            self.expected[side][pages] = self.expected[1 - side][out_of]
            assert torch.equal(actual[pages], self.expected[side][pages])
        else:
            self.failed += 1
            self.expected[side][pages] = actual[pages]  # may hold anything
        self.busy[0][copy.gpu_pages] = self.busy[1][copy.host_pages] = False

    def look(self) -> None:
        """A batch over whatever load is near finds its pages as they will be."""
        for ticket in [ticket for ticket in self.open[LOAD] if self.link.mover.near(ticket)]:
            self.near += 1
            self.link.mover.arrivals([ticket]).wait()
            copy = self.open[LOAD][ticket]
            inside, outside = [torch.from_numpy(ids.astype(np.int64)) for ids in (copy.gpu_pages, copy.host_pages)]
            assert torch.equal(self.link.pool[inside], self.expected[1][outside])

    def run(self, turns: int) -> None:
        ticket = 0
        for _ in range(turns):
            ticket = self.submit(ticket)
            for kind in KINDS:
                if self.rng.random() < 0.5:
                    self.link.mover._lanes[kind].queue.work(int(self.rng.integers(3)))
                self.link.stream(kind).run(int(self.rng.integers(12)))
            if self.rng.random() < 0.3:
                self.look()
            if self.rng.random() < 0.6:
                self.poll()
        assert self.link.mover.wait()
        self.poll()
        assert self.link.end() == []
        assert self.link.holds(self.expected)
        assert self.ended == ticket


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("seed", range(6))
def test_a_storm_of_copies_is_exact(make_link: Make, seed: int, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    storm = Storm(make_link, seed, late)
    monkeypatch.setattr(cuda_mover, "QUEUED_BYTES", (16, 64, 512)[seed % 3] * SHAPE.bytes)
    storm.run(500 if late else 300)
    assert storm.ended > 200
    assert storm.failed > 10
    assert storm.near > 3
