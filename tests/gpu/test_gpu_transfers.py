"""Copies over the link, byte for byte, and what waits for them: however late they come, nobody reads too early."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gpu_delays import MS, delay_groups, delay_stream, group_all_loads
from gpu_driver import STRIDED, Copies, in_step, interpose

from mtserve.cache.index import Copy
from mtserve.engine.forward.gates import Gates, LayerWaits
from mtserve.errors import ResourceExhausted, TransferFailed
from mtserve.kernels.cuda.driver import Event, OwnStream, batch_name
from mtserve.kernels.cuda.graph import capture
from mtserve.transfer import cuda_mover
from mtserve.transfer.arena import HostArena, grow_all
from mtserve.transfer.cuda_mover import CudaMover, layer_groups
from mtserve.transfer.mover import LOAD, STORE, Fault, Finished, runs
from mtserve.transfer.pinning import CudaPinning
from mtserve.transfer.pool import PageShape, allocate_pool

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
MIB = 2**20
LARGE = PageShape(layers=8, page_tokens=64, heads=4, head_dim=128, dtype=torch.bfloat16)  # 1 MiB
MIDDLE = PageShape(layers=8, page_tokens=64, heads=2, head_dim=64, dtype=torch.bfloat16)  # 256 KiB
SMALL = PageShape(layers=4, page_tokens=16, heads=2, head_dim=64, dtype=torch.bfloat16)  # 32 KiB
RUNS = {
    "scattered": [1] * 150,
    "threes": [3] * 40,
    "sixteens": [16] * 9,
    "sixty-fours": [64] * 3,
    "mixed": [1, 64, 3, 16, 1, 40, 2, 16],
    "short": [1, 3, 2],
}

PageIds = npt.NDArray[np.int32]


class Link:
    """A pool, an arena of several chunks that are pinned apart, and the mover between them."""

    def __init__(
        self, shape: PageShape, pool_pages: int, arena_pages: int, chunk_bytes: int, fault: Fault | None
    ) -> None:
        self.host = HostArena(shape, arena_pages, device=DEVICE, poison=True, chunk_bytes=chunk_bytes)
        grow_all(self.host)
        assert arena_pages > self.host.chunk_pages
        self.pool = allocate_pool(shape, pool_pages, DEVICE, poison=True)
        self.mover = CudaMover(self.pool, self.host.tensor, fault, chunk_pages=self.host.chunk_pages)
        for lane in self.mover._lanes.values():
            in_step(lane.queue)

    @property
    def totals(self) -> tuple[int, int]:
        """Pages of the pool and of the arena."""
        return len(self.pool), len(self.host.tensor)

    def chunks(self) -> Iterator[slice]:
        """Only what lies in one of them can be handed to CUDA as one piece."""
        for first in range(0, len(self.host.tensor), self.host.chunk_pages):
            yield slice(first, first + self.host.chunk_pages)

    def arena(self) -> torch.Tensor:
        """What the arena holds, on the device."""
        return torch.cat([self.host.tensor[chunk].to(DEVICE) for chunk in self.chunks()])

    def fill(self, kind: str, seed: int = 0) -> None:
        """Random bits where `kind` reads, NaN where it writes."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        like = self.arena() if kind == LOAD else self.pool
        bits = torch.randint(-(2**15), 2**15, like.shape, generator=generator, device=DEVICE, dtype=torch.int16)
        values = bits.view(like.dtype)
        if kind == LOAD:
            for chunk in self.chunks():
                self.host.tensor[chunk].copy_(values[chunk])
            self.pool.fill_(float("nan"))
        else:
            self.pool.copy_(values)
            self.host.tensor.fill_(float("nan"))
        torch.cuda.synchronize()

    def close(self) -> None:
        self.mover.wait()
        torch.cuda.synchronize()
        self.host.close()


Make = Callable[..., Link]


@pytest.fixture
def make_link() -> Iterator[Make]:
    made: list[Link] = []

    def make(
        shape: PageShape = LARGE,
        pool_pages: int = 256,
        arena_pages: int = 300,
        chunk_bytes: int = 1,
        fault: Fault | None = None,
    ) -> Link:
        made.append(Link(shape, pool_pages, arena_pages, chunk_bytes, fault))
        return made[-1]

    torch.cuda._sleep(1)  # loads its kernel, which would wait for all streams
    yield make
    for each in made:
        each.close()


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.int16), right.contiguous().view(torch.int16))


