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

CONTEXT, STREAM, EVENT, KERNEL = 55, 77, 99, 111
UNIFIED, STREAM_ORDER, PROGRAMMATIC = 4, 1, 6  # of cuda.h
P, SIZE, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
Int64s = npt.NDArray[np.int64]


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
        found = config[0]
        assert found.count == 1 and (found.attributes[0].id, found.attributes[0].value) == (PROGRAMMATIC, 1)
        values = ctypes.c_int.from_address(parameters[0]).value, ctypes.string_at(parameters[1], 5)
        return list(found.grid), list(found.block), found.shared_bytes, found.stream, function, *values, extra

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


def test_rows_of_each_strided_piece_and_no_others(driver: Driver) -> None:
    source = np.random.default_rng(3).integers(0, 256, (12, 40), dtype=np.uint8)
    to = np.zeros_like(source)
    offsets = [8, 208, 368]  # byte 8 of rows 0, 5 and 9
    rows = np.array([3, 1, 2], dtype=np.int64)
    driver.queue.copy_strided(places(to, offsets), places(source, offsets), rows, 16, 40, STREAM)
    driver.queue.wait(driver.queue.submit())
    expected = np.zeros_like(source)
    for row in (0, 1, 2, 5, 9, 10):
        expected[row, 8:24] = source[row, 8:24]
    assert (to == expected).all()
    assert driver.calls[1:] == [("copy_2d", 16, STREAM)] * 3


def test_calls_are_made_in_order_by_one_thread_of_its_own(driver: Driver) -> None:
    driver.queue.record(EVENT, STREAM)
    driver.queue.hold_back(STREAM + 1, EVENT)
    driver.queue.launch(KERNEL, 9, 384, 1000, STREAM + 1, [bytes(ctypes.c_int(-5)), b"value"])
    first = driver.queue.submit()
    driver.queue.record(EVENT + 1, STREAM + 1)
    second = driver.queue.submit()
    driver.queue.wait(second)
    assert (first, second) == (1, 2) and driver.queue.over(first) and driver.queue.over(second)
    assert driver.calls == [
        ("set_context", CONTEXT),
        ("record", EVENT, STREAM),
        ("wait_event", STREAM + 1, EVENT, 0),
        ("launch", [9, 1, 1], [384, 1, 1], 1000, STREAM + 1, KERNEL, -5, b"value", None),
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
    memory, one = np.zeros(64, dtype=np.uint8), np.full(3, 8, dtype=np.int64)
    at = places(memory, [0, 8, 16])
    driver.fails = lambda name, call: 999 if (name, call) == ("copy_2d", 1) else 0
    for _ in range(2):
        driver.queue.copy_strided(at, at + 32, np.ones(3, dtype=np.int64), 8, 8, STREAM)
        driver.queue.record(EVENT, STREAM)
        driver.queue.copy_batch(at, at + 32, one, STREAM)
        driver.queue.launch(KERNEL, 1, 1, 0, STREAM, [bytes(4), bytes(5)])
        driver.queue.hold_back(STREAM, EVENT)
        driver.queue.submit()
    driver.queue.wait(2)
    whole = ["copy_2d"] * 3 + ["record", "copy_batch", "launch", "wait_event"]
    assert driver.names()[1:] == ["copy_2d", "copy_2d", "record", "wait_event", *whole]
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
