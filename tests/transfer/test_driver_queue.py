"""The thread that feeds the driver, over functions that stand in for the driver's and read what they are handed."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mtserve import _core
from mtserve.errors import InvalidArgument

CONTEXT, STREAM, MAKE_STREAM, EVENT, KERNEL, KEPT = 55, 77, 78, 99, 111, 1 << 40
UNIFIED, STREAM_ORDER, PROGRAMMATIC = 4, 1, 6  # of cuda.h
P, SIZE, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
Int64s = npt.NDArray[np.int64]
Pages = tuple[list[int], list[int]]


class Side(ctypes.Structure):
    """One side of CUDA_MEMCPY2D as cuda.h has it."""

    _fields_ = [
        ("x", SIZE), ("y", SIZE), ("type", INT), ("host", P), ("device", ctypes.c_uint64), ("array", P), ("pitch", SIZE),
    ]  # fmt: skip


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [("source", Side), ("to", Side), ("width", SIZE), ("rows", SIZE)]


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", INT), ("pad", INT), ("value", INT), ("rest", ctypes.c_char * 60)]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint), ("stream", P),
        ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


class Paged(ctypes.Structure):
    """What the kernel is given beside b"value"."""

    _fields_ = [("kept", ctypes.c_longlong), *[(name, INT) for name in ("count", "last", "first")], ("pages", INT * 4)]


FIELDS = [getattr(Paged, name).offset for name in ("first", "last", "count", "pages")]


def kernel(**changes: Any) -> _core._PageKernel:
    """For up to 4 pages at once; two blocks a layer and two pages, but no more than 7."""
    given: dict[str, Any] = {
        "function": KERNEL, "threads": 384, "shared_bytes": 1000, "parameters": [b"value", bytes(Paged(kept=KEPT))], "paged": 1,
        "fields": FIELDS, "most_pages": 4, "tile_pages": 2, "column_tiles": 2, "most_blocks": 7,
    }  # fmt: skip
    return _core._PageKernel(**{**given, **changes})


# The collector may run in a queue's thread, inside one of the functions that it would free.
ALIVE: list[Driver] = []


class Driver:
    """The driver's functions: they note what they are handed, copy at once, and fail when told to."""

    def __init__(self, *, batches: bool = True, reports_failed: bool = True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[int] = set()
        self.fails: Callable[[str, int], int] = lambda name, call: 0
        self.begun = threading.Event()  # a call has
        self.open = threading.Event()
        self.open.set()
        failed = (P,) if reports_failed else ()
        kinds: dict[str, tuple[Any, ...]] = {
            "set_context": (P,), "copy": (P, P, SIZE, P), "copy_batch": (P, P, P, SIZE, P, P, SIZE, *failed, P),
            "copy_2d": (ctypes.POINTER(Copy2D), P), "record": (P, P), "wait_event": (P, P, ctypes.c_uint),
            "launch": (ctypes.POINTER(Config), P, ctypes.POINTER(P), P),
        }  # fmt: skip
        self._kept = {name: ctypes.CFUNCTYPE(INT, *kind)(self._function(name)) for name, kind in kinds.items()}
        functions = {name: ctypes.cast(each, P).value or 0 for name, each in self._kept.items()}
        if not batches:
            functions["copy_batch"] = 0
        self.queue = _core._DriverQueue(**functions, batch_reports_failed=reports_failed, context=CONTEXT)
        ALIVE.append(self)

    def _function(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.begun.set()
            self.open.wait()
            self.threads.add(threading.get_ident())
            code = self.fails(name, len([each for each in self.calls if each[0] == name]))
            self.calls.append((name, *getattr(self, name)(*arguments)))
            return code

        return call

    def set_context(self, context: int) -> tuple[Any, ...]:
        return (context,)

    def copy(self, to: int, source: int, size: int, stream: int) -> tuple[Any, ...]:
        ctypes.memmove(to, source, size)
        return size, stream

    def copy_batch(self, to: int, source: int, sizes: int, count: int, attributes: int, used_from: int, used: int, *rest: int) -> tuple[Any, ...]:  # fmt: skip
        lists = [(ctypes.c_int64 * count).from_address(each) for each in (to, source, sizes)]
        for one in zip(*lists, strict=True):
            ctypes.memmove(*one)
        assert INT.from_address(attributes).value == STREAM_ORDER
        assert (SIZE.from_address(used_from).value, used) == (0, 1)
        return count, rest[-1]

    def copy_2d(self, shape: Any, stream: int) -> tuple[Any, ...]:
        source, to = shape[0].source, shape[0].to
        assert source.type == to.type == UNIFIED
        assert not (source.x or source.y or to.x or to.y or source.array or to.array or source.host or to.host)
        for row in range(shape[0].rows):
            ctypes.memmove(to.device + row * to.pitch, source.device + row * source.pitch, shape[0].width)
        return shape[0].width, stream

    def record(self, event: int, stream: int) -> tuple[Any, ...]:
        return event, stream

    def wait_event(self, stream: int, event: int, flags: int) -> tuple[Any, ...]:
        return stream, event, flags

    def launch(self, config: Any, function: int, parameters: Any, extra: int | None) -> tuple[Any, ...]:
        found, given = config[0], Paged.from_address(parameters[1])
        assert found.count == 1 and (found.attributes[0].id, found.attributes[0].value) == (PROGRAMMATIC, 1)
        assert list(found.grid)[1:] == list(found.block)[1:] == [1, 1] and extra is None
        assert ctypes.string_at(parameters[0], 5) == b"value" and given.kept == KEPT
        shape = found.grid[0], found.block[0], found.shared_bytes
        return function, found.stream, *shape, given.first, given.last, given.pages[: given.count]

    def names(self) -> list[str]:
        return [each[0] for each in self.calls]


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver()
    yield made
    made.open.set()


def places(memory: npt.NDArray[np.uint8], offsets: list[int]) -> Int64s:
    return np.array(offsets, dtype=np.int64) + memory.ctypes.data


@pytest.mark.parametrize(("batches", "reports_failed"), [(True, True), (True, False), (False, True)])
def test_many_copies_of_any_size_in_any_order(batches: bool, reports_failed: bool) -> None:
    driver = Driver(batches=batches, reports_failed=reports_failed)
    rng = np.random.default_rng(1)
    source, to = rng.integers(0, 256, 9000, dtype=np.uint8), np.zeros(9000, dtype=np.uint8)
    firsts, sizes = rng.permutation(1500) * 6, rng.integers(1, 7, 1500)
    expected = np.zeros_like(to)
    for first, size in zip(firsts.tolist(), sizes.tolist(), strict=True):
        expected[first : first + size] = source[first : first + size]
    driver.queue.copy_batch(firsts + to.ctypes.data, firsts + source.ctypes.data, sizes, STREAM)
    sizes[:] = 1  # they were copied
    driver.queue.wait(driver.queue.submit())
    assert driver.queue.take_failure(1) is None
    assert (to == expected).all()
    copied = [each[1:] for each in driver.calls if each[0].startswith("copy")]
    if batches:
        assert copied == [(1024, STREAM), (476, STREAM)]
    else:
        assert len(copied) == 1500 and {each[1] for each in copied} == {STREAM}


LAYERS, LAYER_BYTES, PAGES = 4, 8, 12
PAGE_BYTES = LAYERS * LAYER_BYTES


class Sides:
    """A pool and an arena of bytes, and the link between them."""

    def __init__(self, *, chunk_pages: int = 0, strided_bytes: int = 0) -> None:
        rng = np.random.default_rng(3)
        self.pool, self.arena = (rng.integers(0, 256, (PAGES, LAYERS, LAYER_BYTES), dtype=np.uint8) for _ in range(2))
        self.link = _core._PageLink(
            pool=self.pool.ctypes.data, pool_pages=PAGES, arena=self.arena.ctypes.data, arena_pages=PAGES, layers=LAYERS,
            layer_bytes=LAYER_BYTES, chunk_pages=chunk_pages, strided_bytes=strided_bytes,
        )  # fmt: skip

    def move(self, driver: Driver, steps: list[int], *, to_pool: bool = True, pages: Pages = ([1, 2, 3, 7], [4, 5, 6, 9])) -> None:  # fmt: skip
        ids = [np.array(each, dtype=np.int32) for each in pages]
        parts = ([each[:1], each[1:]] for each in ids)
        driver.queue.move(self.link, to_pool, *parts, steps, STREAM, MAKE_STREAM, kernel())
        for each in ids:
            each[:] = 0  # they were copied

    def run(self, driver: Driver, steps: list[int], **options: Any) -> list[tuple[Any, ...]]:
        """The calls but those that set the context."""
        self.move(driver, steps, **options)
        driver.queue.wait(driver.queue.submit())
        return [call for call in driver.calls if call[0] != "set_context"]


COPIES = {
    "whole": (0, 0, (0, 4), [("copy_batch", 2, STREAM)]),
    "whole, cut at chunks": (5, 0, (0, 4), [("copy_batch", 3, STREAM)]),
    "strided": (0, 32, (1, 3), [("copy_2d", 16, STREAM)] * 2),
    "of runs too short to be strided": (0, 33, (1, 3), [("copy_batch", 4, STREAM)]),
}


@pytest.mark.parametrize(("chunk_pages", "strided_bytes", "layers", "calls"), COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("to_pool", [True, False])
def test_layers_of_pages_are_copied_and_no_others(
    driver: Driver, to_pool: bool, chunk_pages: int, strided_bytes: int, layers: tuple[int, int], calls: list[Any]
) -> None:
    sides = Sides(chunk_pages=chunk_pages, strided_bytes=strided_bytes)
    pool, arena, some = sides.pool.copy(), sides.arena.copy(), slice(*layers)
    if to_pool:
        pool[[1, 2, 3, 7], some] = arena[[4, 5, 6, 9], some]
    else:
        arena[[4, 5, 6, 9], some] = pool[[1, 2, 3, 7], some]
    assert sides.run(driver, [0, 4, *layers, 0, 0, 0, 0], to_pool=to_pool) == calls
    assert (sides.pool == pool).all() and (sides.arena == arena).all()


def test_what_is_made_of_pages_waits_for_them_on_a_stream_of_its_own(driver: Driver) -> None:
    steps = (
        [0, 1, 0, 4, EVENT, 0, 0, 0] + [1, 4, 2, 4, EVENT + 1, 0, 4, EVENT + 2] + [4, 4, 0, 4, EVENT, 4, 4, EVENT + 3]
    )
    assert Sides().run(driver, steps) == [
        ("copy_batch", 1, STREAM),
        ("record", EVENT, STREAM),
        ("copy_2d", 16, STREAM),
        ("copy_2d", 16, STREAM),
        ("record", EVENT + 1, STREAM),
        ("wait_event", MAKE_STREAM, EVENT + 1, 0),
        ("launch", KERNEL, MAKE_STREAM, 7, 384, 1000, 2, 4, [1, 2, 3, 7]),  # 2 layers, 2 pairs of pages: 8, but 7
        ("record", EVENT + 2, MAKE_STREAM),
        ("record", EVENT, STREAM),  # no pages
        ("wait_event", MAKE_STREAM, EVENT, 0),
        ("record", EVENT + 3, MAKE_STREAM),
    ]


def test_a_kernel_is_launched_for_so_many_pages_at_once(driver: Driver) -> None:
    pages = list(range(9)), list(range(9))
    calls = Sides().run(driver, [0, 9, 1, 2, EVENT, 0, 9, EVENT], pages=pages)
    launches = [(call[3], call[-1]) for call in calls if call[0] == "launch"]
    assert launches == [(4, [0, 1, 2, 3]), (4, [4, 5, 6, 7]), (2, [8])]


@pytest.mark.parametrize(
    ("steps", "field"),
    [
        ([0, 5, 0, 4, 0, 0, 0, 0], "steps"),
        ([3, 2, 0, 4, 0, 0, 0, 0], "steps"),
        ([0, 4, 0, 5, 0, 0, 0, 0], "steps"),
        ([0, 4, 3, 2, 0, 0, 0, 0], "steps"),
        ([0, 4, 0, 4, EVENT, 0, 5, EVENT], "steps"),
        ([0, 4, 0, 4, 0, 0, 4, EVENT], "steps"),
        ([0, 4, 0, 4], "steps"),
    ],
)
def test_steps_that_cannot_be_are_refused(driver: Driver, steps: list[int], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Sides().run(driver, steps)
    assert caught.value.field == field
    driver.queue.wait(driver.queue.submit())
    assert driver.names() == ["set_context"]


@pytest.mark.parametrize(
    ("pages", "field"),
    [(([0, 12], [0, 1]), "gpu_pages"), (([0, 1], [0, -1]), "host_pages"), (([0, 1], [0]), "host_pages")],
)
def test_pages_that_there_are_not_are_refused(driver: Driver, pages: Pages, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Sides().run(driver, [], pages=pages)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"paged": 2}, "paged"),
        ({"fields": FIELDS[:3]}, "fields"),
        ({"fields": [-4, *FIELDS[1:]]}, "fields"),
        ({"most_pages": 6}, "fields"),
        ({"tile_pages": 0}, "most_pages"),
    ],
)
def test_kernels_whose_parameters_would_be_written_beyond_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        kernel(**changes)
    assert caught.value.field == field


def test_calls_are_made_in_order_by_one_thread_of_its_own(driver: Driver) -> None:
    driver.queue.record(EVENT, STREAM)
    driver.queue.hold_back(STREAM + 1, EVENT)
    first = driver.queue.submit()
    driver.queue.record(EVENT + 1, STREAM + 1)
    second = driver.queue.submit()
    driver.queue.wait(second)
    assert (first, second) == (1, 2) and driver.queue.over(first) and driver.queue.over(second)
    assert driver.calls == [
        ("set_context", CONTEXT),
        ("record", EVENT, STREAM),
        ("wait_event", STREAM + 1, EVENT, 0),
        ("record", EVENT + 1, STREAM + 1),
    ]
    assert len(driver.threads) == 1 and threading.get_ident() not in driver.threads


def test_a_list_is_over_only_once_its_calls_were_made(driver: Driver) -> None:
    driver.queue.wait(driver.queue.submit())
    driver.open.clear()
    driver.queue.record(EVENT, STREAM)
    ticket = driver.queue.submit()
    assert not driver.queue.over(ticket)
    driver.open.set()
    driver.queue.wait(ticket)
    assert driver.queue.over(ticket)


def test_behind_a_failure_only_events_are_made_and_the_next_list_is_whole(driver: Driver) -> None:
    memory, one, sides = np.zeros(64, dtype=np.uint8), np.full(3, 8, dtype=np.int64), Sides()
    at = places(memory, [0, 8, 16])
    driver.fails = lambda name, call: 999 if (name, call) == ("copy_2d", 1) else 0
    for _ in range(2):
        sides.move(driver, [0, 4, 0, 1, EVENT, 0, 4, EVENT] + [0, 4, 1, 2, EVENT, 0, 4, EVENT])
        driver.queue.copy_batch(at, at + 32, one, STREAM)
        sides.move(driver, [0, 4, 0, 4, EVENT, 0, 0, 0])
        driver.queue.hold_back(STREAM, EVENT)
        driver.queue.submit()
    driver.queue.wait(2)
    events, step = (
        ["record", "wait_event", "record"],
        ["copy_2d", "copy_2d", "record", "wait_event", "launch", "record"],
    )
    failed = ["copy_2d", "copy_2d", *events, *events, "record", "wait_event"]
    assert driver.names()[1:] == failed + [*step, *step, "copy_batch", "copy_batch", "record", "wait_event"]
    assert driver.queue.take_failure(2) is None
    assert driver.queue.take_failure(1) == ("cuMemcpy2DAsync_v2", 999)
    assert driver.queue.take_failure(1) is None


@pytest.mark.parametrize("field", ["to", "source", "sizes"])
def test_arrays_of_other_types_and_lengths_are_refused(driver: Driver, field: str) -> None:
    arrays = {name: np.ones(2, dtype=np.int64) for name in ("to", "source", "sizes")}
    for wrong in (np.ones(2, dtype=np.int32), np.ones((2, 1), dtype=np.int64), np.ones(3, dtype=np.int64)):
        with pytest.raises(InvalidArgument, match="int64 array"):
            driver.queue.copy_batch(*{**arrays, field: wrong}.values(), STREAM)
    driver.queue.wait(driver.queue.submit())
    assert driver.names() == ["set_context"]


def test_a_call_that_hangs_does_not_keep_its_queue_and_is_the_last() -> None:
    """What the calls behind it would touch may be gone when it returns."""
    driver = Driver()
    driver.queue.wait(driver.queue.submit())
    driver.open.clear()
    driver.begun.clear()
    for _ in range(3):
        driver.queue.record(EVENT, STREAM)
        driver.queue.hold_back(STREAM, EVENT)
        driver.queue.submit()
    assert driver.begun.wait(10)
    del driver.queue  # waits for a second, and gives up
    driver.open.set()
    deadline = time.monotonic() + 10
    while len(driver.calls) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert driver.names() == ["set_context", "record"]


@pytest.mark.parametrize("calls", [2, 3, 4])
def test_a_call_that_hangs_within_a_move_is_the_last(calls: int) -> None:
    driver, sides = Driver(), Sides()
    steps = [0, 3, 0, 4, EVENT, 0, 3, EVENT + 1]
    reached, go_on = threading.Event(), threading.Event()

    def hang(name: str, call: int) -> int:
        if len(driver.calls) == calls:
            reached.set()
            go_on.wait()
        return 0

    driver.fails = hang
    sides.move(driver, [*steps, *steps])
    driver.queue.submit()
    assert reached.wait(10)
    del driver.queue  # waits for a second, and gives up
    go_on.set()
    deadline = time.monotonic() + 10
    while len(driver.calls) <= calls and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert driver.names() == ["set_context", "copy_batch", "record", "wait_event", "launch", "record"][: calls + 1]