def _index(pages: PageIds) -> torch.Tensor:
    return torch.from_numpy(pages.astype(np.int64)).to(DEVICE)


def _copy(ticket: int, inside: Any, outside: Any) -> Copy:
    return Copy(ticket, "", np.asarray(inside, dtype=np.int32), np.asarray(outside, dtype=np.int32), 0, 0)


def _in_runs(rng: np.random.Generator, total: int, lengths: Sequence[int]) -> PageIds:
    """Pages below `total` in runs of these lengths, in this order; where they lie is random, none is there twice."""
    gaps = rng.multinomial(total - sum(lengths), np.full(len(lengths) + 1, 1 / (len(lengths) + 1)))
    firsts, end = np.zeros(len(lengths), dtype=np.int64), 0
    for gap, run in zip(gaps, rng.permutation(len(lengths)), strict=False):
        firsts[run] = end + gap
        end = firsts[run] + lengths[run]
    pages = [np.arange(first, first + length) for first, length in zip(firsts, lengths, strict=True)]
    return np.concatenate(pages).astype(np.int32)


def _expected(link: Link, kind: str, copies: Sequence[Copy]) -> torch.Tensor:
    """What all of the target holds once `copies` have ended."""
    inside = _index(np.concatenate([copy.gpu_pages for copy in copies]))
    outside = _index(np.concatenate([copy.host_pages for copy in copies]))
    pool, arena = link.pool.clone(), link.arena()
    if kind == LOAD:
        pool[inside] = arena[outside]
    else:
        arena[outside] = pool[inside]
    torch.cuda.synchronize()
    return pool if kind == LOAD else arena


def _target(link: Link, kind: str) -> torch.Tensor:
    return link.pool if kind == LOAD else link.arena()


def _end(link: Link) -> list[Finished]:
    """Wait for all copies; all are told, once."""
    pending = link.mover.pending()
    link.mover.wait()
    finished = link.mover.poll()
    assert len(finished) == pending
    assert link.mover.poll() == []
    assert link.mover.pending() == 0
    return finished


def _assert_exact(link: Link, kind: str, copies: Sequence[Copy], seed: int = 0) -> None:
    """They bring every byte of their pages, and not another page is touched on either side."""
    link.fill(kind, seed)
    source = link.arena() if kind == LOAD else link.pool.clone()
    expected = _expected(link, kind, copies)
    link.mover.submit(kind, copies)
    assert link.mover.pending() == len(copies)
    assert _end(link) == [Finished(kind, copy.ticket, None) for copy in copies]
    assert _same(_target(link, kind), expected)
    assert _same(link.arena() if kind == LOAD else link.pool, source)


# Bytes


@pytest.mark.parametrize("kind", [LOAD, STORE])
@pytest.mark.parametrize("lengths", RUNS.values(), ids=RUNS)
def test_copies_are_exact_and_touch_nothing_else(make_link: Make, kind: str, lengths: list[int]) -> None:
    """Chunks are of 16 pages, so that every longer run and most others cross the end of one."""
    link = make_link()
    assert link.host.chunk_pages == 16
    rng = np.random.default_rng(len(lengths))
    for turn in range(3):
        inside, outside = [_in_runs(rng, total, lengths) for total in link.totals]
        _assert_exact(link, kind, [_copy(turn, inside, outside)], seed=turn)


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 6, 8])
def test_loads_by_groups_are_exact_for_any_number_of_layers(
    make_link: Make, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    group_all_loads(monkeypatch)
    link = make_link(PageShape(layers, 16, 2, 64, torch.bfloat16), 64, 90)
    rng = np.random.default_rng(layers)
    for turn, lengths in enumerate(([1] * 20, [16, 16], [7, 1, 30, 2])):
        inside, outside = [_in_runs(rng, total, lengths) for total in link.totals]
        _assert_exact(link, LOAD, [_copy(turn, inside, outside)], seed=turn)


def test_long_loads_of_long_runs_come_by_groups_and_nothing_else_does(make_link: Make) -> None:
    link = make_link()
    fours = np.concatenate([np.arange(4) + 8 * run for run in range(8)])
    for inside, outside, groups in (
        (np.arange(64), np.arange(64) + 16, 4),
        (np.arange(64), np.arange(64) + 8, 4),  # cut at the ends of chunks: pieces of 8 and 16
        (np.arange(8), np.arange(8) + 32, 4),
        (fours, fours, 2),
        (np.arange(64)[::-1], np.arange(64)[::-1], 1),  # single pages
        (np.arange(7), np.arange(7), 1),  # 7 MiB
    ):
        link.mover.submit(LOAD, [_copy(1, inside, outside)])
        link.mover.submit(STORE, [_copy(1, inside + 64, outside + 64)])
        assert len(link.mover._lanes[LOAD].under_way[0].events) == groups
        assert len(link.mover.arrivals([1]).events) == len(layer_groups(LARGE.layers)) == 4
        assert len(link.mover._lanes[STORE].under_way[0].events) == 1
        assert {each.error for each in _end(link)} == {None}


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("kind", [LOAD, STORE])
def test_more_than_a_thousand_copies_in_one_submission(make_link: Make, kind: str, late: bool) -> None:
    link = make_link(SMALL, 1600, 1700)
    rng = np.random.default_rng(5)
    inside, outside = [rng.permutation(total)[:1500].astype(np.int32) for total in link.totals]
    assert len(runs(inside, outside)[0]) > 1024
    copies = [_copy(ticket, inside[ticket : ticket + 1], outside[ticket : ticket + 1]) for ticket in range(1500)]
    link.fill(kind)
    expected = _expected(link, kind, copies)
    if late:
        delay_stream(link.mover._lanes[kind].stream, 200 * MS)
    began = time.monotonic()
    link.mover.submit(kind, copies)
    assert time.monotonic() - began < 1
    given, finished = [sum(map(len, _tickets(link, kind)))], list[Finished]()
    if late:
        assert not link.mover._lanes[kind].under_way[0].events[-1].passed()  # the submission waited for no copy
    churned = [np.zeros(1500, dtype=np.int64) for _ in range(200)]  # where descriptors lay, if they are freed too early
    while link.mover.pending():
        finished += link.mover.poll()
        given.append(sum(map(len, _tickets(link, kind))))
    assert given[0] == max(given) == cuda_mover.QUEUED_PAGES
    assert finished == [Finished(kind, ticket, None) for ticket in range(1500)]
    assert _same(_target(link, kind), expected)
    assert not any(each.any() for each in churned)


def test_copies_both_ways_at_once(make_link: Make) -> None:
    link = make_link()
    rng = np.random.default_rng(6)
    for turn in range(4):
        pool_pages, arena_pages = [rng.permutation(total) for total in link.totals]
        parts = [slice(40 * ticket, 40 * ticket + 40) for ticket in range(6)]
        copies = [_copy(ticket, pool_pages[part], arena_pages[part]) for ticket, part in enumerate(parts)]
        loads, stores = copies[:3], copies[3:]
        link.fill(LOAD, turn)
        stored = _index(np.concatenate([copy.gpu_pages for copy in stores]))
        link.pool[stored] = float(turn + 1)
        expected = _expected(link, LOAD, loads)
        arena = link.arena()
        arena[_index(np.concatenate([copy.host_pages for copy in stores]))] = float(turn + 1)
        torch.cuda.synchronize()
        link.mover.submit(LOAD, loads)
        link.mover.submit(STORE, stores)
        finished = _end(link)
        assert [each.ticket for each in finished if each.kind == LOAD] == [0, 1, 2]
        assert [each.ticket for each in finished if each.kind == STORE] == [3, 4, 5]
        assert _same(link.pool, expected)
        assert _same(link.arena(), arena)


def _tickets(link: Link, kind: str) -> list[list[int]]:
    """Of the jobs that the driver has, those that end together."""
    return [[job.copy.ticket for job in each.jobs] for each in link.mover._lanes[kind].under_way]


def test_jobs_of_one_kind_end_in_the_order_of_their_submission(make_link: Make) -> None:
    """Neighbours share an event up to a bound, but for long loads; none but the first finds the link idle."""
    link = make_link()
    spans = pairwise([0, 2, 34, 36, 100, 132, 137])
    copies = [_copy(ticket, np.arange(*span), np.arange(*span) + 3) for ticket, span in enumerate(spans)]
    together = {LOAD: [[ticket] for ticket in range(6)], STORE: [[0, 1, 2, 3], [4, 5]]}
    for kind in (LOAD, STORE):
        _assert_exact(link, kind, copies)
        link.mover.submit(kind, copies)
        assert _tickets(link, kind) == together[kind]
        link.mover.submit(kind, copies[:4])
        assert _tickets(link, kind) == together[kind] + together[kind][: 4 if kind == LOAD else 1]
        events = [len(each.events) for each in link.mover._lanes[kind].under_way]
        assert set(events[1:]) == {1}  # the link is not idle
        assert [each.ticket for each in _end(link)] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


def test_the_driver_gets_no_more_than_it_takes_at_once(make_link: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits behind that is given to it as copies end, in order, and belongs to what is pending."""
    monkeypatch.setattr(cuda_mover, "QUEUED_BYTES", 20 * MIB)
    link = make_link()
    copies = [_copy(ticket, np.arange(8) + 8 * ticket, np.arange(8) + 8 * ticket + 20) for ticket in range(12)]
    for kind in (LOAD, STORE):
        link.fill(kind)
        expected = _expected(link, kind, copies)
        delay_stream(link.mover._lanes[kind].stream, 20 * MS)
        for copy in copies:
            link.mover.submit(kind, [copy])
        assert _tickets(link, kind) == [[0], [1]]
        assert link.mover.pending() == 12
        assert not link.mover.near(3)
        assert [each.ticket for each in _end(link)] == list(range(12))
        assert _same(_target(link, kind), expected)


def test_a_thread_that_never_called_cuda_submits_and_polls(make_link: Make) -> None:
    link = make_link(MIDDLE, 64, 64)
    link.fill(LOAD)
    copies = [_copy(1, np.arange(40), np.arange(40) + 20)]
    expected = _expected(link, LOAD, copies)
    finished: list[Finished] = []

    def run() -> None:
        link.mover.submit(LOAD, copies)
        link.mover.wait()
        finished.extend(link.mover.poll())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert finished == [Finished(LOAD, 1, None)]
    assert _same(link.pool, expected)


def test_what_is_begun_after_a_poisoning_comes_after_it(make_link: Make) -> None:
    link = make_link()
    pages = np.arange(200, dtype=np.int32)
    copies = [_copy(1, pages, pages + 50)]
    for turn in range(5):
        link.fill(LOAD, turn)
        link.pool.zero_()
        expected = _expected(link, LOAD, copies)
        expected[200:220] = 7
        torch.cuda.synchronize()
        link.mover.poison(np.arange(256, dtype=np.int32))
        link.mover.submit(LOAD, copies)
        link.pool[200:220] = 7  # the compute stream waits as well
        _end(link)
        torch.cuda.synchronize()
        assert _same(link.pool[:220], expected[:220])
        assert torch.isnan(link.pool[220:]).all()


# Failures


def test_a_load_that_fails_leaves_its_pages_and_the_others_alone(make_link: Make) -> None:
    calls: list[str] = []

    def some_fail(kind: str) -> None:
        calls.append(kind)
        if len(calls) in (2, 3):
            raise TransferFailed("the cable fell out")

    link = make_link(fault=some_fail)
    pages = [(0, 2), (2, 4), (4, 36), (36, 38), (38, 72)]  # the third and the last are long
    copies = [_copy(ticket, np.arange(*each), np.arange(*each) + 9) for ticket, each in enumerate(pages)]
    link.fill(LOAD)
    expected = _expected(link, LOAD, [copies[0], *copies[3:]])
    link.mover.submit(LOAD, copies)
    assert not any(link.mover.near(ticket) for ticket in (1, 2))
    finished = _end(link)
    assert [each.ticket for each in finished] == [0, 1, 2, 3, 4]
    assert [each.error is None for each in finished] == [True, False, False, True, True]
    assert _same(link.pool, expected)


@pytest.mark.parametrize("kind", [LOAD, STORE])
def test_a_copy_that_the_driver_refuses_is_told_and_the_next_one_works(make_link: Make, kind: str) -> None:
    link = make_link()
    copies = [_copy(1, [3, 4, 9], [5, 6, 7]), _copy(2, [1], [1])]
    _refuse(link, kind)
    link.mover.submit(kind, copies)
    finished = _end(link)
    assert [each.ticket for each in finished] == [1, 2]
    assert f"{kind} of 3 pages: cuMemcpyBatchAsync: error 1" in str(finished[0].error)
    assert f"{kind} of 1 pages: " in str(finished[1].error)
    _assert_exact(link, kind, copies)


def test_a_load_that_fails_between_its_groups_is_never_near(make_link: Make) -> None:
    link = make_link()
    copies = [_copy(1, np.arange(32), np.arange(32))]
    _refuse(link, LOAD, after=2)
    link.mover.submit(LOAD, copies)
    assert len(link.mover._loads[1].events) == 4
    link.mover._loads[1].events[-1].synchronize()
    assert not link.mover.near(1)
    (finished,) = _end(link)
    assert "load of 32 pages: cuMemcpy2DAsync_v2: error 1" in str(finished.error)
    _assert_exact(link, LOAD, copies)


def _refuse(link: Link, kind: str, after: int = 0) -> None:
    """The driver makes so many calls that copy, and refuses the next one."""
    seen = 0

    def before(copies: Copies) -> int:
        nonlocal seen
        seen += 1
        return 1 if seen == after + 1 else 0

    interpose(link.mover, kind, before)


class PinsTwice:
    """The second chunk is pinned twice, which the driver refuses; what it had of it is given back."""

    def __init__(self) -> None:
        self.calls = 0
        self._real = CudaPinning(DEVICE)

    def pin(self, address: int, size: int) -> None:
        self.calls += 1
        self._real.pin(address, size)
        if self.calls == 2:
            try:
                self._real.pin(address, size)
            finally:
                self._real.unpin(address)

    def unpin(self, address: int) -> None:
        self._real.unpin(address)


def test_a_chunk_that_cannot_be_pinned_leaves_no_error_behind() -> None:
    host = HostArena(MIDDLE, 48, device=DEVICE, poison=True, pinning=PinsTwice(), chunk_bytes=1)
    assert host.grow() == host.chunk_pages == 16
    with pytest.raises(ResourceExhausted, match="cuMemHostRegister_v2: error") as caught:
        host.grow()
    assert caught.value.field == "host_cache"
    torch.cuda.synchronize()
    pool = allocate_pool(MIDDLE, 48, DEVICE, poison=True)  # a kernel, whose launch looks for errors
    mover = CudaMover(pool, host.tensor, chunk_pages=host.chunk_pages)
    for ready in (16, 48):
        host.tensor[:ready].copy_(torch.randn(ready, *MIDDLE.sizes).to(MIDDLE.dtype))
        pages = np.arange(ready, dtype=np.int32)
        torch.cuda.synchronize()
        mover.submit(LOAD, [_copy(ready, pages, pages[::-1].copy())])
        mover.wait()
        assert mover.poll() == [Finished(LOAD, ready, None)]
        assert _same(pool[:ready].cpu(), host.tensor[:ready].flip(0))
        assert torch.isnan(pool[ready:]).all()
        grow_all(host)
    torch.cuda.synchronize()
    host.close()


def test_no_copy_crosses_the_end_of_a_chunk(make_link: Make) -> None:
    link = make_link(arena_pages=290)
    base, chunk = link.host.tensor.data_ptr(), link.host.chunk_pages * LARGE.bytes
    spans: list[tuple[int, int]] = []
    calls: list[str] = []

    def note(kind: str, copies: Copies) -> int:
        calls.append(copies.name)
        spans.extend(zip((copies.source if kind == LOAD else copies.to).tolist(), copies.spans.tolist(), strict=True))
        return 0

    for kind in (LOAD, STORE):
        interpose(link.mover, kind, partial(note, kind))
    rng = np.random.default_rng(7)
    for turn in range(6):
        kind = (LOAD, STORE)[turn % 2]
        lengths = list(RUNS.values())[turn]
        inside, outside = [_in_runs(rng, total, lengths) for total in link.totals]
        _assert_exact(link, kind, [_copy(turn, inside, outside)])
    for kind in (LOAD, STORE):
        _assert_exact(link, kind, [_copy(9, np.arange(256), np.arange(256) + 34)])  # to the last page of the last chunk
    assert set(calls) == {batch_name(), STRIDED}
    for address, size in spans:
        assert (address - base) // chunk == (address + size - 1 - base) // chunk


# What comes late


def test_a_load_is_near_once_half_its_groups_came_or_little_is_left(make_link: Make) -> None:
    link = make_link()
    delay_groups(link.mover, lambda load, group: 0 if group == 3 else 200 * MS)
    link.fill(LOAD)
    copies = [_copy(1, np.arange(32), np.arange(32) + 5), _copy(2, np.arange(32) + 32, np.arange(32) + 70)]
    expected = _expected(link, LOAD, copies)
    for copy in copies:
        link.mover.submit(LOAD, [copy])
    first, second = [link.mover._loads[ticket] for ticket in (1, 2)]
    assert (len(first.events), len(second.events)) == (4, 1)
    assert second.announced is not None
    assert not link.mover.near(1)
    first.events[0].synchronize()
    assert not link.mover.near(1)
    first.events[1].synchronize()
    assert link.mover.near(1)
    assert not link.mover.near(2)
    assert link.mover.poll() == []  # near is not over
    assert link.mover.pending() == 2
    link.mover.arrivals([1]).wait()
    assert link.mover.poll() == [Finished(LOAD, 1, None)]
    assert not link.mover.near(1)
    second.announced.synchronize()
    assert link.mover.near(2)
    arrivals = link.mover.arrivals([2])
    arrivals.wait()
    assert _same(link.pool, expected)
    assert [each.ticket for each in _end(link)] == [2]


def test_arrivals_of_several_loads_are_those_of_the_last(make_link: Make) -> None:
    link = make_link()
    delay_groups(link.mover, lambda load, group: 20 * MS)
    link.fill(LOAD)
    copies = [
        _copy(1, np.arange(32), np.arange(32) + 5),
        _copy(2, np.arange(64, 66), np.arange(64, 66)),  # short: one event, for all groups
        _copy(3, np.arange(32) + 32, np.arange(32) + 70),
    ]
    expected = _expected(link, LOAD, copies)
    for copy in copies:
        link.mover.submit(LOAD, [copy])
    assert link.mover.arrivals([3, 1]).events == link.mover.arrivals([3]).events
    short = link.mover.arrivals([1, 2]).events
    assert len(short) == 4
    assert len(set(map(id, short))) == 1
    assert not link.mover.near(2)
    link.mover.arrivals([3, 1, 2]).wait()
    assert _same(link.pool, expected)
    assert [each.ticket for each in _end(link)] == [1, 2, 3]


class LayerCopies:
    """A captured graph that copies some pages' layers out, each layer after its wait; a model's stand-in."""

    def __init__(self, pool: torch.Tensor, pages: int, waits: LayerWaits | None) -> None:
        self._pool, self._waits = pool, waits
        self._index = torch.zeros(pages, dtype=torch.int64, device=DEVICE)
        self.out = torch.empty(pool.shape[1], pages, *pool.shape[2:], dtype=pool.dtype, device=DEVICE)
        self._run()
        torch.cuda.synchronize()
        own = OwnStream()
        with torch.cuda.stream(torch.cuda.ExternalStream(own.handle)):
            self._graph = capture(own.handle, self._run)

    def _run(self) -> None:
        for layer in range(self._pool.shape[1]):
            if self._waits is not None:
                self._waits.before(layer)
            torch.index_select(self._pool[:, layer], 0, self._index, out=self.out[layer])

    def launch(self, pages: torch.Tensor, stream: int) -> None:
        self._index.copy_(pages)
        self._graph.launch(stream)


class Gated:
    """A link whose every load comes by groups, and graphs over it: one that waits, and one that does not."""

    pages = 8

    def __init__(self, link: Link) -> None:
        self.link = link
        groups = layer_groups(MIDDLE.layers)
        self.stream = torch.cuda.current_stream().cuda_stream
        waits = LayerWaits(groups)
        for event in waits.events.values():
            event.record(self.stream)
        self.gates = [Gates(waits, groups) for _ in range(2)]
        self.gated = LayerCopies(link.pool, self.pages, waits)
        self.free = LayerCopies(link.pool, self.pages, None)
        link.fill(LOAD)
        firsts = (5, 21, 37)  # on the other side 13, 29 and 45: each crosses the end of a chunk
        self.copies = [
            _copy(ticket, np.arange(first, first + 8), np.arange(first + 8, first + 16))
            for ticket, first in enumerate(firsts)
        ]
        self.inside = [_index(copy.gpu_pages) for copy in self.copies]
        arena = link.arena()
        self.expected = [arena[_index(copy.host_pages)].transpose(0, 1).contiguous() for copy in self.copies]
        torch.cuda.synchronize()


@pytest.fixture
def gated(make_link: Make, monkeypatch: pytest.MonkeyPatch) -> Gated:
    group_all_loads(monkeypatch)
    return Gated(make_link(MIDDLE, 64, 64))


def test_the_layers_of_a_graph_wait_for_their_pages(gated: Gated) -> None:
    link, gates = gated.link, gated.gates[0]
    delay_groups(link.mover, lambda load, group: 40 * MS)
    link.mover.submit(LOAD, gated.copies[:1])
    gates.open_at(link.mover.arrivals([0]), gated.stream)
    gated.gated.launch(gated.inside[0], gated.stream)
    assert link.mover.poll() == []
    torch.cuda.synchronize()
    assert _same(gated.gated.out, gated.expected[0])
    waited = gates.waited()
    assert tuple(waited) == layer_groups(MIDDLE.layers)
    seconds = list(waited.values())
    assert min(np.diff([0.0, *seconds])) > 0.01
    assert [each.ticket for each in _end(link)] == [0]

    # Over no load neither graph waits for anything.
    for graph in (gated.gated, gated.free):
        graph.out.fill_(float("nan"))
        graph.launch(gated.inside[0], gated.stream)
        torch.cuda.synchronize()
        assert _same(graph.out, gated.expected[0])


def test_a_graph_that_does_not_wait_reads_too_early(gated: Gated) -> None:
    """What the tests around this one would see, were there no waits."""
    delay_groups(gated.link.mover, lambda load, group: 40 * MS)
    gated.link.mover.submit(LOAD, gated.copies[:1])
    gated.free.launch(gated.inside[0], gated.stream)
    torch.cuda.synchronize()
    assert torch.isnan(gated.free.out).any()


def test_a_graph_over_a_load_that_is_there_already_waits_for_nothing(gated: Gated) -> None:
    gated.link.mover.submit(LOAD, gated.copies[:1])
    gates, arrivals = gated.gates[0], gated.link.mover.arrivals([0])
    arrivals.wait()
    delay_stream(torch.cuda.current_stream(), 20 * MS)
    gates.open_at(arrivals, gated.stream)
    gated.gated.launch(gated.inside[0], gated.stream)
    torch.cuda.synchronize()
    assert _same(gated.gated.out, gated.expected[0])
    assert set(gates.waited().values()) == {0.0}
    _end(gated.link)


def test_batches_in_flight_wait_for_their_own_loads_alone(gated: Gated) -> None:
    """Two launches of one graph: what the second waits for is marked while the first has not even begun."""
    mover = gated.link.mover
    delay_groups(mover, lambda load, group: 30 * MS)
    results = [torch.empty_like(gated.gated.out) for _ in range(2)]
    done = [Event() for _ in range(2)]
    torch.cuda.synchronize()
    for copy in gated.copies[:2]:
        mover.submit(LOAD, [copy])
        delay_stream(mover._lanes[LOAD].stream, 400 * MS)
    for batch in range(2):
        gated.gates[batch].open_at(mover.arrivals([batch]), gated.stream)
        gated.gated.launch(gated.inside[batch], gated.stream)
        results[batch].copy_(gated.gated.out)
        done[batch].record(gated.stream)
    assert not done[0].passed()
    done[0].synchronize()
    assert not mover._loads[1].events[0].passed()  # nothing of the second load has come
    assert not done[1].passed()
    torch.cuda.synchronize()
    for result, expected in zip(results, gated.expected, strict=False):
        assert _same(result, expected)
    first, second = [list(gates.waited().values()) for gates in gated.gates]
    assert max(first) < min(second)
    assert [each.ticket for each in _end(gated.link)] == [0, 1]


def test_gates_are_used_again_by_the_batch_after_the_next(gated: Gated) -> None:
    """Three batches over three loads, two of them in flight at any time, as an engine runs them."""
    mover = gated.link.mover
    delay_groups(mover, lambda load, group: (7, 0, 30, 3)[(load + group) % 4] * MS)
    results = [torch.empty_like(gated.gated.out) for _ in range(3)]
    done = [Event() for _ in range(3)]
    torch.cuda.synchronize()
    for batch in range(3):
        if batch == 2:
            done[0].synchronize()
        mover.submit(LOAD, gated.copies[batch : batch + 1])
        gated.gates[batch % 2].open_at(mover.arrivals([batch]), gated.stream)
        gated.gated.launch(gated.inside[batch], gated.stream)
        results[batch].copy_(gated.gated.out)
        done[batch].record(gated.stream)
    torch.cuda.synchronize()
    for result, expected in zip(results, gated.expected, strict=True):
        assert _same(result, expected)
    assert [each.ticket for each in _end(gated.link)] == [0, 1, 2]
